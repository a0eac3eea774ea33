import numpy as np
import pytest

from batchcls.errors import InputError
from batchcls.training.sampling import RowSampler, class_weights


def test_inverse_weights_give_all_categories_equal_weight():
    counts = np.array([100, 10, 0, 1])
    weights = class_weights(counts)
    assert weights[2] == 0
    np.testing.assert_allclose((weights * counts)[[0, 1, 3]], 37, rtol=1e-6)


def test_effective_number_weights_match_the_paper():
    counts, beta = np.array([5000, 500, 5]), 0.999
    published = (1 - beta) / (1 - np.power(beta, counts))
    weights = class_weights(counts, "effective", beta)
    np.testing.assert_allclose(weights / weights[0], published / published[0], rtol=1e-5)
    assert np.average(weights, weights=counts) == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(class_weights(counts, "effective", 0.0), 1, rtol=1e-6)


def test_invalid_weights_are_rejected():
    with pytest.raises(InputError, match="below 1, got 1"):
        class_weights(np.array([1, 2]), "effective", 1.0)
    with pytest.raises(InputError, match="no category has a training row"):
        class_weights(np.array([0, 0]))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_partition_an_epoch(ranks):
    classes = np.array([0, 1, -1, 1, 2, -2, 0, 0, 1, 2, 2], np.int32)
    sampler = RowSampler(classes, seed=3)
    parts = [sampler.for_rank(4, rank, ranks) for rank in range(ranks)]
    together = np.concatenate(parts)
    assert sorted(together.tolist()) == np.flatnonzero(classes >= 0).tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    woven = np.empty(len(together), np.int64)
    for rank, part in enumerate(parts):
        woven[rank::ranks] = part
    assert woven.tolist() == sampler.order(4).tolist()


def test_order_depends_only_on_seed_and_epoch():
    classes = np.zeros(100, np.int32)
    order = RowSampler(classes, seed=1).order(0).tolist()
    assert order == RowSampler(classes, seed=1).order(0).tolist()
    assert order != RowSampler(classes, seed=2).order(0).tolist()
    assert order != RowSampler(classes, seed=1).order(1).tolist()


def test_balanced_sampling_draws_all_categories_equally_often():
    classes = np.repeat(np.array([0, 1, 2], np.int32), [900, 90, 9])
    drawn = classes[RowSampler.balanced(classes, 4, seed=0).order(0)]
    assert len(drawn) == len(classes)
    # Systematic sampling draws each row floor or ceil of its expected number of times.
    assert np.abs(np.bincount(drawn) - 333).max() <= 10
    times = np.bincount(RowSampler.balanced(classes, 4, seed=0).order(0), minlength=len(classes))
    assert times[:900].max() == 1
    assert set(times[900:990].tolist()) == {3, 4}
    assert times[990:].tolist() == [37] * 9


def test_invalid_rank_is_rejected():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        RowSampler(np.zeros(4, np.int32), seed=0).for_rank(0, 2, 2)
