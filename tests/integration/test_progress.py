"""Progress of the fused graph while it runs: no row counts twice, however often its fragment is processed."""

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.config.classify_config import ClassifyConfig
from batchcls.jobs.classify_plan import check_inputs, open_inputs, pipeline_spec_of, plan_on_cluster
from batchcls.models.engines.engine import REFERENCE
from batchcls.pipeline.node_engines import EngineSelection
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine
from batchcls.pipeline.progress import Progress
from batchcls.pipeline.ray_data.fragment_actor import FragmentActor
from batchcls.pipeline.ray_data.fragment_queue import Turn
from batchcls.pipeline.ray_data.fused_graph import FusedGraph
from batchcls.ray_runtime import MALLOC_VARIABLES, ray_session
from batchcls.runs.parts import Receipt
from tests.helpers.started import write_catalog
from tests.integration.conftest import Cluster

ROWS, FRAGMENT_ROWS, BROKEN = 300, 50, (7, 200)


class RepeatingActor(FragmentActor):
    """An actor whose process crashes after every fragment, as it seems: each is processed twice.

    Only the first fragment is processed before the driver has seen its rows, however slow the driver is.
    """

    seen_file = ""

    def process(self, turn: Turn) -> Receipt:
        """Process the fragment twice and return the second receipt."""
        assert turn.fragment is not None
        deadline = time.monotonic() + 120
        while turn.fragment.first_row and not Path(self.seen_file).exists():
            assert time.monotonic() < deadline, "the driver has not seen the rows of the first fragment"
            time.sleep(0.05)
        super().process(turn)
        return super().process(turn)


class RepeatingGraph(FusedGraph):
    """A fused graph with such actors."""

    actor_class = RepeatingActor


@pytest.mark.long
def test_rows_of_a_repeated_fragment_count_once(
    cluster: Cluster, tiny_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(variable, cluster.environment[variable])
    reset_auth_token_state()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    seen: list[Progress] = []
    seen_file = tmp_path / "seen"
    monkeypatch.setattr(RepeatingActor, "seen_file", str(seen_file))

    def on_progress(progress: Progress) -> None:
        seen.append(progress)
        if progress.rows:
            seen_file.touch()

    config = ClassifyConfig(
        manifest=write_catalog(tmp_path / "catalog", ROWS, broken=BROKEN),
        model=tiny_bundle,
        output=str(tmp_path / "out"),
        shape="fused",
        max_actors=1,
        fragment_rows=FRAGMENT_ROWS,
    )
    with ray_session(cluster.address):
        # Workers inherit the environment of the nodes of cluster/local.sh.
        environment = ray.get(ray.remote(num_cpus=0)(lambda: dict(os.environ)).remote())
        assert environment.items() >= MALLOC_VARIABLES.items()
        inputs = open_inputs(config, check_inputs(config))
        resources, placement = plan_on_cluster(config, inputs)
        engines = Engines({}, NodeEngine(REFERENCE, 16), config.cache_dir, None)
        graph = RepeatingGraph(
            pipeline_spec_of(
                config, inputs, resources, placement, EngineSelection(engines, None, ()), "repeating"
            ),
            on_progress,
        )
        receipts = graph.execute()
        last = graph.progress()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert any(0 < progress.rows < ROWS for progress in seen)
    assert all(progress.rows <= ROWS for progress in seen)
    assert (last.rows, last.failures) == (ROWS, sum((receipt.failures for receipt in receipts), Counter()))
    assert last.failures["truncated"] == len(BROKEN)
    assert len(list((tmp_path / "out").rglob("receipts/*.json"))) == 2 * len(receipts)
