"""Training loss and accuracy: every row counts once, and a mixed image has the label with the larger share."""

import pytest
import torch
from torchvision.transforms import v2

from batchcls.training.train_metrics import TrainMetrics

LOGITS = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])


def test_targets_are_counted_over_batches_of_different_sizes():
    measures = TrainMetrics("cpu")
    measures.add(LOGITS, torch.tensor([0, 1, 1]))
    measures.add(LOGITS[:1], torch.tensor([2]))
    found = measures.result()
    assert (found["rows"], found["top1"]) == (4, 0.5)
    right = torch.nn.functional.cross_entropy(LOGITS[:1], torch.tensor([0])).item()
    assert found["loss"] == pytest.approx((2 * right + 2 * (right + 4)) / 4)


def test_unknown_category_is_counted_as_wrong():
    measures = TrainMetrics("cpu")
    measures.add(LOGITS, torch.tensor([0, -1, -1]))
    found = measures.result()
    assert (found["rows"], found["top1"]) == (3, pytest.approx(1 / 3))
    assert found["loss"] < 0.1


@pytest.mark.parametrize("seed", range(8))
def test_mixed_image_is_correct_if_its_main_class_is_predicted(seed):
    torch.manual_seed(seed)
    images = torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 4, 4)
    mixed, shares = v2.MixUp(alpha=0.2, num_classes=3)(images, torch.arange(3))
    measures = TrainMetrics("cpu")
    # The share of each category in an image is its brightness in one color, so this network is always correct.
    measures.add(20 * mixed.mean(dim=(2, 3)), shares)
    assert measures.result()["top1"] == 1
