"""The dashboard for Grafana: its metrics are those of the pipeline, and its panels do not overlap."""

import json
import re
import tomllib
from itertools import combinations

from batchcls.config.classify_config import ClassifyConfig
from tests.conftest import REPOSITORY


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_on_it():
    text = (REPOSITORY / "cluster" / "grafana" / "batchcls.json").read_text()
    source = (REPOSITORY / "batchcls" / "pipeline" / "prometheus.py").read_text()
    kinds = [(name, kind) for kind, name in re.findall(r'= (Counter|Gauge)\(\s*"(batchcls_\w+)"', source)]
    exported = {f"ray_{name}_total" if kind == "Counter" else f"ray_{name}" for name, kind in kinds}
    assert len(exported) == 6
    assert set(re.findall(r"ray_batchcls_\w+", text)) == exported
    guide = (REPOSITORY / "docs" / "how-to" / "clusters.md").read_text()
    assert set(re.findall(r"ray_batchcls_\w+", guide)) == exported


def test_panels_do_not_overlap():
    dashboard = json.loads((REPOSITORY / "cluster" / "grafana" / "batchcls.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        horizontal = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert horizontal or below
        assert one["x"] + one["w"] <= 24
    for panel in panels:
        assert panel["targets"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_nightly_configuration_has_valid_settings():
    declared = tomllib.loads((REPOSITORY / "jobs" / "nightly.toml").read_text())
    config = ClassifyConfig.model_validate(declared)
    assert config.publish
    assert config.report
