"""What a worker's exception means: a death, or something that it says itself."""

import ray

from batchcls.errors import InputError
from batchcls.pipeline.ray_errors import cause_of, is_death, stopped


def failed_start() -> Exception:
    """What Ray raises when an actor's own start has raised an exception."""
    text = "Traceback (most recent call last):\nInputError: --device cuda: PyTorch finds no GPU here"
    task = ray.exceptions.RayTaskError("PredictActor.__init__", text, InputError("no GPU"))
    return ray.exceptions.ActorDiedError(task)


def test_an_actor_that_does_not_start_is_no_death_and_says_why():
    error = failed_start()
    assert not is_death(error)
    assert cause_of(error) == "InputError: --device cuda: PyTorch finds no GPU here"
    assert "PyTorch finds no GPU" in str(stopped(error))


def test_a_process_that_ends_is_a_death():
    assert is_death(ray.exceptions.WorkerCrashedError())
    assert is_death(ray.exceptions.ActorDiedError())
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = ray.exceptions.NodeDiedError("gone")
    assert is_death(wrapped)
    assert not is_death(RuntimeError("nothing of the kind"))
