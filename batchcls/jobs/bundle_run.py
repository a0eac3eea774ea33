"""The work of `batchcls bundle`; `jobs.bundle` imports it when a command runs."""

import json
import logging
import os
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from batchcls.cli.console import results_console, show_progress
from batchcls.cli.tables import bundle_line, record_table, zoo_table
from batchcls.config.bundle_config import (
    BundleCreateConfig,
    BundleExportConfig,
    BundleExtendConfig,
    BundleInspectConfig,
    BundleTestConfig,
    BundleZooConfig,
)
from batchcls.errors import ExitCode, InputError
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import check_program, with_golden
from batchcls.manifest.labeled_manifest import open_labeled_manifest, read_label_column
from batchcls.models.build import build_backbone, build_model
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, Device, EngineChoice, EngineConfig, Precision
from batchcls.models.engines.factory import describe_engine
from batchcls.models.export import FILE_NAMES, describe_program, export_program, load_program
from batchcls.models.heads import mark_trainable
from batchcls.models.labels import CategoryPaths, Labels, parse_category_path
from batchcls.models.model_bundle import CONFIG_FILE, Bundle
from batchcls.models.model_names import suggest_names
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.registry import find_record, zoo_records
from batchcls.models.resolve import parse_model_arguments, resolve_model
from batchcls.runs.paths import new_run_id
from batchcls.storage.filesystem import Storage, explain, join, redact_uri, write_files
from batchcls.training.categories import complete_category_paths, format_names
from batchcls.training.linear_probe.embeddings import EmbeddingSettings
from batchcls.training.linear_probe.extended_bundle import (
    MAX_EXISTING_ROWS,
    ExtendedBundle,
    ExtensionSettings,
    LabeledImages,
    check_new_labels,
    extend_bundle,
    images_of_folders,
    images_of_manifest,
)
from batchcls.training.training_progress import TrainingProgress

_logger = logging.getLogger("batchcls.jobs.bundle")

_TEST_BATCH = 4  # the number of golden images


def create(config: BundleCreateConfig, console: Console) -> ExitCode:
    """Build the model with strictly loaded weights, compute its golden outputs, and write it as a bundle."""
    del console
    storage = Storage(config.storage_options)
    choices = ModelChoices(
        weights=config.weights,
        labels=config.labels,
        category_paths=config.category_paths,
        tap=config.embedding_tap,
        new_head=config.new_head,
        dropout=config.dropout,
        trainable=tuple(config.trainable),
        arguments=parse_model_arguments(config.model_args or ""),
        overrides=PreprocessingOverrides.from_settings(config),
    )
    bundle = with_golden(resolve_model(config.model, choices, storage))
    bundle.save(config.output, storage)
    _logger.info("%s: %s", redact_uri(config.output), bundle_line(bundle))
    return ExitCode.DONE


def extend(config: BundleExtendConfig, console: Console) -> ExitCode:
    """Add categories to a bundle from a few labeled images, and write the new bundle."""
    storage = Storage(config.storage_options)
    bundle = Bundle.load(config.bundle, storage)
    _logger.info("bundle: %s", bundle_line(bundle))
    with explain(config.output):
        if storage.exists(join(config.output, CONFIG_FILE)):
            raise InputError(
                f"--output {redact_uri(config.output)} already contains a bundle; choose another folder"
            )
    images, new = _read_images(config, bundle, storage)
    paths = _paths(config, bundle, new)
    cores = len(os.sched_getaffinity(0))
    progress = TrainingProgress()

    def on_progress(rows: int) -> None:
        progress.rows = rows

    settings = ExtensionSettings(
        embedding=EmbeddingSettings(fetch_policy(config), decode_limits(config), threads=cores),
        name=new_run_id(),
        run=config.run,
        on_progress=on_progress,
    )
    rows = images.rows.num_rows
    with show_progress(lambda: progress, rows, console, config.log_interval_seconds, "embed"):
        extended = extend_bundle(bundle, images, new, paths, settings, storage)
    extended.bundle.save(config.output, storage)
    _print_new_categories(config, bundle, extended)
    return ExitCode.DONE


def _read_images(
    config: BundleExtendConfig, bundle: Bundle, storage: Storage
) -> tuple[LabeledImages, Labels]:
    """Return the images, and the names of the new categories."""
    if config.manifest is None:
        check_new_labels(bundle, config.category)
        folders = dict(zip(config.category, config.images, strict=True))
        return images_of_folders(folders, storage), tuple(config.category)
    manifest = open_labeled_manifest(
        config.manifest, storage, config.label_column, id_column=config.id_column
    )
    column = read_label_column(manifest, storage)
    unknown = sorted(set(column.distinct.to_pylist()) - set(bundle.config.labels))
    new = tuple(config.category or unknown)
    check_new_labels(bundle, new)
    missing = [label for label in new if label not in unknown]
    if missing or not new:
        raise InputError(
            f"--manifest {redact_uri(config.manifest)} has no images of {format_names(missing)}"
            if missing
            else f"--manifest {redact_uri(config.manifest)} has no category that the bundle does not have"
        )
    if len(unknown) > len(new):
        left_out = [label for label in unknown if label not in new]
        _logger.warning(
            "labels that are neither new nor in the bundle are left out: %s", format_names(left_out)
        )
    limits = dict.fromkeys(bundle.config.labels, MAX_EXISTING_ROWS) | dict.fromkeys(new)
    return images_of_manifest(manifest, column, limits, storage), new


