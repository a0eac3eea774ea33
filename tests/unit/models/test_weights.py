import io
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.model_bundle import sha256_hex
from batchcls.models.weights import (
    from_checkpoint,
    from_safetensors,
    load_strictly,
    read_weights,
    to_safetensors,
)
from batchcls.storage.filesystem import Storage


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class _RunsOnLoad:
    """An object whose unpickling calls os.mkdir with a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_safetensors_round_trip_is_exact():
    state = _network().state_dict()
    read = from_safetensors(to_safetensors(state), "x")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_bytes_are_independent_of_order_and_memory_layout():
    state = _network().state_dict()
    shuffled = dict(reversed(state.items()))
    shuffled["0.weight"] = shuffled["0.weight"].to(memory_format=torch.channels_last)
    assert to_safetensors(shuffled) == to_safetensors(state)


def test_tensors_that_share_memory_can_be_saved():
    shared = torch.arange(4.0)
    read = from_safetensors(to_safetensors({"a": shared, "b": shared[:2]}), "x")
    assert read["b"].tolist() == [0, 1]


def test_truncated_safetensors_file_is_rejected():
    with pytest.raises(InputError, match=r"mug\.safetensors is not a complete safetensors file"):
        from_safetensors(to_safetensors(_network().state_dict())[:-8], "mug.safetensors")


def test_safetensors_file_keeps_its_digest(tmp_path):
    data = to_safetensors(_network().state_dict())
    (tmp_path / "w.safetensors").write_bytes(data)
    _, kept = read_weights(str(tmp_path / "w.safetensors"), Storage())
    assert sha256_hex(kept) == sha256_hex(data)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_pickled_checkpoint_is_read_with_or_without_wrapper(tmp_path, wrap):
    state = _network().state_dict()
    (tmp_path / "w.pth").write_bytes(_saved(wrap(state)))
    read, data = read_weights(str(tmp_path / "w.pth"), Storage())
    assert torch.equal(read["3.weight"], state["3.weight"])
    assert data == to_safetensors(state)


def test_data_parallel_prefix_is_removed():
    state = _network().state_dict()
    read = from_checkpoint(_saved({f"module.{k}": v for k, v in state.items()}), "x")
    assert read.keys() == state.keys()


@pytest.mark.parametrize("save", [_saved, partial(pickle.dumps, protocol=2)], ids=["torch.save", "pickle"])
def test_pickle_with_code_is_rejected_without_execution(tmp_path, save):
    made = tmp_path / "made-by-the-pickle"
    (tmp_path / "evil.pth").write_bytes(save({"state_dict": _RunsOnLoad(made)}))
    with pytest.raises(
        InputError, match=r"evil\.pth is a pickle that contains other objects than tensors.*safetensors"
    ):
        read_weights(str(tmp_path / "evil.pth"), Storage())
    assert not made.exists()


def test_unrestricted_unpickling_would_execute_the_code(tmp_path):
    made = tmp_path / "made-by-the-pickle"
    pickle.loads(pickle.dumps(_RunsOnLoad(made)))
    assert made.is_dir()


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", _saved({"a": torch.zeros(9)})[:-40]])
def test_damaged_checkpoint_is_rejected(data):
    with pytest.raises(InputError, match=r"mug\.pth"):
        from_checkpoint(data, "mug.pth")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}])
def test_checkpoint_without_state_is_rejected(content):
    with pytest.raises(InputError, match="contains no state_dict"):
        from_checkpoint(_saved(content), "mug.pth")


def test_unknown_file_type_is_rejected_with_supported_types():
    with pytest.raises(InputError, match=r"model\.onnx: unknown file type.*\.safetensors.*\.pth"):
        read_weights("model.onnx", Storage())


def test_missing_file_is_rejected_by_name(tmp_path):
    with pytest.raises(InputError, match=r"none\.safetensors: there is no such file"):
        read_weights(str(tmp_path / "none.safetensors"), Storage())


def test_strict_loading_lists_differences():
    state = dict(_network().state_dict())
    for name in [f"extra.{i}" for i in range(7)]:
        state[name] = torch.zeros(1)
    del state["0.bias"]
    state["3.weight"] = torch.zeros(5, 4)
    with pytest.raises(InputError) as caught:
        load_strictly(_network(), state, "mug.safetensors")
    message = str(caught.value)
    assert "1 missing: 0.bias" in message
    assert "7 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more" in message
    assert "3.weight is (5, 4) and should be (2, 4)" in message
    assert "--model-args" in message


def test_strict_loading_copies_all_values():
    source, target = _network(), _network()
    nn.init.normal_(source[3].weight)
    load_strictly(target, source.state_dict(), "x")
    assert torch.equal(target[3].weight, source[3].weight)


def test_file_without_batch_counter_loads():
    state = {k: v for k, v in _network().state_dict().items() if not k.endswith("num_batches_tracked")}
    network = _network()
    load_strictly(network, state, "x")
    assert int(network[1].num_batches_tracked) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_rejected(value):
    state = _network().state_dict()
    state["3.bias"][1] = value
    with pytest.raises(InputError, match=r"NaN or infinity in 3\.bias"):
        load_strictly(_network(), state, "x")
