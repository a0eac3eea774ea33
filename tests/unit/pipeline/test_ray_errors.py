"""Classification of worker exceptions: a process crash, or an error that the worker raised."""

import ray

from batchcls.errors import InputError, StorageStoppedError
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


def test_error_of_a_function_of_ray_data_keeps_its_message():
    text = (
        "Traceback (most recent call last):\n"
        "batchcls.errors.StorageStoppedError: /out: no space left on the device\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\n"
        "Failed to apply UDF transform after 1/1 attempts."
    )
    error = to_batchcls_error(ray.exceptions.RayTaskError("MapWorker.submit", text, RuntimeError("wrapped")))
    assert isinstance(error, StorageStoppedError)
    assert str(error) == "/out: no space left on the device"


def test_process_exits_are_crashes():
    assert is_process_crash(ray.exceptions.WorkerCrashedError())
    assert is_process_crash(ray.exceptions.ActorDiedError())
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = ray.exceptions.NodeDiedError("gone")
    assert is_process_crash(wrapped)
    assert not is_process_crash(RuntimeError("nothing of the kind"))
