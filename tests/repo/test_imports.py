"""Modules that must not import PyTorch, which takes seconds: the driver and most command-line calls run without it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TORCH_FREE_PACKAGES = (
    "batchcls",
    "batchcls.config",
    "batchcls.manifest",
    "batchcls.runs",
    "batchcls.storage",
)
"""Packages of which no module imports PyTorch; subpackages are listed separately."""

TORCH_FREE_MODULES = (
    "api",
    "cli.app",
    "cli.arguments",
    "cli.comparison_tables",
    "cli.completion",
    "cli.console",
    "cli.main",
    "cli.run_tables",
    "cli.tables",
    "comparison.candidates",
    "comparison.measurement",
    "comparison.recommend",
    "images.bmff",
    "images.bmff_boxes",
    "images.bmff_frame_size",
    "images.decode",
    "images.decode_memory",
    "images.fetch",
    "images.formats",
    "images.headers",
    "images.http_fetch",
    "images.isolated_decode",
    "images.jpeg_header",
    "images.load_config",
    "images.object_store",
    "images.png_header",
    "images.request_url",
    "images.retry",
    "images.rgb",
    "images.tiff_header",
    "images.time_limit",
    "images.url_policy",
    "inference.abstention",
    "inference.agreement",
    "inference.engine_record",
    "inference.predictor_config",
    "inference.taxonomy",
    "inference.throughput",
    "jobs.bundle",
    "jobs.classify",
    "jobs.classify_plan",
    "jobs.classify_run",
    "jobs.compare",
    "jobs.evaluate",
    "jobs.finetune",
    "jobs.input_check",
    "jobs.manifest",
    "jobs.runs",
    "models.classifier_head",
    "models.deferred_compiler",
    "models.engines.aot_program",
    "models.engines.batching",
    "models.engines.compile_cache",
    "models.engines.engine",
    "models.engines.factory",
    "models.engines.openvino_convert",
    "models.engines.openvino_engine",
    "models.engines.thread_pool",
    "models.engines.torch_compile",
    "models.golden",
    "models.labels",
    "models.model_bundle",
    "models.model_names",
    "models.model_spec",
    "models.registry",
    "models.resolve",
    "pipeline.copy_predictions",
    "pipeline.crash_isolation",
    "pipeline.executor",
    "pipeline.node_engines",
    "pipeline.pipeline_spec",
    "pipeline.progress",
    "pipeline.prometheus",
    "pipeline.ray_data.fragment_actor",
    "pipeline.ray_data.fused_graph",
    "pipeline.ray_data.graph",
    "pipeline.ray_data.write_task",
    "pipeline.ray_errors",
    "pipeline.stored_predictions",
    "report.compare_page",
    "report.formatting",
    "report.html",
    "report.pareto_plot",
    "report.run_page",
    "report.run_page_data",
    "report.run_queries",
    "report.run_report",
    "report.thumbnails",
    "training.batch_plan",
    "training.categories",
    "training.held_out",
    "training.linear_probe.embedding_store",
    "training.node_cache",
    "training.node_storage",
    "training.recipe",
    "training.sampling",
    "training.scaling",
    "training.teacher_bundles",
    "training.train_config",
    "training.tuning.search_space",
    "training.tuning.trials",
    "training.tuning.tune_hooks",
    "training.work_dir",
)
"""Modules of `batchcls` in the other packages that do not import PyTorch."""

_IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def _modules_of(package: str) -> list[str]:
    folder: Path = REPOSITORY.joinpath(*package.split("."))
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__main__"]


def test_torch_free_modules_do_not_import_torch():
    modules = [module for package in TORCH_FREE_PACKAGES for module in _modules_of(package)]
    modules += [f"batchcls.{module}" for module in TORCH_FREE_MODULES]
    assert len(modules) > 100
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *modules],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "batchcls",
        "batchcls.jobs.classify",
        "batchcls.jobs.runs",
        "batchcls.jobs.bundle",
        "batchcls.jobs.compare",
        "batchcls.jobs.evaluate",
        "batchcls.jobs.finetune",
    ],
)
def test_help_needs_neither_ray_nor_torch(module: str):
    code = f"import sys, {module}; assert not {{'ray', 'torch'}} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
