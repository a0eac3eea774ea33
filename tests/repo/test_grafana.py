"""The dashboard of Grafana and the alert rules of Prometheus: their metrics are those of the pipeline."""

import json
import re
import shutil
import subprocess
import tomllib
from itertools import combinations
from typing import Any

import promql_parser
import pytest
import yaml

from batchcls.config.classify_config import ClassifyConfig
from tests.conftest import REPOSITORY

PROMETHEUS = REPOSITORY / "cluster" / "prometheus"


def exported_metrics() -> set[str]:
    """The names under which Ray exports the metrics of the pipeline."""
    source = (REPOSITORY / "batchcls" / "pipeline" / "prometheus.py").read_text()
    kinds = [(name, kind) for kind, name in re.findall(r'= (Counter|Gauge)\(\s*"(batchcls_\w+)"', source)]
    return {f"ray_{name}_total" if kind == "Counter" else f"ray_{name}" for name, kind in kinds}


def alert_rules() -> list[dict[str, Any]]:
    loaded = yaml.load((PROMETHEUS / "alerts.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    assert set(loaded) == {"groups"}
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_on_it():
    text = (REPOSITORY / "cluster" / "grafana" / "batchcls.json").read_text()
    exported = exported_metrics()
    assert len(exported) == 8
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


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_alert_rule_is_valid_and_its_metrics_exist(rule: dict[str, Any]):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Batchcls[A-Z]\w+", rule["alert"])
    assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
    assert set(rule["labels"]) == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    promql_parser.parse(rule["expr"])
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse(rule["expr"] + ")")
    names = set(re.findall(r"\bray_\w+", rule["expr"]))
    assert names
    assert names <= exported_metrics()
    # A label in the text must be one by which the expression aggregates; otherwise it would be empty.
    used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    kept = [set(found.replace(" ", "").split(",")) for found in re.findall(r"\bby \(([^)]*)\)", rule["expr"])]
    assert all(used <= labels for labels in kept)
    guide = (REPOSITORY / "docs" / "how-to" / "failures.md").read_text(encoding="utf-8")
    (heading,) = re.findall(r'See "(.+)" in docs/how-to/failures\.md', rule["annotations"]["description"])
    assert re.search(rf"^## {re.escape(heading)}\b", guide, re.MULTILINE)


def test_alerts_fire_and_resolve_as_described():
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool, which evaluates the rules, is not installed (package prometheus)")
    command = [promtool, "test", "rules", "alerts_test.yaml"]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test():
    tests = yaml.load((PROMETHEUS / "alerts_test.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
    fired = {
        case["alertname"] for test in tests["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in alert_rules()}


def test_nightly_configuration_has_valid_settings():
    declared = tomllib.loads((REPOSITORY / "jobs" / "nightly.toml").read_text())
    config = ClassifyConfig.model_validate(declared)
    assert config.publish
    assert config.report
