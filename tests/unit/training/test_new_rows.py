"""Tests of the rows of a classifier for new categories, on embeddings with known distributions."""

import pytest
import torch

from batchcls.training.linear_probe.labeled_embeddings import LinearHead
from batchcls.training.linear_probe.new_rows import fit_new_rows

pytestmark = pytest.mark.usefixtures("one_thread")

DIMENSION, KNOWN = 32, 4
_random = torch.Generator().manual_seed(0)
CENTERS = 2.2 * torch.randn(KNOWN + 2, DIMENSION, generator=_random) / DIMENSION**0.5 * 2
COMMON = 3.0 * torch.randn(DIMENSION, generator=_random)
"""What all images have in common: real embeddings are far from 0."""


def images(category: int, count: int, seed: int) -> torch.Tensor:
    noise = torch.randn(count, DIMENSION, generator=torch.Generator().manual_seed(1000 * category + seed))
    return COMMON + CENTERS[category] + noise


def bayes_head(categories: int) -> LinearHead:
    """The optimal classifier of the first categories, which have unit covariance."""
    means = COMMON + CENTERS[:categories]
    return LinearHead(means, -0.5 * means.square().sum(1))


HEAD = bayes_head(KNOWN)
EXISTING = torch.cat([images(category, 50, 1) for category in range(KNOWN)])
TEST = torch.cat([images(category, 200, 9) for category in range(KNOWN + 2)])
TRUTH = torch.arange(KNOWN + 2).repeat_interleave(200)


def predictions(head: LinearHead, rows: LinearHead) -> torch.Tensor:
    return torch.cat([head.logits(TEST), rows.logits(TEST)], dim=1).argmax(1)


@pytest.mark.parametrize("count", [5, 10, 20])
def test_new_categories_are_found_and_existing_ones_keep_their_images(count: int):
    fitted = fit_new_rows(HEAD, [images(KNOWN, count, 2), images(KNOWN + 1, count, 2)], EXISTING)
    correct = predictions(HEAD, fitted.head) == TRUTH
    before = (HEAD.logits(TEST).argmax(1) == TRUTH)[TRUTH < KNOWN].float().mean()
    best = (bayes_head(KNOWN + 2).logits(TEST).argmax(1) == TRUTH)[TRUTH >= KNOWN].float().mean()
    assert correct[TRUTH < KNOWN].float().mean() > before - 0.03
    assert correct[TRUTH >= KNOWN].float().mean() > best - 0.12
    assert all(share is not None and share > 0.5 for share in fitted.held_out)


def test_rows_follow_a_shift_of_all_existing_rows():
    """A vector that is added to all rows does not change probabilities, so the new rows have to contain it."""
    new = [images(KNOWN, 8, 2)]
    fitted = fit_new_rows(HEAD, new, EXISTING).head
    shift = torch.linspace(-1, 1, DIMENSION)
    shifted = fit_new_rows(LinearHead(HEAD.weight + shift, HEAD.bias + 3), new, EXISTING).head
    torch.testing.assert_close(shifted.weight, fitted.weight + shift, atol=0.02, rtol=0.01)
    torch.testing.assert_close(shifted.bias, fitted.bias + 3, atol=0.2, rtol=0.01)


def test_probabilities_are_fitted_at_the_temperature():
    """A head whose logits are too large by the temperature gets rows that are too large by the same factor."""
    new = [images(KNOWN, 8, 2)]
    fitted = fit_new_rows(HEAD, new, EXISTING).head
    hot = fit_new_rows(LinearHead(3 * HEAD.weight, 3 * HEAD.bias), new, EXISTING, temperature=3.0).head
    torch.testing.assert_close(hot.weight, 3 * fitted.weight, atol=0.05, rtol=0.01)
    torch.testing.assert_close(hot.bias, 3 * fitted.bias, atol=0.5, rtol=0.01)


def test_held_out_shares_describe_later_images():
    fitted = fit_new_rows(HEAD, [images(KNOWN, 40, 2)], EXISTING)
    later = (predictions(HEAD, fitted.head) == KNOWN)[TRUTH == KNOWN].float().mean()
    assert fitted.held_out[0] == pytest.approx(float(later), abs=0.12)


def test_a_single_image_is_enough_but_cannot_be_held_out():
    fitted = fit_new_rows(HEAD, [images(KNOWN, 1, 2)], EXISTING)
    assert fitted.held_out == (None,)
    assert torch.isfinite(fitted.head.weight).all()
    share = (predictions(HEAD, fitted.head) == KNOWN)[TRUTH == KNOWN].float().mean()
    assert share > 0.3


def test_constant_values_have_no_weight():
    """A value that is constant for existing images would get an arbitrary weight from rounding errors."""
    existing, new = EXISTING.clone(), images(KNOWN, 8, 2)
    existing[:, 3] = 1.5
    fitted = fit_new_rows(HEAD, [new], existing).head
    assert fitted.weight[0, 3] == pytest.approx(float(HEAD.weight[:, 3].mean()), abs=1e-6)
