"""Records training runs in MLflow: settings, metrics of each epoch, and the address of the bundle.

MLflow is optional and imported only with `--mlflow`. A tracking server that fails during training does not stop it: a
warning is logged, and all epochs that are missing are sent again at the end.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchcls.errors import InputError
from batchcls.models.model_bundle import Bundle
from batchcls.storage.filesystem import redact_uri
from batchcls.training.train_config import Record

RUN_TAG = "batchcls.run_id"
"""Tag with the ID of the training run, by which a resumed run finds its MLflow run."""

BUNDLE_TAG = "batchcls.bundle"
"""Tag with the address of the bundle."""

FINGERPRINT_TAG = "batchcls.bundle_fingerprint"
"""Tag with the fingerprint of the bundle."""

# Folders are in maintenance mode since MLflow 3.17 and need consent, which `--mlflow FOLDER` is. A server that does not
# respond must not block for minutes (the default is 8 attempts of 120 s), and usage is not reported to third parties.
_ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_MAX_PARAMETER_CHARACTERS = 500
_PARAMETERS_PER_REQUEST = 100
_EPOCH = "epoch"

_logger = logging.getLogger(__name__)


class TrackedRun:
    """A run in MLflow; without a tracking URI, nothing is recorded."""

    def __init__(self, client: Any = None, run_id: str = "", address: str = "") -> None:
        """Use `open_tracked_run`. `client` is an MlflowClient or None, and `address` its redacted URI."""
        self._client, self._run_id, self._address = client, run_id, address
        self._epochs: set[int] = set()
        self._lock = threading.Lock()
        if client is not None:
            history = client.get_metric_history(run_id, _EPOCH)
            self._epochs = {metric.step for metric in history}

    def add_epochs(self, records: Sequence[Record]) -> None:
        """Send the metrics of epochs that were not sent yet; may be called from any thread."""
        if self._client is None:
            return
        with self._lock, self._tolerating_failures():
            for record in records:
                epoch = int(record[_EPOCH])
                if epoch not in self._epochs:
                    self._log_metrics(numbers_of(record), epoch)
                    self._epochs.add(epoch)

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Send the numbers of nested metrics, which do not belong to an epoch."""
        if self._client is not None:
            with self._lock, self._tolerating_failures():
                self._log_metrics(numbers_of(metrics), 0)

    def finish(self, bundle: Bundle, output: str) -> None:
        """Record the address and the fingerprint of the bundle, and that the run has succeeded."""
        if self._client is not None:
            with self._lock, self._tolerating_failures():
                self._client.set_tag(self._run_id, BUNDLE_TAG, redact_uri(output))
                self._client.set_tag(self._run_id, FINGERPRINT_TAG, bundle.fingerprint)
                self._client.set_terminated(self._run_id, "FINISHED")

    def fail(self, *, interrupted: bool) -> None:
        """Record that the run was interrupted or has failed; the same command resumes it."""
        if self._client is not None:
            with self._lock, self._tolerating_failures():
                self._client.set_terminated(self._run_id, "KILLED" if interrupted else "FAILED")

    def _log_metrics(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415 - optional
        from mlflow.utils.time import get_current_time_millis  # noqa: PLC0415 - optional

        now = get_current_time_millis()
        # The epoch is sent last: it marks the metrics as complete.
        names = sorted(numbers, key=lambda name: name == _EPOCH)
        self._client.log_batch(self._run_id, [Metric(name, numbers[name], now, step) for name in names])

    @contextmanager
    def _tolerating_failures(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - optional

        try:
            yield
        except (MlflowException, OSError) as error:
            _logger.warning("MLflow at %s does not record the training: %s", self._address, _one_line(error))


@contextmanager
def tracked_run(
    uri: str | None, experiment: str, run_id: str, parameters: Mapping[str, Any]
) -> Iterator[TrackedRun]:
    """Open the MLflow run of a training run, new or resumed; it is marked as failed if the block raises.

    Args:
        uri: local folder, or URI of a tracking server or database; None: nothing is recorded.
        experiment: name of the experiment, which is created if it does not exist.
        run_id: ID of the training run.
        parameters: nested settings without secrets.

    Raises:
        InputError: the tracking URI cannot be used.
    """
    tracked = TrackedRun() if uri is None else _open(uri, experiment, run_id, parameters)
    try:
        yield tracked
    except BaseException as error:
        tracked.fail(interrupted=isinstance(error, KeyboardInterrupt))
        raise


def require_mlflow(uri: str | None) -> None:
    """Raise InputError if a tracking URI is given and MLflow is not installed."""
    if uri is not None and find_spec("mlflow") is None:
        raise InputError(
            "--mlflow needs the package mlflow-skinny; install it with: pip install 'batchcls[mlflow]'"
        )


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested mappings by name, joined with dots; other values are left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def _open(uri: str, experiment: str, run_id: str, parameters: Mapping[str, Any]) -> TrackedRun:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - optional, and slow to import
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    address = redact_uri(uri)
    try:
        client = MlflowClient(tracking_uri=_tracking_uri(uri))
        found = client.get_experiment_by_name(experiment)
        experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
        runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        if runs:
            mlflow_run = runs[0]
            client.update_run(mlflow_run.info.run_id, status="RUNNING")
        else:
            mlflow_run = client.create_run(experiment_id, tags={RUN_TAG: run_id}, run_name=run_id)
        # A killed job may have created the run without its parameters. Those of a run never change.
        if not mlflow_run.data.params:
            _log_parameters(client, mlflow_run.info.run_id, parameters)
        tracked = TrackedRun(client, mlflow_run.info.run_id, address)
    except (MlflowException, OSError, ImportError) as error:
        raise InputError(f"--mlflow {address} cannot be used: {_one_line(error)}") from None
    _logger.info("MLflow run %s in experiment %s at %s", mlflow_run.info.run_id, experiment, address)
    return tracked


def _log_parameters(client: Any, mlflow_run_id: str, parameters: Mapping[str, Any]) -> None:
    from mlflow.entities import Param  # noqa: PLC0415 - optional

    found = [Param(name, text) for name, text in _texts_of(parameters).items()]
    for start in range(0, len(found), _PARAMETERS_PER_REQUEST):
        client.log_batch(mlflow_run_id, params=found[start : start + _PARAMETERS_PER_REQUEST])


def _texts_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _texts_of(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)[:_MAX_PARAMETER_CHARACTERS]
    return found


def _tracking_uri(uri: str) -> str:
    """Return the URI that MLflow expects; a local folder becomes a file URI."""
    if "://" in uri or uri.startswith("databricks"):
        return uri
    return Path(uri).expanduser().absolute().as_uri()


def _one_line(error: BaseException) -> str:
    """Return the first line of a message without credentials of URIs."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"[a-zA-Z][\w+.-]*://\S+", lambda found: redact_uri(found[0]), text)
