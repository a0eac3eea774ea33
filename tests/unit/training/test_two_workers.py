"""Training with two gloo workers, and resumed training, give bit-identical results."""

import copy
import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn

from batchcls.training.optimizer import DDP_ARGUMENTS, batch_norms
from batchcls.training.recipe import Recipe, read_recipe
from batchcls.training.sampling import LabeledRows
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.trained_bundle import read_training_result
from batchcls.training.trainer import State, Training
from tests.helpers.training import (
    ROWS,
    VALIDATION_ROWS,
    Stores,
    hooks,
    identity,
    network,
    recipe,
    settings,
    train,
    weights_of,
    write_stores,
)

ALONE = DistributedContext()


class Killed(Exception):  # noqa: N818 - not an error
    """Simulates a killed process."""


def random_recipe() -> Recipe:
    """A recipe with all settings that use random numbers."""
    return read_recipe("modern").with_changes(
        epochs=3, head_epochs=1, final_epochs=0, batch_size=10, batch_norm="trained", size_fraction=1.0,
        final_size_fraction=1.0,
    )  # fmt: skip


def stochastic_network() -> nn.Module:
    """A network with dropout and stochastic depth."""
    return network(drop_rate=0.4, drop_path_rate=0.3)


def undisturbed_and_resumed(
    stores: Stores, context: DistributedContext = ALONE, wrap=identity
) -> list[torch.Tensor]:
    """The weights of an undisturbed training, and of one that is killed in the second step of epoch 3 and resumed."""
    chosen = settings(recipe=random_recipe(), micro_batch_size=4)
    straight, _, _ = train(chosen, stores, context, wrap, stochastic_network())

    def die(epoch: int, images: int) -> None:
        if epoch == 2 and images > 10:
            raise Killed

    states: list[State] = []
    killed = Training(stochastic_network(), ["fc"], chosen, context, hooks(wrap, die, states))
    with pytest.raises(Killed):
        killed.run(*stores)
    kept = io.BytesIO()
    torch.save(states[-1], kept)
    kept.seek(0)
    torch.manual_seed(99 + context.rank)  # another random state than in the killed process
    resumed = Training(stochastic_network(), ["fc"], chosen, context, hooks(wrap))
    resumed.restore(torch.load(kept, weights_only=True))
    assert resumed.run(*stores) is None
    return [weights_of(straight), weights_of(resumed)]


def test_killed_training_resumes_to_identical_weights(tmp_path: Path):
    straight, resumed = undisturbed_and_resumed(write_stores(tmp_path))
    assert torch.equal(straight, resumed)


def test_result_does_not_depend_on_the_random_state_of_the_process(tmp_path: Path):
    stores = write_stores(tmp_path)
    chosen = settings(recipe=random_recipe())
    found = []
    for seed in (1, 2):
        model = stochastic_network()
        torch.manual_seed(seed)
        found.append(weights_of(train(chosen, stores, model=model)[0]))
    assert torch.equal(*found)
    plain = weights_of(train(chosen, stores, model=network())[0])
    assert not torch.equal(found[0], plain)


def uneven() -> TrainingSettings:
    """Rows with a few of rare categories, so that workers and micro-batches have different weights."""
    targets = np.zeros(ROWS, np.int32)
    targets[:3] = (1, 2, 2)
    return settings(training=LabeledRows(np.arange(ROWS), targets), balance="loss", micro_batch_size=3)


def statistics(model: nn.Module) -> torch.Tensor:
    return torch.cat(
        [value for layer in batch_norms(model) for value in (layer.running_mean, layer.running_var)]
    )


def gathered(stores: Stores, context: DistributedContext, wrap) -> dict[str, object]:
    """Statistics of each worker before averaging, and of the network and its EMA in the checkpoint."""
    chosen = settings(recipe=recipe(epochs=1, head_epochs=0, batch_norm="trained", layer_decay=1.0))
    seen: list[torch.Tensor] = []

    def look(_epoch: int, images: int) -> None:
        if images == ROWS:
            assert training._average is not None
            seen.extend(copy.deepcopy(statistics(model)) for model in (training._model, training.trained))

    states: list[State] = []
    training = Training(network(), ["fc"], chosen, context, hooks(wrap, look, states))
    assert training.run(*stores) is None
    kept = io.BytesIO()
    torch.save(states[-1], kept)
    saved = network()
    saved.load_state_dict(read_training_result(kept.getvalue()).weights)
    after = [statistics(training._model), statistics(training.trained)]
    return {"before": seen, "after": after, "saved": statistics(saved)}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    stores = write_stores(Path(folder) / str(rank))
    wrap, context = partial(nn.parallel.DistributedDataParallel, **DDP_ARGUMENTS), DistributedContext(rank, 2)
    training, _, _ = train(settings(micro_batch_size=3), stores, context, wrap)
    found = {"weights": weights_of(training), "history": training.history}
    found["weighted"] = weights_of(train(uneven(), stores, context, wrap)[0])
    found["statistics"] = gathered(stores, context, wrap)
    found["both"] = undisturbed_and_resumed(stores, context, wrap)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of two real worker processes."""
    folder = tmp_path_factory.mktemp("workers")
    for rank in range(2):
        (folder / str(rank)).mkdir()
    multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.long
def test_two_workers_train_like_one(tmp_path: Path, both: list[dict]):
    alone, _, _ = train(settings(), write_stores(tmp_path))
    assert torch.equal(both[0]["weights"], both[1]["weights"])
    assert torch.allclose(both[0]["weights"], weights_of(alone), atol=2e-4)
    for ours, theirs in zip(both[0]["history"], alone.history, strict=True):
        assert ours["images"] == theirs["images"] == ROWS
        assert ours["validation_rows"] == VALIDATION_ROWS
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-2)


@pytest.mark.long
def test_two_workers_weight_rows_like_one(tmp_path: Path, both: list[dict]):
    alone, _, _ = train(uneven(), write_stores(tmp_path))
    assert torch.equal(both[0]["weighted"], both[1]["weighted"])
    assert torch.allclose(both[0]["weighted"], weights_of(alone), atol=2e-4)


@pytest.mark.long
def test_batch_norm_statistics_are_averaged_over_workers(both: list[dict]):
    first, second = (found["statistics"] for found in both)
    for model in range(2):
        before = [found["before"][model] for found in (first, second)]
        assert not torch.allclose(*before)
        torch.testing.assert_close(first["after"][model], sum(before) / 2)
        assert torch.equal(first["after"][model], second["after"][model])
    assert torch.equal(first["saved"], first["after"][1])


@pytest.mark.long
def test_two_killed_workers_resume_to_identical_weights(both: list[dict]):
    for found in both:
        assert torch.equal(*found["both"])
    assert torch.equal(both[0]["both"][0], both[1]["both"][0])
