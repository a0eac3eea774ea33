import numpy as np
import pytest

from batchcls.inference.agreement import (
    NO_PREDICTION,
    AccuracyTolerance,
    EngineAgreement,
    best_class,
    is_close_to,
    top1_agreement,
)
from batchcls.models.engines.engine import EngineOutput


def _answer(images=200, seed=0):
    random = np.random.default_rng(seed)
    return EngineOutput(
        random.normal(size=(images, 7)).astype(np.float32), random.normal(size=(images, 5)).astype(np.float32)
    )


def _with_other_classes(answer, count):
    logits = answer.logits.copy()
    logits[:count] = np.roll(logits[:count], 1, axis=1)
    return EngineOutput(logits, answer.embedding)


def test_equal_answers_agree_wholly_and_hold_every_contract():
    found = EngineAgreement.between(_answer(), _answer())
    assert (found.images, found.top1_agreement) == (200, 1)
    assert found.mean_cosine == pytest.approx(1)
    for precision in ("fp32", "bf16", "fp16", "int8"):
        assert found.holds(AccuracyTolerance(0.999, 0.9999, 0.999), precision)


def test_every_image_with_another_best_class_counts_once():
    found = EngineAgreement.between(_with_other_classes(_answer(), 3), _answer())
    assert found.top1_agreement == pytest.approx(197 / 200)
    assert found.holds(AccuracyTolerance(min_top1_agreement=0.98), "bf16")
    assert found.missed(AccuracyTolerance(min_top1_agreement=0.99), "bf16") == (
        "98.50% of the images keep the best class of fp32, 99.00% are asked for"
    )


def test_the_angle_between_embeddings_counts_and_their_length_does_not():
    answer = _answer()
    assert EngineAgreement.between(
        EngineOutput(answer.logits, answer.embedding * 3), answer
    ).mean_cosine == pytest.approx(1)
    turned = answer.embedding.copy()
    turned[0] *= -1
    found = EngineAgreement.between(EngineOutput(answer.logits, turned), answer)
    assert found.least_cosine == pytest.approx(-1)
    assert found.mean_cosine == pytest.approx(198 / 200)
    assert found.missed(AccuracyTolerance(), "fp16") == (
        "the cosine of its embeddings with fp32's is 0.99000, 0.999 is asked for"
    )


def test_a_share_that_another_sample_might_miss_is_a_close_call():
    found = EngineAgreement.between(_with_other_classes(_answer(), 2), _answer())
    assert found.holds(AccuracyTolerance(), "bf16")
    assert found.close_call(AccuracyTolerance(), "bf16").startswith(
        "99.00% of 200 images is within the sampling error"
    )
    assert found.close_call(AccuracyTolerance(min_top1_agreement=0.98), "bf16") is None
    assert found.close_call(AccuracyTolerance(), "fp32") is None
    assert found.close_call(AccuracyTolerance(), "int8") is None
    assert found.close_call(AccuracyTolerance(int8_min_agreement=0.99), "int8") is not None


def test_int8_is_held_to_its_own_bound_alone():
    answer = _with_other_classes(_answer(), 10)
    answer = EngineOutput(answer.logits, -answer.embedding)
    found = EngineAgreement.between(answer, _answer())
    assert found.holds(AccuracyTolerance(), "int8")
    assert found.holds(AccuracyTolerance(int8_min_agreement=0.95), "int8")
    assert not found.holds(AccuracyTolerance(int8_min_agreement=0.96), "int8")


def test_fp32_in_another_engine_may_differ_by_rounding_whatever_is_asked():
    found = EngineAgreement.between(_with_other_classes(_answer(), 1), _answer())
    exact = AccuracyTolerance(min_top1_agreement=1, min_embedding_cosine=1)
    assert found.holds(exact, "fp32")
    assert not found.holds(exact, "bf16")


def test_an_answer_that_is_not_finite_agrees_with_nothing():
    broken = _answer()
    broken.logits[4, 2] = np.nan
    broken.embedding[9, 0] = np.inf
    assert np.flatnonzero(best_class(broken) == NO_PREDICTION).tolist() == [4, 9]
    found = EngineAgreement.between(broken, broken)
    assert found.top1_agreement == 198 / 200
    assert found.least_cosine == 0
    assert top1_agreement(best_class(broken), best_class(broken)) == 198 / 200


def test_embeddings_of_zeros_are_the_same():
    zeros = EngineOutput(_answer().logits, np.zeros((200, 5), np.float32))
    assert EngineAgreement.between(zeros, zeros).least_cosine == 1
    assert EngineAgreement.between(zeros, _answer()).mean_cosine == 0


def test_equality_allows_rounding_and_no_more():
    answer = _answer()
    assert is_close_to(EngineOutput(answer.logits * 1.001, answer.embedding * 0.999), answer, 0.01)
    assert not is_close_to(EngineOutput(answer.logits * 1.02, answer.embedding), answer, 0.01)
    assert not is_close_to(EngineOutput(answer.logits, answer.embedding * 1.02), answer, 0.01)
    assert not is_close_to(EngineOutput(answer.logits * np.nan, answer.embedding), answer, 0.01)
