"""Tests for retries: only transient failures of training are retried."""

import errno
from collections.abc import Callable

import pytest
import ray
import torch
from ray.train import WorkerGroupError
from ray.train.v2.api.exceptions import ControllerError
from torch import distributed, nn

from batchcls.errors import BatchclsError, ExitCode, InputError, StorageStoppedError
from batchcls.training import ray_train
from batchcls.training.failures import out_of_memory, permanent_failure, worker_failures


def raised(function) -> BaseException:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - whatever torch raises
        return error
    raise AssertionError("nothing was raised")


def one_value_per_channel() -> None:
    nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


LASTING = [
    raised(lambda: nn.Linear(3, 2)(torch.zeros(1, 4))),
    raised(one_value_per_channel),
    raised(lambda: dict[str, int]()["absent"]),
    raised(lambda: nn.Linear(3, 2).load_state_dict({"weight": torch.zeros(1)})),
    InputError("s3://b/x: there is no such bucket"),
    AssertionError("Wrong image height! Expected 224 but got 160!"),
    FileNotFoundError(errno.ENOENT, "gone"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOSPC, "No space left on device"),
]
PASSING = [
    ray.exceptions.WorkerCrashedError(),
    ray.exceptions.ActorDiedError(),
    ray.exceptions.NodeDiedError("gone"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError("no response"),
    StorageStoppedError("s3://b/x: the store does not respond"),
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    ),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
    distributed.DistBackendError("NCCL error: remote process exited"),
    distributed.DistStoreError("wait timeout after 180000ms"),
    torch.OutOfMemoryError("CUDA out of memory. FitCandidate to allocate 2.00 GiB"),
    MemoryError(),
]


@pytest.mark.parametrize("error", LASTING, ids=lambda error: f"{type(error).__name__}-{str(error)[:20]}")
def test_errors_raised_by_code_are_permanent(error: BaseException):
    assert permanent_failure([error]) is error
    # the others lose their connection to the one that failed
    assert permanent_failure([PASSING[6], error, PASSING[0]]) is error


@pytest.mark.parametrize("error", PASSING, ids=lambda error: f"{type(error).__name__}-{str(error)[:20]}")
def test_process_connection_and_storage_failures_are_retryable(error: BaseException):
    assert permanent_failure([error]) is None


def test_out_of_memory_errors_are_recognized():
    assert out_of_memory(PASSING) is PASSING[-2]
    assert out_of_memory(LASTING) is None


def test_failures_are_ordered_by_rank():
    error = WorkerGroupError("two", {3: ValueError("b"), 1: TypeError("a")})
    assert [type(one) for one in worker_failures(error)] == [TypeError, ValueError]
    assert worker_failures(LASTING[0]) == [LASTING[0]]


def attempts(
    monkeypatch: pytest.MonkeyPatch,
    *failures: BaseException,
    most: int = 3,
    is_node_loss: Callable[[], bool] = lambda: False,
) -> tuple[int, object]:
    """Number of attempts if training fails with these errors, and the final result or exception."""
    starts: list[int] = []

    def fit(*_: object) -> str:
        starts.append(1)
        if len(starts) <= len(failures):
            raise failures[len(starts) - 1]
        return "done"

    monkeypatch.setattr(ray_train, "_fit", fit)
    try:
        ended: object = ray_train.fit_until_done(lambda: None, most, is_node_loss=is_node_loss)
    except BatchclsError as error:
        ended = error
    return len(starts), ended


def group(error: BaseException) -> WorkerGroupError:
    return WorkerGroupError("of a worker", {0: PASSING[6], 1: error})


@pytest.mark.parametrize("error", LASTING[:4], ids=lambda error: type(error).__name__)
def test_permanent_failure_ends_training_with_a_one_line_message(error, monkeypatch: pytest.MonkeyPatch):
    starts, ended = attempts(monkeypatch, group(error))
    assert starts == 1
    assert isinstance(ended, BatchclsError)
    assert str(ended).startswith(f"training stopped: {type(error).__name__}: {str(error)[:30]}")
    assert "\n" not in str(ended)
    assert str(ended).endswith("the failure would occur again")
    assert ended.exit_code == ExitCode.UNEXPECTED


def test_input_error_of_a_worker_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch):
    _, ended = attempts(monkeypatch, group(InputError("the part is damaged")))
    assert (str(ended), ended.exit_code) == ("the part is damaged", ExitCode.BAD_INPUT)


def test_retryable_failures_are_retried_up_to_the_limit(monkeypatch: pytest.MonkeyPatch, log):
    assert attempts(monkeypatch, *[group(PASSING[0])] * 3) == (4, "done")
    assert "failure 3 of --max-failures 3" in log.text
    _, ended = attempts(monkeypatch, *[group(PASSING[0])] * 4)
    assert "after 4 failure(s); the same command resumes from the last checkpoint" in str(ended)


def test_losses_of_nodes_do_not_count_as_failures(monkeypatch: pytest.MonkeyPatch, log):
    failures = [group(PASSING[0])] * 3

    def attempts_with(losses: list[bool]) -> tuple[int, object]:
        asked = iter(losses)
        return attempts(monkeypatch, *failures, most=1, is_node_loss=lambda: next(asked))

    assert attempts_with([True, False, True]) == (4, "done")
    assert log.text.count("training failed because a node was lost") == 2
    starts, ended = attempts_with([True, False, False])
    assert starts == 3
    assert "after 2 failure(s)" in str(ended)


def test_two_consecutive_out_of_memory_errors_end_training(monkeypatch: pytest.MonkeyPatch):
    assert attempts(monkeypatch, group(PASSING[-2]), group(PASSING[0]), group(PASSING[-2])) == (4, "done")
    _, ended = attempts(monkeypatch, group(PASSING[-2]), group(PASSING[-2]))
    assert "twice; reduce --micro-batch-size" in str(ended)


def test_controller_errors_of_ray_train_are_not_retried(monkeypatch: pytest.MonkeyPatch):
    _, ended = attempts(monkeypatch, ControllerError(ValueError("the snapshot is damaged")))
    assert "the snapshot is damaged" in str(ended)
