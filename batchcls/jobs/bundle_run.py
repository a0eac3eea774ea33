"""The work of `batchcls bundle`; `jobs.bundle` imports it when a command runs."""

import json
import logging
import time
from typing import Any

import torch
from rich.console import Console

from batchcls.cli.console import results_console
from batchcls.cli.tables import bundle_line, record_table, zoo_table
from batchcls.config.bundle_config import (
    BundleCreateConfig,
    BundleExportConfig,
    BundleInspectConfig,
    BundleTestConfig,
    BundleZooConfig,
)
from batchcls.errors import ExitCode, InputError
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import check_program, with_golden
from batchcls.models.build import build_backbone, build_model
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, Device, EngineChoice, EngineConfig, Precision
from batchcls.models.engines.factory import describe_engine
from batchcls.models.export import FILE_NAMES, describe_program, export_program, load_program
from batchcls.models.heads import mark_trainable
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_names import suggest_names
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.registry import find_record, zoo_records
from batchcls.models.resolve import parse_model_arguments, resolve_model
from batchcls.storage.filesystem import Storage, redact_uri, write_files

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
