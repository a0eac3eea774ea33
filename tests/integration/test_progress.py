"""Progress of the fragment graph while it runs: no row counts twice, however late a report arrives."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.config.classify_config import ClassifyConfig
from batchcls.jobs.classify_plan import check_inputs, open_inputs, pipeline_spec_of
from batchcls.models.engines.engine import REFERENCE
from batchcls.pipeline.actor_pool import FragmentGraph
from batchcls.pipeline.fragment_actor import FragmentActor, PartialFragment, WorkerProgress
from batchcls.pipeline.node_engines import EngineSelection
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine
from batchcls.pipeline.progress import Progress
from batchcls.ray_runtime import MALLOC_VARIABLES, node_resources, ray_session
from batchcls.resources import plan_resources
from tests.helpers.started import write_catalog
from tests.integration.conftest import Cluster

ROWS, FRAGMENT_ROWS = 300, 50


class LateActor(FragmentActor):
    """An actor with outdated reports: all rows of every fragment have failed, and none has a receipt."""

    @ray.method(concurrency_group="progress")
    def progress(self) -> WorkerProgress:
        """Report all fragments of the manifest."""
        part = PartialFragment(FRAGMENT_ROWS, Counter(truncated=FRAGMENT_ROWS))
        return WorkerProgress(dict.fromkeys(range(0, ROWS, FRAGMENT_ROWS), part), 1.0)


class LateGraph(FragmentGraph):
    """A fragment graph with late actors."""

    actor_class = LateActor


def test_finished_fragments_are_counted_from_receipts(
    cluster: Cluster, tiny_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(variable, cluster.environment[variable])
    reset_auth_token_state()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    seen: list[Progress] = []
    config = ClassifyConfig(
        manifest=write_catalog(tmp_path / "catalog", ROWS),
        model=tiny_bundle,
        output=str(tmp_path / "out"),
        shape="fused",
        num_actors=1,
        fragment_rows=FRAGMENT_ROWS,
    )
    with ray_session(cluster.address):
        # Workers inherit the environment of the nodes of cluster/local.sh.
        environment = ray.get(ray.remote(num_cpus=0)(lambda: dict(os.environ)).remote())
        assert environment.items() >= MALLOC_VARIABLES.items()
        inputs = open_inputs(config, check_inputs(config))
        resources = plan_resources(config, node_resources(), remote_images=False, rows=ROWS)
        engines = Engines({}, NodeEngine(REFERENCE, 16), config.cache_dir, None)
        graph = LateGraph(
            pipeline_spec_of(config, inputs, resources, EngineSelection(engines, None, ()), "late"),
            seen.append,
        )
        receipts = graph.execute()
        last = graph.progress()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert max(progress.failures["truncated"] for progress in seen) > 0  # late reports did arrive
    assert all(progress.rows <= ROWS for progress in seen)
    assert (last.rows, last.failures) == (ROWS, sum((receipt.failures for receipt in receipts), Counter()))
    assert not last.failures
