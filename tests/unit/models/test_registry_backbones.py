"""For every backbone of the zoo, the logits are the head of the pooled embedding, with and without PyTorch."""

import numpy as np
import pytest
import torch

from batchcls.models.backbone import Backbone
from batchcls.models.classifier_head import ClassifierHead
from batchcls.models.registry import ZooRecord, zoo_records
from batchcls.models.sources import find_model, get_library
from batchcls.models.weights import to_safetensors

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_weights")

CLASSES = 10
# Input sizes of the backbones that do not accept 64 pixels.
SIDES = {"alexnet": 96, "vgg16": 96, "inception_v3": 96, "vit_b_16": 224}

# Larger networks of the same class as a smaller one, half of the time of all.
LARGER = {
    *("resnet101", "resnet152", "regnet_y_16gf", "convnext_small", "convnext_base", "convnext_large"),
    *("efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7"),
}
BACKBONES = [
    pytest.param(record, id=record.name, marks=[pytest.mark.long] if record.name in LARGER else [])
    for record in zoo_records()
]


def test_larger_networks_are_in_the_zoo():
    assert {record.name for record in zoo_records()} > LARGER


@pytest.mark.parametrize("record", BACKBONES)
def test_logits_are_the_head_of_the_pooled_embedding(record: ZooRecord):
    spec = find_model(record.name, {})
    library = get_library(spec)
    model = library.build(spec, CLASSES)
    side = SIDES.get(record.name, 64)
    state = to_safetensors(model.state_dict())
    backbone = Backbone(model, library.classifiers(model), (side, side))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        logits, embedding = backbone(images)
        assert torch.allclose(backbone.head(embedding), logits, atol=1e-5)
    assert backbone.head_tensors  # a new classifier on this backbone needs no image that was predicted before
    head = ClassifierHead.from_weights(state, backbone.head_tensors)
    np.testing.assert_allclose(head.logits(embedding.numpy()), logits.numpy(), atol=1e-4)
    assert logits.shape == (2, CLASSES)
    assert embedding.shape == (2, backbone.dimension)
