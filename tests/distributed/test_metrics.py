"""Prometheus: what Ray exports is what the audit says, and what the dashboard shows exists."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from PIL import Image

from covray.chains.records import Audit
from covray.config import BuildConfig, load_config
from covray.distributed.build import build
from covray.distributed.metrics import LATENCY, METRICS, REQUESTS, TOKENS, Recorder
from covray.distributed.train_progress import _record
from covray.pairs.manifest import Pair, Picture
from covray.pairs.scenes import scene_pairs
from covray.serve import app as serving
from tests.support.manifests import write

CLUSTER = Path(__file__).parents[2] / "cluster"
EXPORTED = {name: metric for metric in METRICS for name in metric.exported}


def dashboard() -> dict[str, object]:
    content: dict[str, object] = json.loads((CLUSTER / "grafana" / "covray.json").read_text())
    return content


def expressions() -> list[str]:
    """All queries of the dashboard's panels."""
    panels = dashboard()["panels"]
    assert isinstance(panels, list)
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_each_metric_of_the_dashboard_exists_with_its_labels() -> None:
    shown = set()
    for expression in expressions():
        names = re.findall(r"\bray_\w+", expression)
        assert names, expression
        shown.update(names)
        labels = {label for name in names for label in EXPORTED[name].labels} | {"le"}
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        used = {label.strip() for group in grouped for label in group.split(",")}
        used |= set(re.findall(r"[{,](\w+)=", expression))
        assert used <= labels, expression
        assert ("rate(" in expression or "status=" in expression) == any(name.endswith("_total") for name in names) or (
            "_bucket" in expression or "_sum" in expression
        )
    assert {EXPORTED[name].name for name in shown} == {metric.name for metric in METRICS}, "and each is shown"


def test_the_pages_and_legends_of_the_dashboard_are_whole() -> None:
    content = dashboard()
    assert content["title"] == "covray"
    panels = content["panels"]
    assert isinstance(panels, list)
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_the_monitor_takes_the_metrics_port_of_the_pods_of_kuberay() -> None:
    monitor = yaml.safe_load((CLUSTER / "kuberay" / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"  # KubeRay adds it to every Ray container that does not name one itself
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert expression == {"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}
    cluster = yaml.safe_load((CLUSTER / "kuberay" / "raycluster.yaml").read_text())
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        for container in group["template"]["spec"]["containers"]:
            names = {port["name"] for port in container.get("ports", ())}
            numbers = {port["containerPort"] for port in container.get("ports", ())}
            assert 8080 not in numbers or "metrics" in names


class Recorded(Recorder):
    """Keeps what is recorded, and adds counters up."""

    def __init__(self) -> None:
        super().__init__("runs/first/")
        self.values: dict[tuple[str, ...], float] = {}

    def add(self, kind, amount, **labels):  # type: ignore[no-untyped-def]
        key = (kind.name, *labels.values())
        self.values[key] = self.values.get(key, 0) + amount

    def set(self, kind, value, **labels):  # type: ignore[no-untyped-def]
        self.values[kind.name, *labels.values()] = value

    observe = add


def test_a_training_counts_its_tokens_and_shows_its_last_loss() -> None:
    recorded = Recorded()
    for step in (1, 2):
        _record(recorded, {"step": step, "steps": 2, "loss": 1.0 / step, "tokens": 768, "seconds": 1.0})
    _record(recorded, {"step": 2, "steps": 2, "validation_loss": 0.25})
    assert recorded.values == {
        (TOKENS.name,): 1536, ("covray_train_step",): 2, ("covray_train_loss",): 0.5,
        ("covray_train_validation_loss",): 0.25,
    }  # fmt: skip
    assert recorded._output == {"output": "first"}


def test_requests_are_counted_by_their_status(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    monkeypatch.setattr(serving, "_recorder", recorded)
    for status, seconds in ((200, 0.5), (200, 1.5), (503, 0.0)):
        serving.record_request(status, seconds)
    assert recorded.values == {
        (REQUESTS.name, "200"): 2, (LATENCY.name, "200"): 2.0, (REQUESTS.name, "503"): 1, (LATENCY.name, "503"): 0.0,
    }  # fmt: skip


# --- with Ray ---


@pytest.fixture
def metrics_port() -> Iterator[int]:
    """The metrics port of a Ray that exports every half second."""
    fast = {"metrics_report_interval_ms": 500}
    ray.init(
        address="local", num_cpus=4, resources={"covray_cores": 2}, include_dashboard=False, log_to_driver=False,
        _system_config=fast,
    )  # fmt: skip
    try:
        yield int(ray.nodes()[0]["MetricsExportPort"])
    finally:
        ray.shutdown()


def scrape(port: int) -> dict[tuple[str, str, str], float]:
    """Return covray's metrics by name, task and status, summed over processes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    values: dict[tuple[str, str, str], float] = {}
    for name, labels, value in re.findall(r"^(ray_covray_\w+)\{([^}]*)\} ([\d.e+]+)$", text, re.MULTILINE):
        parts = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert parts["output"] == "chains"
        key = (name, parts.get("task", ""), parts.get("status", ""))
        values[key] = values.get(key, 0) + float(value)
    return values


@pytest.mark.ray
def test_the_metrics_of_a_build_are_those_of_its_audit(metrics_port: int, tmp_path: Path) -> None:
    pairs = [*scene_pairs(2, ["depth", "edges"], seed=1)]
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    pairs.append(Pair("depth", "train", Picture(uri="black.png"), Picture(uri="gone.png")))
    write(tmp_path / "pairs.parquet", pairs, str(tmp_path))
    values = {"pairs": str(tmp_path / "pairs.parquet"), "out": str(tmp_path / "chains"), "lengths": [3]}
    config = load_config(BuildConfig, None, values | {"prior.steps": 2, "engine.batch": 4, "check_endpoints": 0.0})
    audit = build(config)
    expected = {("ray_covray_unet_evaluations_total", "", ""): float(audit.unet_evaluations or 0)}
    for task, counts in audit.per_task.items():
        for status in ("written", "rejected"):
            expected["ray_covray_dataset_pairs", task, status] = getattr(counts, status)
            if getattr(counts, status):
                expected["ray_covray_pairs_total", task, status] = getattr(counts, status)
    assert (audit.written, audit.rejected) == (4, 1)
    deadline = time.monotonic() + 30
    found: dict[tuple[str, str, str], float] = {}
    while time.monotonic() < deadline and not expected.items() <= found.items():
        time.sleep(0.5)
        found = scrape(metrics_port)
    assert {key: found.get(key) for key in expected} == expected
    assert Audit.read(config.out) == audit
