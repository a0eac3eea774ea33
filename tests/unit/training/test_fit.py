import numpy as np
import pytest
import torch

from batchcls.errors import InputError
from batchcls.training.held_out import split_folds
from batchcls.training.linear_probe.fit import LinearSettings, train_linear_probe
from batchcls.training.linear_probe.label_noise import LabelNoise
from batchcls.training.linear_probe.labeled_embeddings import (
    LabeledEmbeddings,
    fit_standardization,
)
from batchcls.training.linear_probe.lda import MiniBatchConfig, fit_large_scale
from batchcls.training.linear_probe.logistic import Objective
from batchcls.training.sampling import BalanceName, class_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def _examples(
    rows: int, categories: int, *, views: int = 1, apart: float = 2.5, seed: int = 0
) -> LabeledEmbeddings:
    """Clusters around random centers; features have different scales, one is constant, and one is noise."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(categories, 16)) * apart / 4
    classes = rng.integers(0, categories, rows).astype(np.int32)
    values = centers[classes] + rng.normal(size=(views, rows, 16))
    values = values * np.geomspace(0.01, 100, 16) + 3
    values = np.concatenate([values, np.full((views, rows, 1), 5.0)], axis=2).astype(np.float32)
    return LabeledEmbeddings.of(values, np.ones(rows, bool), classes, categories)


def _right(head, examples: LabeledEmbeddings) -> float:
    return np.mean([(head.logits(x).argmax(1) == y).float().mean().item() for x, y in examples.chunks()])


def test_probe_separates_clusters_and_estimates_its_accuracy():
    probe = train_linear_probe(_examples(4000, 5), LinearSettings(folds=2))
    unseen = _right(probe.head, _examples(4000, 5, seed=1))
    assert unseen > 0.75
    assert probe.method == "l-bfgs"
    assert probe.chosen.top1 == pytest.approx(unseen, abs=0.03)
    assert probe.chosen.loss == min(one.loss for one in probe.candidates)


def test_accuracy_is_close_to_the_optimal_classifier():
    """The clusters are spherical, so that the nearest center is the optimal classifier."""
    unseen = _examples(4000, 5, seed=1)
    centers = np.random.default_rng(7).normal(size=(5, 16)) * 2.5 / 4
    plain = (unseen.values[0, :, :16] - 3) / np.geomspace(0.01, 100, 16)
    best = np.square(plain[:, None] - centers).sum(2).argmin(1) == unseen.classes
    probe = train_linear_probe(_examples(3000, 5), LinearSettings(folds=2))
    assert _right(probe.head, unseen) > best.mean() - 0.01


def test_head_on_raw_embeddings_equals_head_in_its_space():
    examples = _examples(500, 3)
    space = fit_standardization(examples)
    (embeddings, _), *_ = examples.chunks()
    moved = space.transform(embeddings)
    np.testing.assert_allclose(moved[:, :16].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(moved[:, :16].std(0), 1, rtol=1e-2)
    assert (moved[:, 16] == 0).all()
    weight, bias = torch.randn(3, 17), torch.randn(3)
    torch.testing.assert_close(
        space.head(weight, bias).logits(embeddings), moved @ weight.T + bias, rtol=1e-3, atol=1e-3
    )


def test_fit_is_reproducible_and_keeps_the_random_state_of_the_caller():
    examples = _examples(300, 3, views=2)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first = train_linear_probe(examples, LinearSettings(seed=1, folds=2))
    assert torch.equal(torch.randn(3), expected)
    second = train_linear_probe(examples, LinearSettings(seed=1, folds=2))
    assert torch.equal(first.head.weight, second.head.weight)
    assert first.candidates == second.candidates


def test_all_views_are_used():
    """Only the second view distinguishes the categories; the first is noise."""
    examples = _examples(600, 2, views=2, apart=6)
    values = examples.values.copy()
    values[0] = np.random.default_rng(0).normal(size=values[0].shape)
    probe = train_linear_probe(
        LabeledEmbeddings(values, examples.rows, examples.classes, 2), LinearSettings(folds=2, l2=0.1)
    )
    mirrored = LabeledEmbeddings(values[1:], examples.rows, examples.classes, 2)
    assert _right(probe.head, mirrored) > 0.8


def test_class_weights_increase_the_recall_of_a_small_category():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.array([0, 1], np.int32), [950, 50])
    values = (rng.normal(size=(1, 1000, 4)) + classes[None, :, None] * 0.8).astype(np.float32)
    examples = LabeledEmbeddings.of(values, np.ones(1000, bool), classes, 2)
    found = {}
    for balance in ("none", "loss", "sampling"):
        probe = train_linear_probe(examples, LinearSettings(balance=balance, folds=2))
        found[balance] = probe.head.logits(torch.from_numpy(values[0, 950:])).argmax(1).float().mean().item()
    assert found["loss"] > found["none"] + 0.3
    assert found["sampling"] == found["loss"]


@pytest.mark.parametrize("balance", ["loss", "sampling"])
@pytest.mark.parametrize("passes", [None, MiniBatchConfig(20, 64, 3e-3)])
def test_label_smoothing_with_class_weights_keeps_the_largest_category(
    balance: BalanceName, passes: MiniBatchConfig | None
):
    rng = np.random.default_rng(0)
    classes = np.repeat(np.array([0, 1, 2], np.int32), [940, 10, 10])
    values = rng.normal(size=(1, 960, 4)).astype(np.float32)
    values[0, np.arange(960), classes] += 4
    examples = LabeledEmbeddings.of(values, np.ones(960, bool), classes, 3)
    if passes is None:
        head = train_linear_probe(
            examples, LinearSettings(balance=balance, label_smoothing=0.1, folds=2, l2=0.01)
        ).head
    else:
        fitted = fit_large_scale(examples, Objective(None, 0.1, class_weights(examples.counts), 0), passes)
        head = fitted.space.head(fitted.weight, fitted.bias)
    predictions = head.logits(torch.from_numpy(values[0])).argmax(1).numpy()
    assert min((predictions[classes == k] == k).mean() for k in range(3)) > 0.8


def test_folds_keep_one_row_of_every_category_and_are_stratified():
    classes = np.repeat(np.arange(4, dtype=np.int32), [1, 2, 11, 101])
    fold = split_folds(classes, 5, seed=0)
    assert all((fold[classes == k] == -1).sum() == 1 for k in range(4))
    assert sorted(np.bincount(fold[(classes == 3) & (fold >= 0)]).tolist()) == [20] * 5
    assert sorted(np.bincount(fold[(classes == 2) & (fold >= 0)]).tolist()) == [2] * 5
    assert (fold == split_folds(classes, 5, seed=0)).all()
    assert (fold != split_folds(classes, 5, seed=1)).any()


def test_categories_with_no_row_or_one_row_are_accepted():
    values = np.random.default_rng(0).normal(size=(1, 41, 4)).astype(np.float32)
    values[0, :20] += 4
    classes = np.array([1] * 20 + [3] * 20 + [4], np.int32)
    examples = LabeledEmbeddings.of(values, np.ones(41, bool), classes, 6)
    probe = train_linear_probe(examples, LinearSettings(folds=2))
    predictions = probe.head.logits(torch.from_numpy(values[0])).argmax(1)
    assert (predictions[:20] == 1).float().mean() > 0.9
    assert not set(predictions.tolist()) & {0, 2, 5}


@pytest.mark.parametrize(
    ("classes", "message"),
    [([1, 1, 1], "have one category; at least two are needed"), ([0, 1, 2], "alone in its category")],
)
def test_rows_without_training_signal_are_rejected(classes, message):
    values = np.zeros((1, 3, 4), np.float32)
    examples = LabeledEmbeddings.of(values, np.ones(3, bool), np.array(classes, np.int32), 3)
    with pytest.raises(InputError, match=message):
        train_linear_probe(examples, LinearSettings())


def test_large_scale_method_is_as_accurate_with_float16_from_disk(tmp_path):
    examples = _examples(6000, 40, views=2, apart=4)
    mapped = np.lib.format.open_memmap(tmp_path / "values.npy", "w+", np.float16, examples.values.shape)
    mapped[:] = examples.values
    unseen = _examples(3000, 40, apart=4, seed=1)
    stored = LabeledEmbeddings(
        np.load(tmp_path / "values.npy", mmap_mode="r"), examples.rows, examples.classes, 40
    )
    objective = Objective(None, 0.0, None, 0)
    closed = fit_large_scale(stored, objective, MiniBatchConfig(0))
    trained = fit_large_scale(stored, objective, MiniBatchConfig(4, 256, 3e-3))
    assert trained.chosen.loss <= closed.chosen.loss
    small = train_linear_probe(examples, LinearSettings(folds=2))
    by_small = _right(small.head, unseen)
    assert small.method == "l-bfgs"
    for fitted in (closed, trained):
        assert _right(fitted.space.head(fitted.weight, fitted.bias), unseen) > by_small - 0.02


def test_mini_batches_improve_the_closed_form_on_heavy_tailed_data():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 6000).astype(np.int32)
    values = rng.standard_t(2, size=(1, 6000, 8)).astype(np.float32)
    values[0, np.arange(6000), classes] += 4
    examples = LabeledEmbeddings.of(values, np.ones(6000, bool), classes, 3)
    closed = fit_large_scale(examples, Objective(None, 0.0, None, 0), MiniBatchConfig(0))
    trained = fit_large_scale(examples, Objective(None, 0.0, None, 0), MiniBatchConfig(10, 256, 1e-2))
    assert trained.chosen.loss < closed.chosen.loss - 0.01


def test_wrong_labels_are_first_in_the_noise_report():
    examples = _examples(1200, 4, apart=8)
    wrong = np.random.default_rng(3).choice(1200, 24, replace=False)
    classes = examples.classes.copy()
    classes[wrong] = (classes[wrong] + 1) % 4
    noisy = LabeledEmbeddings(examples.values, examples.rows, classes, 4)
    probe = train_linear_probe(noisy, LinearSettings(folds=3))
    noise = LabelNoise.of([(torch.from_numpy(probe.held_out), torch.from_numpy(classes.astype(np.int64)))])
    seen = np.isfinite(noise.loss)
    assert (~seen).sum() == 4
    first = np.argsort(-np.where(seen, noise.loss, -np.inf))[:24]
    assert len(set(first) & set(wrong)) >= 20
    assert (noise.suggested[first] == examples.classes[first]).mean() > 0.8
    confident = np.flatnonzero(noise.confident)
    assert len(set(confident) & set(wrong)) >= 20
    assert len(confident) < 60
