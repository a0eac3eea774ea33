import pytest
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.heads import mark_trainable
from batchcls.models.sources import find_model, get_library

pytestmark = pytest.mark.usefixtures("one_thread")


def _model(name: str = "timm:test_resnet") -> nn.Module:
    spec = find_model(name, {})
    return get_library(spec).build(spec, 5)


def _marked(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_all_parameters_are_trainable_by_default():
    model = _model().requires_grad_(False)
    trainable = mark_trainable(model)
    assert trainable.names == _marked(model) == tuple(dict(model.named_parameters()))
    assert trainable.parameters == trainable.total == sum(p.numel() for p in model.parameters())


def test_patterns_select_parameters_and_freeze_the_rest():
    model = _model()
    trainable = mark_trainable(model, ("fc.*", "layer4.*", "fc.bias"))
    expected = tuple(n for n, _ in model.named_parameters() if n.startswith(("fc.", "layer4.")))
    assert trainable.names == _marked(model) == expected
    assert trainable.parameters == sum(model.get_parameter(name).numel() for name in expected)
    assert 0 < trainable.parameters < trainable.total


def test_second_call_replaces_the_first():
    model = _model()
    mark_trainable(model, ("fc.*",))
    mark_trainable(model, ("layer1.*",))
    assert all(name.startswith("layer1.") for name in _marked(model))


def test_only_trainable_parameters_get_gradients():
    model = _model()
    mark_trainable(model, ("fc.*",))
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layr4.*", r"--trainable layr4\.\*: no parameter matches; did you mean .*layer4\.\*"),
        ("fc.wieght", r"did you mean .*fc\.weight"),
        ("layer4", r"did you mean .*layer4\.\*"),
        ("zzz", r"no parameter matches; choose from conv1\.\*, .*layer4\.\*, fc\.\*$"),
        ("FC.*", r"no parameter matches"),
    ],
)
def test_pattern_without_match_suggests_similar_names(pattern, message):
    model = _model()
    with pytest.raises(InputError, match=message):
        mark_trainable(model, ("fc.*", pattern))
    assert len(_marked(model)) == len(list(model.parameters()))


def test_empty_patterns_are_rejected():
    with pytest.raises(InputError, match="at least one pattern"):
        mark_trainable(_model(), ())
