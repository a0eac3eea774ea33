"""`finetune --recipe linear-probe`: a classifier on the embeddings of a frozen network, on this machine alone."""

import logging
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from batchcls.config.finetune import FinetuneConfig
from batchcls.console import results_console
from batchcls.errors import BudgetExceeded, ExitCode, InputError
from batchcls.images.policies import decode_limits, fetch_policy
from batchcls.manifest import open_labelled
from batchcls.models.bundle import CONFIG_FILE
from batchcls.models.labels import read_labels
from batchcls.runs.budget import allowed_fraction
from batchcls.runs.layout import new_run_id
from batchcls.storage import Storage, explain, join, redact_uri
from batchcls.storage_errors import resumable
from batchcls.tables import bundle_line
from batchcls.training.embeddings import EmbeddingSettings
from batchcls.training.linear import LinearSettings
from batchcls.training.probe import Probed, ProbeSettings, linear_probe_bundle
from batchcls.training.start import open_frozen

NOISE_FILE = "label-noise.parquet"

_logger = logging.getLogger(__name__)


def linear_probe(config: FinetuneConfig, console: Console) -> ExitCode:
    """Train a classifier on embeddings, which are kept on disk for the next time."""
    del console
    started = time.time()
    storage = Storage(config.storage_options)
    with explain(config.output):
        taken = storage.exists(join(config.output, CONFIG_FILE))
    if taken and not config.restart:
        raise InputError(
            f"--output {redact_uri(config.output)} holds a bundle already; name another folder, or give --restart to "
            "replace it"
        )
    training, validation = (
        open_labelled(uri, storage, config.label_column, id_column=config.id_column)
        for uri in (config.manifest, config.validation)
    )
    bundle = open_frozen(config, storage)
    _logger.info("frozen: %s", bundle_line(bundle))
    cores = len(os.sched_getaffinity(0))
    settings = ProbeSettings(
        embedding=EmbeddingSettings(fetch=fetch_policy(config), limits=decode_limits(config), threads=cores),
        linear=LinearSettings(balance=config.class_balance, seed=config.seed, threads=cores),
        name=new_run_id(),
        labels=read_labels(config.labels, storage) if config.labels is not None else None,
    )
    probed = linear_probe_bundle(bundle, training, validation, settings, storage)
    _require_budget(probed, training.rows, allowed_fraction(config.max_failed_fraction, training.rows))
    probed.bundle.save(config.output, storage)
    sink = pa.BufferOutputStream()
    pq.write_table(probed.noise, sink)
    with resumable(config.state_folder):
        storage.write_whole(join(config.state_folder, NOISE_FILE), sink.getvalue().to_pybytes())
    _summarize(config, probed, time.time() - started)
    return ExitCode.DONE


def _require_budget(probed: Probed, rows: int, most: float) -> None:
    failed = probed.metrics["training_failed"]
    count = sum(failed.values())
    if count > most * rows:
        raise BudgetExceeded(
            f"{count} of {rows} training pictures cannot be used ({', '.join(f'{k}={v}' for k, v in failed.items())}); "
            f"more than --max-failed-fraction {most:g} allows"
        )


def _summarize(config: FinetuneConfig, probed: Probed, seconds: float) -> None:
    out = results_console()
    seen = probed.metrics["validation"]
    out.print(
        f"{seen['top1']:.2%} top-1 on {seen['answered']} validation pictures (top-5 {seen['top5']:.1%}, loss "
        f"{seen['loss']:.3f}) after {seconds:.0f} s"
    )
    out.print(
        f"labels that look wrong: {probed.metrics['confidently_mislabelled']} of "
        f"{probed.metrics['training_rows']}, the first {probed.noise.num_rows} in "
        f"{redact_uri(join(config.state_folder, NOISE_FILE))}"
    )
    out.print(f"bundle: {redact_uri(config.output)}: {bundle_line(probed.bundle)}")
