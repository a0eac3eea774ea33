"""What the driver counts while the pool works: nothing twice, however late a look arrives."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.config.classify_config import ClassifyConfig
from batchcls.jobs.classify_plan import check_inputs, open_inputs, work_of
from batchcls.models.engines.engine import REFERENCE
from batchcls.pipeline.actor_pool import FragmentGraph
from batchcls.pipeline.fragment_actor import FragmentActor, PartialFragment, WorkerProgress
from batchcls.pipeline.node_engines import EngineSelection
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine
from batchcls.pipeline.progress import Progress
from batchcls.ray_runtime import KEEP_MEMORY, nodes, ray_session
from batchcls.resources import plan_resources
from tests.helpers.started import write_catalog
from tests.integration.conftest import Cluster

ROWS, FRAGMENT_ROWS = 300, 50


class LateActor(FragmentActor):
    """Its looks are as old as they can be: every fragment is all but finished, and all of it has failed."""

    @ray.method(concurrency_group="progress")
    def progress(self) -> WorkerProgress:
        """Of every fragment of the manifest."""
        part = PartialFragment(FRAGMENT_ROWS, Counter(truncated=FRAGMENT_ROWS))
        return WorkerProgress(dict.fromkeys(range(0, ROWS, FRAGMENT_ROWS), part), 1.0)


class LateRun(FragmentGraph):
    """The pool with such actors."""

    actor_class = LateActor


def test_finished_fragments_count_by_their_receipts(
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
        # A node of cluster/local.sh hands on what workers have to start with.
        environment = ray.get(ray.remote(num_cpus=0)(lambda: dict(os.environ)).remote())
        assert environment.items() >= KEEP_MEMORY.items()
        inputs = open_inputs(config, check_inputs(config))
        shape = plan_resources(config, nodes(), remote_images=False, rows=ROWS)
        engines = Engines({}, NodeEngine(REFERENCE, 16), config.cache_dir, None)
        run = LateRun(work_of(config, inputs, shape, EngineSelection(engines, None, ()), "late"), seen.append)
        receipts = run.execute()
        last = run.progress()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert max(progress.failures["truncated"] for progress in seen) > 0  # such looks were heard
    assert all(progress.rows <= ROWS for progress in seen)
    assert (last.rows, last.failures) == (ROWS, sum((one.failures for one in receipts), Counter()))
    assert not last.failures
