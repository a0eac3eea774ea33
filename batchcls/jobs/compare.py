"""`batchcls compare`: backbones x engines x batch sizes on this cluster -> which to take."""

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import ray
from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.cli.comparison_tables import LEGEND, results_table, watching_candidates
from batchcls.cli.console import results_console
from batchcls.comparison.benchmark import BenchmarkResult, measure
from batchcls.comparison.candidates import (
    BenchmarkEnvironment,
    Candidate,
    default_batch_sizes,
    default_threads,
    parse_engines,
)
from batchcls.comparison.comparison_outputs import ComparisonSummary, write_outputs
from batchcls.comparison.recommend import Requirements, recommend
from batchcls.comparison.results import Results
from batchcls.comparison.runner import ComparisonInputs, Reference, Skipped, open_inputs, run_campaign
from batchcls.comparison.sample_pixels import Prepared, pixels_key, prepare
from batchcls.config.compare_config import CompareConfig
from batchcls.errors import ExitCode, InputError, stop_run_on_input_error
from batchcls.hardware import Hardware
from batchcls.models.engines.engine import Device
from batchcls.preprocessing import Preprocessing
from batchcls.ray_runtime import (
    NodeInfo,
    ray_session,
    run_exclusive,
    run_exclusive_on_all,
    wait_for_cluster,
    worker_nodes,
)
from batchcls.report.compare_page import PageContext, compare_page
from batchcls.storage.filesystem import redact_uri

_logger = logging.getLogger("batchcls.jobs.compare")  # __name__ is __main__ here

_EXAMPLES = """examples:
  batchcls compare --manifest sample.parquet --models resnet50,efficientnet_b4 --output compared
  batchcls compare --config jobs/compare.toml --target-ms 100 --price-per-hour 0.40
  batchcls compare --manifest s3://shop/catalog/ --models s3://shop/models/v7,convnext_tiny \\
      --engines torch:bf16 --device cuda --output s3://shop/compared

The same command goes on where it stopped; other models are added to the same output.
exit codes: 0 done; 1 unexpected, or nothing could be measured; 2 bad configuration or input, nothing written;
            4 stopped, and the measurements are kept; 130 interrupted
"""


def compare(config: CompareConfig, console: Console) -> ExitCode:
    """Run the job from manifest to page; errors leave as `errors.BatchclsError`."""
    inputs = open_inputs(config)
    results = Results(config.output, inputs.sample.fingerprint, inputs.storage)
    with ray_session(config.ray_address):
        places = wait_for_cluster(lambda: _places(config), config.wait_for_cluster_seconds)
        skipped = _measure_all(inputs, places, results, console)
    verdict = _verdict(config, inputs, results, skipped)
    context = PageContext(
        title="Which backbone to take",
        manifest=redact_uri(config.manifest),
        images=inputs.sample.rows.num_rows,
        created=verdict.created,
        version=version("batchcls"),
    )
    page = compare_page(verdict.measurements, verdict.needs, verdict.recommendations, context)
    with stop_run_on_input_error():
        written = write_outputs(verdict, page, config.output, inputs.storage)
    _show(verdict, written)
    return ExitCode.DONE


def _places(config: CompareConfig) -> dict[BenchmarkEnvironment, NodeInfo]:
    """One node of each kind of hardware, and how candidates are measured there."""
    nodes = [node for node in worker_nodes() if config.device != "cuda" or node.gpus >= 1]
    if not nodes:
        needed = "a GPU" if config.device == "cuda" else "a CPU for tasks"
        raise InputError(f"the cluster has no node with {needed}; add one, or choose another --device")
    found = run_exclusive_on_all(nodes, Hardware.detect, config.wait_for_cluster_seconds)
    places: dict[BenchmarkEnvironment, NodeInfo] = {}
    for node, hardware in zip(nodes, found, strict=True):
        places.setdefault(_place(config, node, hardware), node)
    for place, node in places.items():
        _logger.info(
            "hardware: %s; measured on %s, %s, %d thread(s)",
            place.hardware,
            node.host,
            place.device,
            place.threads,
        )
    return places


def _place(config: CompareConfig, node: NodeInfo, hardware: Hardware) -> BenchmarkEnvironment:
    device: Device = "cuda" if config.device != "cpu" and node.gpus >= 1 and hardware.gpu else "cpu"
    if config.device == "cuda" and device == "cpu":
        raise InputError(f"--device cuda: PyTorch finds no GPU on {node.host}; use --device cpu or auto")
    return BenchmarkEnvironment(
        hardware=hardware,
        device=device,
        threads=default_threads(device, node.cpus) if config.threads == "auto" else config.threads,
        batch_sizes=tuple(config.batch_sizes) or default_batch_sizes(device),
        worthwhile_only=not config.batch_sizes,
        seconds=config.seconds_per_measurement,
        cache_dir=config.cache_dir,
    )


