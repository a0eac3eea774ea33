"""Fixtures of the fast tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def cheap_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills large networks with copies of a few random values, because drawing hundreds of megabytes takes long."""
    import torch
    from torch.nn import init

    pool = torch.empty(1_000_003).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(0))

    def fill(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        with torch.no_grad():
            flat = tensor.view(-1)
            for start in range(0, flat.numel(), pool.numel()):
                part = flat[start : start + pool.numel()]
                part.copy_(pool[: part.numel()])
        return tensor

    for name in (
        "kaiming_uniform_",
        "kaiming_normal_",
        "xavier_uniform_",
        "trunc_normal_",
        "normal_",
        "uniform_",
    ):
        monkeypatch.setattr(init, name, fill)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: on a busy machine its threads wait for each other far longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
