"""Checkpoints within an epoch: training resumes from the step with identical results."""

import copy
from pathlib import Path

import pytest
import torch

from batchcls.training.pixel_cache import PixelStore
from batchcls.training.train_config import DistributedContext
from batchcls.training.trainer import Hooks, Training
from tests.helpers.training import ROWS, network, settings, train, weights_of, write_stores


@pytest.fixture
def stores(tmp_path: Path) -> tuple[PixelStore, PixelStore]:
    return write_stores(tmp_path)


@pytest.mark.parametrize("at", [(0, 1), (1, 2), (2, 3)])
def test_checkpoint_within_an_epoch_resumes_to_the_same_result(stores, at: tuple[int, int]):
    """The weights are bit-identical, and so are the metrics of the interrupted epoch."""
    undisturbed, _, _ = train(settings(), stores)
    kept: dict[tuple[int, int], dict] = {}
    hooks = Hooks(
        wrap=lambda model: model,
        step_done=lambda *_: None,
        epoch_done=lambda *_: None,
        is_checkpoint_due=lambda: True,
        checkpoint=lambda record, state: kept.update(
            {(record["epoch"], record["steps"]): copy.deepcopy(state())}
        ),
    )
    Training(network(), ["fc"], settings(), DistributedContext(), hooks).run(*stores)
    assert list(kept) == [(epoch, step) for epoch in range(3) for step in (1, 2, 3)]
    shown: list[int] = []
    hooks = Hooks(
        wrap=lambda model: model, step_done=lambda _, seen: shown.append(seen), epoch_done=lambda *_: None
    )
    resumed = Training(network(), ["fc"], settings(), DistributedContext(), hooks)
    resumed.restore(kept[at])
    assert resumed.run(*stores) is None
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    assert len(shown) == 9 - 3 * at[0] - at[1]
    assert shown[-1:] in ([], [ROWS])
    for ours, theirs in zip(resumed.history, undisturbed.history, strict=True):
        for name in ("images", "loss", "top1", "validation_loss", "validation_top1", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