def _paths(config: BundleExtendConfig, bundle: Bundle, new: Labels) -> CategoryPaths | None:
    """The category paths of all labels."""
    labels = (*bundle.config.labels, *new)
    if not config.category_path:
        return complete_category_paths(bundle.config, labels)
    if bundle.config.category_paths is None:
        raise InputError("--category-path: the bundle has no category paths; omit the flag")
    given = tuple(parse_category_path(path, "--category-path") for path in config.category_path)
    return (*bundle.config.category_paths, *given)


def _print_new_categories(config: BundleExtendConfig, bundle: Bundle, extended: ExtendedBundle) -> None:
    out = results_console()
    table = Table(
        "new category", "images", "unreadable", "held-out recall", "share of other images", box=None
    )
    for found in extended.categories:
        unreadable = sum(found.failures.values())
        held_out = "-" if found.held_out is None else f"{found.held_out:.0%}"
        table.add_row(found.label, str(found.images), str(unreadable), held_out, f"{found.moved:.1%}")
    out.print(table)
    if bundle.config.calibration is not None:
        names = format_names([found.label for found in extended.categories])
        out.print(
            f"note: the temperature and the thresholds of the existing categories are kept; with `classify --abstain`, "
            f"no prediction of {names} is accepted until `evaluate --write-bundle` has fitted its threshold"
        )
    out.print(f"bundle: {redact_uri(config.output)}: {bundle_line(extended.bundle)}")


def inspect(config: BundleInspectConfig, console: Console) -> ExitCode:
    """Print the contents of a bundle, after checking that it is complete."""
    del console
    bundle = Bundle.load(config.bundle, Storage(config.storage_options))
    out = results_console()
    out.print(bundle_line(bundle))
    out.print(f"fingerprint {bundle.fingerprint}")
    trainable = mark_trainable(build_model(bundle), bundle.config.trainable)
    out.print(f"{trainable.parameters:,} of {trainable.total:,} parameters are trainable")
    summarized: dict[str, Any] = {
        "labels": True,
        "category_paths": True,
        "golden": True,
        "calibration": {"thresholds"},
        "cascade": {"thresholds"},
    }
    record = bundle.config.model_dump(mode="json", exclude=summarized)
    golden = bundle.config.golden
    out.print_json(
        data=record
        | {"labels": f"{len(bundle.config.labels)} labels"}
        | {"category_paths": f"{len(bundle.config.category_paths or ())} paths"}
        | {"golden": f"outputs for {len(golden.outputs) if golden else 0} golden images"}
    )
    return ExitCode.DONE


def test(config: BundleTestConfig, console: Console) -> ExitCode:
    """Load the bundle as an actor does, and print the deviation of its outputs from the golden outputs."""
    del console
    bundle = Bundle.load(config.bundle, Storage(config.storage_options))
    out = results_console()
    out.print(bundle_line(bundle))
    choice, engine_config = _resolve_engine(config)
    started = time.perf_counter()
    engine, deviation = start_tested_engine(bundle, choice, engine_config)
    out.print(
        f"passed on {describe_engine(engine)} in {time.perf_counter() - started:.1f} s: probabilities differ by at "
        f"most {deviation.probability:.2g}, embeddings by {deviation.distance:.2g} of their spread"
    )
    return ExitCode.DONE


def _resolve_engine(config: BundleTestConfig) -> tuple[EngineChoice, EngineConfig]:
    """Return the engine and its configuration, with `auto` replaced by values for this machine."""
    device: Device = "cpu"
    if config.device != "auto":
        device = config.device
    elif config.engine != "openvino" and torch.cuda.is_available():
        device = "cuda"
    precision: Precision = REFERENCE.precision if config.precision == "auto" else config.precision
    engine_config = EngineConfig(
        device=device,
        threads=torch.get_num_threads(),
        batch_size=_TEST_BATCH,
        compile_cache=CompileCache.from_cache_dir(config.cache_dir),
    )
    return EngineChoice(config.engine, precision), engine_config


def export(config: BundleExportConfig, console: Console) -> ExitCode:
    """Export the network as a program, after testing the program with the golden outputs."""
    del console
    storage = Storage(config.storage_options)
    bundle = Bundle.load(config.bundle, storage)
    preprocessing = bundle.config.preprocessing
    data = export_program(build_backbone(bundle), preprocessing, config.format)
    deviation = check_program(bundle.config, load_program(data, config.format))
    _logger.info(
        "the exported program reproduces the golden outputs (embeddings differ by %.2g)", deviation.distance
    )
    description = describe_program(bundle, config.format)
    files = {
        FILE_NAMES[config.format]: data,
        "model.json": (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(),
        "labels.txt": "".join(f"{label}\n" for label in bundle.config.labels).encode(),
    }
    for uri, content in zip(write_files(config.output, files, storage), files.values(), strict=True):
        _logger.info("%s: %.1f MiB", redact_uri(uri), len(content) / 2**20)
    return ExitCode.DONE


def zoo(config: BundleZooConfig, console: Console) -> ExitCode:
    """Print the zoo, or the record of one backbone."""
    del console
    out = results_console()
    if config.name is None:
        out.print(zoo_table(zoo_records()))
        out.print(
            "top-1: accuracy of the default weights on ImageNet-1k; `batchcls bundle zoo NAME` lists all weights"
        )
        return ExitCode.DONE
    record = find_record(config.name)
    if record is None:
        raise InputError(f"the zoo has no {config.name}{suggest_names(config.name)}")
    out.print(record_table(record))
    return ExitCode.DONE
