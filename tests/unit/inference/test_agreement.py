import numpy as np
import pytest

from batchcls.inference.agreement import (
    NO_PREDICTION,
    AccuracyTolerance,
    EngineAgreement,
    best_classes,
    outputs_close,
    top1_agreement,
)
from batchcls.models.engines.engine import EngineOutput


def _output(images=200, seed=0):
    random = np.random.default_rng(seed)
    return EngineOutput(
        random.normal(size=(images, 7)).astype(np.float32), random.normal(size=(images, 5)).astype(np.float32)
    )


def _with_other_classes(output, count):
    logits = output.logits.copy()
    logits[:count] = np.roll(logits[:count], 1, axis=1)
    return EngineOutput(logits, output.embedding)


def test_equal_outputs_satisfy_every_tolerance():
    found = EngineAgreement.between(_output(), _output())
    assert (found.images, found.top1_agreement) == (200, 1)
    assert found.mean_cosine == pytest.approx(1)
    for precision in ("fp32", "bf16", "fp16", "int8"):
        assert found.satisfies(AccuracyTolerance(0.999, 0.9999, 0.999), precision)


def test_top1_agreement_counts_images_with_same_best_class():
    found = EngineAgreement.between(_with_other_classes(_output(), 3), _output())
    assert found.top1_agreement == pytest.approx(197 / 200)
    assert found.satisfies(AccuracyTolerance(min_top1_agreement=0.98), "bf16")
    assert found.violation(AccuracyTolerance(min_top1_agreement=0.99), "bf16") == (
        "top-1 agreement with fp32 is 98.50%, below the required 99.00%"
    )


def test_cosine_does_not_depend_on_embedding_length():
    output = _output()
    assert EngineAgreement.between(
        EngineOutput(output.logits, output.embedding * 3), output
    ).mean_cosine == pytest.approx(1)
    flipped = output.embedding.copy()
    flipped[0] *= -1
    found = EngineAgreement.between(EngineOutput(output.logits, flipped), output)
    assert found.min_cosine == pytest.approx(-1)
    assert found.mean_cosine == pytest.approx(198 / 200)
    assert found.violation(AccuracyTolerance(), "fp16") == (
        "mean embedding cosine with fp32 is 0.99000, below the required 0.999"
    )


def test_agreement_within_sampling_error_of_limit_gives_warning():
    found = EngineAgreement.between(_with_other_classes(_output(), 2), _output())
    assert found.satisfies(AccuracyTolerance(), "bf16")
    assert found.sampling_warning(AccuracyTolerance(), "bf16").startswith(
        "top-1 agreement of 99.00% on 200 images is within the sampling error"
    )
    assert found.sampling_warning(AccuracyTolerance(min_top1_agreement=0.98), "bf16") is None
    assert found.sampling_warning(AccuracyTolerance(), "fp32") is None
    assert found.sampling_warning(AccuracyTolerance(), "int8") is None
    assert found.sampling_warning(AccuracyTolerance(int8_min_agreement=0.99), "int8") is not None


def test_int8_has_only_its_own_limit():
    output = _with_other_classes(_output(), 10)
    output = EngineOutput(output.logits, -output.embedding)
    found = EngineAgreement.between(output, _output())
    assert found.satisfies(AccuracyTolerance(), "int8")
    assert found.satisfies(AccuracyTolerance(int8_min_agreement=0.95), "int8")
    assert not found.satisfies(AccuracyTolerance(int8_min_agreement=0.96), "int8")


def test_fp32_of_another_engine_may_differ_by_rounding():
    found = EngineAgreement.between(_with_other_classes(_output(), 1), _output())
    exact = AccuracyTolerance(min_top1_agreement=1, min_embedding_cosine=1)
    assert found.satisfies(exact, "fp32")
    assert not found.satisfies(exact, "bf16")


def test_outputs_that_are_not_finite_agree_with_nothing():
    broken = _output()
    broken.logits[4, 2] = np.nan
    broken.embedding[9, 0] = np.inf
    assert np.flatnonzero(best_classes(broken) == NO_PREDICTION).tolist() == [4, 9]
    found = EngineAgreement.between(broken, broken)
    assert found.top1_agreement == 198 / 200
    assert found.min_cosine == 0
    assert top1_agreement(best_classes(broken), best_classes(broken)) == 198 / 200


def test_embeddings_of_zeros_are_equal():
    zeros = EngineOutput(_output().logits, np.zeros((200, 5), np.float32))
    assert EngineAgreement.between(zeros, zeros).min_cosine == 1
    assert EngineAgreement.between(zeros, _output()).mean_cosine == 0


def test_outputs_close_allows_rounding_only():
    output = _output()
    assert outputs_close(EngineOutput(output.logits * 1.001, output.embedding * 0.999), output, 0.01)
    assert not outputs_close(EngineOutput(output.logits * 1.02, output.embedding), output, 0.01)
    assert not outputs_close(EngineOutput(output.logits, output.embedding * 1.02), output, 0.01)
    assert not outputs_close(EngineOutput(output.logits * np.nan, output.embedding), output, 0.01)
