"""For every backbone of the zoo, the logits are the head of the pooled embedding, with and without PyTorch."""

import numpy as np
import pytest
import torch

from batchcls.models.backbone import Backbone
from batchcls.models.classifier_head import ClassifierHead
from batchcls.models.registry import ZooRecord
from batchcls.models.sources import find_model, get_library
from batchcls.models.weights import to_safetensors
from tests.helpers.tiers import zoo

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_weights")

CLASSES = 10
# Input sizes of the backbones that do not accept 64 pixels.
SIDES = {"alexnet": 96, "vgg16": 96, "inception_v3": 96, "vit_b_16": 224}


@pytest.mark.parametrize("record", zoo(), ids=lambda record: record.name)
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
