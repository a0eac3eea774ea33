"""The work of `batchcls compare`: measures the candidates on the nodes and writes the recommendation."""

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import ray
from rich.console import Console

from batchcls.cli.comparison_tables import LEGEND, comparison_progress, results_table
from batchcls.cli.console import results_console
from batchcls.cluster.job_nodes import JobNodes
from batchcls.cluster.placement import Placement
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
from batchcls.comparison.runner import ComparisonInputs, Reference, Skipped, measure_candidates, open_inputs
from batchcls.comparison.sample_pixels import SamplePixels, load_sample_pixels, pixels_key
from batchcls.config.compare_config import CompareConfig
from batchcls.errors import ExitCode, InputError, InsufficientResourcesError, stop_run_on_input_error
from batchcls.hardware import Hardware
from batchcls.manifest.snapshot import Manifest
from batchcls.models.engines.engine import Device
from batchcls.preprocessing import Preprocessing
from batchcls.ray_runtime import (
    NodeInfo,
    ray_session,
    run_exclusive,
    run_exclusive_on_all,
    wait_for_cluster,
)
from batchcls.report.compare_page import PageContext, compare_page
from batchcls.storage.filesystem import redact_uri

_logger = logging.getLogger("batchcls.jobs.compare")


def compare(config: CompareConfig, manifest: Manifest, console: Console) -> ExitCode:
    """Measure all candidates on images of the manifest and write all outputs. Raises `BatchclsError`."""
    inputs = open_inputs(config, manifest)
    results = Results(config.output, inputs.sample.fingerprint, inputs.storage)
    with ray_session(config.ray_address):
        nodes = _find_nodes(config)
        environments = _environments(config, nodes)
        skipped = _measure_all(inputs, environments, results, console)
    summary = _summarize(config, inputs, results, skipped)
    context = PageContext(
        title="Comparison of backbones",
        manifest=redact_uri(config.manifest),
        images=inputs.sample.rows.num_rows,
        created=summary.created,
        version=version("batchcls"),
    )
    page = compare_page(summary.measurements, summary.requirements, summary.recommendations, context)
    with stop_run_on_input_error():
        written = write_outputs(summary, page, config.output, inputs.storage)
    _print_results(summary, written)
    return ExitCode.DONE


def _find_nodes(config: CompareConfig) -> list[NodeInfo]:
    """Wait for nodes with the requested device and return them.

    Raises:
        InputError: none joins within the time limit.
    """
    job_nodes = JobNodes(config)
    nodes = wait_for_cluster(
        lambda: _with_device(config, job_nodes.find()),
        config.wait_for_cluster_seconds,
        lambda: job_nodes.find().job,
    )
    placement = job_nodes.find()
    _logger.info(placement.describe_nodes(nodes))
    if config.device == "auto" and not any(node.gpus >= 1 for node in nodes):
        job_nodes.warn_about_missing_gpus(placement)
    return nodes


def _with_device(config: CompareConfig, placement: Placement) -> list[NodeInfo]:
    """The nodes with the requested device. Raises InsufficientResourcesError if there is none."""
    nodes = [
        node for node in placement.nodes if node.cpus >= 1 and (config.device != "cuda" or node.gpus >= 1)
    ]
    needs_gpu = config.device == "cuda" or config.require_gpu
    if not nodes or (needs_gpu and not any(node.gpus >= 1 for node in nodes)):
        needed = "a GPU" if needs_gpu else "a CPU"
        raise InsufficientResourcesError(
            f"the cluster has no node with {needed} that this job may use; add one, or see --device, --use-head and "
            "--node-labels",
            {"CPU": 1, "GPU": 1} if needs_gpu else {"CPU": 1},
        )
    return nodes


def _environments(config: CompareConfig, nodes: Sequence[NodeInfo]) -> dict[BenchmarkEnvironment, NodeInfo]:
    """One node of each hardware configuration, by its benchmark environment."""
    detected = run_exclusive_on_all(nodes, Hardware.detect, config.wait_for_cluster_seconds)
    environments: dict[BenchmarkEnvironment, NodeInfo] = {}
    for node, hardware in zip(nodes, detected, strict=True):
        environments.setdefault(_environment(config, node, hardware), node)
    for environment, node in environments.items():
        _logger.info(
            "hardware: %s; measured on %s, %s, %d thread(s)",
            environment.hardware,
            node.host,
            environment.device,
            environment.threads,
        )
    return environments