class _Cluster:
    """Measures candidates on the nodes; bundles and pixels go into the object store once."""

    def __init__(self, inputs: ComparisonInputs, places: Mapping[BenchmarkEnvironment, NodeInfo]) -> None:
        self._inputs = inputs
        self._nodes = places
        self._bundles: dict[str, Any] = {}
        self._prepared: dict[tuple[BenchmarkEnvironment, Preprocessing], Any] = {}

    def prepare(self, candidates: Sequence[Candidate]) -> None:
        """Load the sample for all these candidates, so that a bad sample ends the job at once."""
        for candidate in candidates:
            bundle = self._inputs.bundles[candidate.model]
            key = (candidate.place, pixels_key(bundle.config.preprocessing))
            if key not in self._prepared:
                self._prepared[key] = ray.put(self._load(*key))
            if candidate.model not in self._bundles:
                self._bundles[candidate.model] = ray.put(bundle)

    def measure(self, candidate: Candidate, reference: Reference) -> BenchmarkResult:
        """Measure a candidate in a fresh process that has its node to itself."""
        preprocessing = self._inputs.bundles[candidate.model].config.preprocessing
        return run_exclusive(
            self._nodes[candidate.place],
            measure,
            self._bundles[candidate.model],
            candidate,
            self._prepared[candidate.place, pixels_key(preprocessing)],
            reference,
        )

    def _load(self, place: BenchmarkEnvironment, preprocessing: Preprocessing) -> Prepared:
        inputs = self._inputs
        size = f"{preprocessing.input_width} x {preprocessing.input_height}"
        prepared = run_exclusive(
            self._nodes[place], prepare, inputs.sample, preprocessing, inputs.fetch, inputs.limits
        )
        _logger.info(
            "%d images at %s pixels, %.1f ms to load one", len(prepared.pixels), size, prepared.median_ms
        )
        if prepared.failures:
            reasons = ", ".join(f"{name}={count}" for name, count in prepared.failures.most_common())
            _logger.warning("%d images of the sample are excluded: %s", prepared.failures.total(), reasons)
        return prepared


def _measure_all(
    inputs: ComparisonInputs,
    places: Mapping[BenchmarkEnvironment, NodeInfo],
    results: Results,
    console: Console,
) -> list[Skipped]:
    candidates = [
        Candidate(name, bundle.fingerprint, engine, place)
        for place in places
        for name, bundle in inputs.bundles.items()
        for engine in parse_engines(inputs.engines, place.device)
    ]
    cluster = _Cluster(inputs, places)
    try:
        cluster.prepare([candidate for candidate in candidates if results.find(candidate) is None])
        with watching_candidates(console, len(candidates)) as begin:
            return run_campaign(candidates, results, cluster.measure, begin)
    except KeyboardInterrupt:
        kept = sum(results.find(candidate) is not None for candidate in candidates)
        _logger.info(
            "%d of %d measurements are saved; run the same command again to resume", kept, len(candidates)
        )
        raise


def _verdict(
    config: CompareConfig, inputs: ComparisonInputs, results: Results, skipped: Sequence[Skipped]
) -> ComparisonSummary:
    needs = Requirements.model_validate(config.model_dump(include=set(Requirements.model_fields)))
    kinds = results.by_hardware()
    return ComparisonSummary(
        created=datetime.now(UTC),
        settings=config.redacted(),
        sample=inputs.sample.fingerprint,
        needs=needs,
        kinds=kinds,
        recommendations={key: recommend(measurements, needs) for key, measurements in kinds.items()},
        skipped=skipped,
    )


def _show(verdict: ComparisonSummary, written: Sequence[str]) -> None:
    """The closing words, on stdout: a table and an answer for each kind of hardware, never for two."""
    out = results_console()
    for key, measurements in verdict.kinds.items():
        out.print()
        out.print(str(measurements[0].hardware))
        out.print(results_table(measurements, verdict.needs.price_per_hour, out.width))
        out.print()
        for sentence in verdict.recommendations[key].sentences:
            out.print(sentence)
    out.print()
    out.print(LEGEND)
    for entry in verdict.skipped:
        out.print(f"not measured: {entry.candidate}: {entry.reason}")
    for uri in written:
        out.print(f"results: {redact_uri(uri)}")


COMMANDS = (Command("compare", CompareConfig, compare, _EXAMPLES),)

if __name__ == "__main__":
    main("compare", COMMANDS)
