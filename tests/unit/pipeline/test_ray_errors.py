"""Classification of worker exceptions: a process crash, or an error that the worker raised."""

import ray

from batchcls.errors import InputError
from batchcls.pipeline.ray_errors import is_process_crash, root_cause, to_batchcls_error


def failed_start() -> Exception:
    """Return what Ray raises when an actor's constructor raised an exception."""
    text = (
        "Traceback (most recent call last):\nInputError: --device cuda: PyTorch finds no GPU on this machine"
    )
    task = ray.exceptions.RayTaskError("PredictActor.__init__", text, InputError("no GPU"))
    return ray.exceptions.ActorDiedError(task)


def test_failed_actor_start_is_not_a_crash_and_keeps_its_message():
    error = failed_start()
    assert not is_process_crash(error)
    assert root_cause(error) == "InputError: --device cuda: PyTorch finds no GPU on this machine"
    assert "PyTorch finds no GPU" in str(to_batchcls_error(error))


def test_process_exits_are_crashes():
    assert is_process_crash(ray.exceptions.WorkerCrashedError())
    assert is_process_crash(ray.exceptions.ActorDiedError())
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = ray.exceptions.NodeDiedError("gone")
    assert is_process_crash(wrapped)
    assert not is_process_crash(RuntimeError("nothing of the kind"))