def _environment(config: CompareConfig, node: NodeInfo, hardware: Hardware) -> BenchmarkEnvironment:
    device: Device = "cuda" if config.device != "cpu" and node.gpus >= 1 and hardware.gpu else "cpu"
    if device == "cpu" and (config.device == "cuda" or (config.require_gpu and node.gpus >= 1)):
        flag = "--device cuda" if config.device == "cuda" else "--require-gpu"
        raise InputError(f"{flag}: PyTorch finds no GPU on {node.host}; use --device cpu or auto")
    return BenchmarkEnvironment(
        hardware=hardware,
        device=device,
        threads=default_threads(device, node.cpus) if config.threads == "auto" else config.threads,
        batch_sizes=tuple(config.batch_sizes) or default_batch_sizes(device),
        stop_early=not config.batch_sizes,
        seconds=config.seconds_per_measurement,
        cache_dir=config.cache_dir,
    )


class _Cluster:
    """Measures candidates on the nodes. Bundles and pixels are put into the object store once."""

    def __init__(
        self, inputs: ComparisonInputs, environments: Mapping[BenchmarkEnvironment, NodeInfo]
    ) -> None:
        self._inputs = inputs
        self._nodes = environments
        self._bundles: dict[str, Any] = {}
        self._samples: dict[tuple[BenchmarkEnvironment, Preprocessing], Any] = {}

    def load_samples(self, candidates: Sequence[Candidate]) -> None:
        """Load the sample for all candidates before the first measurement, to fail early if it is unreadable."""
        for candidate in candidates:
            bundle = self._inputs.bundles[candidate.model]
            key = (candidate.environment, pixels_key(bundle.config.preprocessing))
            if key not in self._samples:
                self._samples[key] = ray.put(self._load_sample(*key))
            if candidate.model not in self._bundles:
                self._bundles[candidate.model] = ray.put(bundle)

    def measure(self, candidate: Candidate, reference: Reference) -> BenchmarkResult:
        """Measure a candidate in a new process with exclusive use of its node."""
        preprocessing = self._inputs.bundles[candidate.model].config.preprocessing
        return run_exclusive(
            self._nodes[candidate.environment],
            measure,
            self._bundles[candidate.model],
            candidate,
            self._samples[candidate.environment, pixels_key(preprocessing)],
            reference,
        )

    def _load_sample(self, environment: BenchmarkEnvironment, preprocessing: Preprocessing) -> SamplePixels:
        inputs = self._inputs
        size = f"{preprocessing.input_width} x {preprocessing.input_height}"
        sample = run_exclusive(
            self._nodes[environment],
            load_sample_pixels,
            inputs.sample,
            preprocessing,
            inputs.fetch,
            inputs.limits,
        )
        _logger.info("%d images at %s pixels, %.1f ms per image", len(sample.pixels), size, sample.median_ms)
        if sample.failures:
            reasons = ", ".join(f"{name}={count}" for name, count in sample.failures.most_common())
            _logger.warning("%d images of the sample are excluded: %s", sample.failures.total(), reasons)
        return sample


def _measure_all(
    inputs: ComparisonInputs,
    environments: Mapping[BenchmarkEnvironment, NodeInfo],
    results: Results,
    console: Console,
) -> list[Skipped]:
    candidates = [
        Candidate(name, bundle.fingerprint, engine, environment)
        for environment in environments
        for name, bundle in inputs.bundles.items()
        for engine in parse_engines(inputs.engines, environment.device)
    ]
    cluster = _Cluster(inputs, environments)
    try:
        cluster.load_samples([candidate for candidate in candidates if results.find(candidate) is None])
        with comparison_progress(console, len(candidates)) as on_start:
            return measure_candidates(candidates, results, cluster.measure, on_start)
    except KeyboardInterrupt:
        finished = sum(results.find(candidate) is not None for candidate in candidates)
        _logger.info(
            "%d of %d measurements are saved; run the same command again to resume", finished, len(candidates)
        )
        raise


def _summarize(
    config: CompareConfig, inputs: ComparisonInputs, results: Results, skipped: Sequence[Skipped]
) -> ComparisonSummary:
    requirements = Requirements.model_validate(config.model_dump(include=set(Requirements.model_fields)))
    by_hardware = results.by_hardware()
    return ComparisonSummary(
        created=datetime.now(UTC),
        settings=config.redacted(),
        sample=inputs.sample.fingerprint,
        requirements=requirements,
        by_hardware=by_hardware,
        recommendations={key: recommend(entries, requirements) for key, entries in by_hardware.items()},
        skipped=skipped,
    )


def _print_results(summary: ComparisonSummary, written: Sequence[str]) -> None:
    """Print a table and a recommendation for each hardware configuration, and the output URIs, to stdout."""
    out = results_console()
    for key, measurements in summary.by_hardware.items():
        out.print()
        out.print(str(measurements[0].hardware))
        out.print(results_table(measurements, summary.requirements.price_per_hour, out.width))
        out.print()
        for sentence in summary.recommendations[key].sentences:
            out.print(sentence)
    out.print()
    out.print(LEGEND)
    for entry in summary.skipped:
        out.print(f"not measured: {entry.candidate}: {entry.reason}")
    for uri in written:
        out.print(f"results: {redact_uri(uri)}")
