"""The pages in a real browser: their scripts run, their pictures show, and they need no network."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covray.evaluation.records import EvaluationResults
from covray.evaluation.results import tabulate
from covray.evaluation.subjects import Subject
from covray.report.dataset import view
from covray.report.evaluation import Strip, write_evaluation_page
from covray.report.sweep import write_sweep_page
from covray.sweeps.records import SweepResults
from tests.report.test_sweep import sweep_results
from tests.support.browser import chromium_path

pytestmark = pytest.mark.end_to_end
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000",
)  # fmt: skip


def browse(page: str, profile: Path, *options: str) -> str:
    command = [chromium_path(), *QUIET, f"--user-data-dir={profile}", *options, Path(page).as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_page_shows_its_chains_without_a_network(
    tmp_path: Path, write_dataset: Callable[..., tuple[str, list[dict[str, Any]]]]
) -> None:
    dataset, _ = write_dataset({"depth": 3, "edges": 2}, rejects={1: "truncated: <script>document.title='x'</script>"})
    page = view(dataset, str(tmp_path / "view"))[-1]
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    assert re.search(r'<html[^>]*class="js"', dom), "the script ran"
    assert dom.count('class="fade"') == 4, "a slider for every good chain"
    assert len(re.findall(r"α = 0\.\d\d|α = 1\.00", dom)) >= 4, "and each slider has set itself"
    assert "<title>x</title>" not in dom, "a hostile reason stays text"

    shot = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,1600")
    pixels = np.array(Image.open(shot).convert("RGB"))
    assert pixels.std() > 5, "something is drawn"


def test_the_page_of_an_evaluation_shows_its_table_and_pictures_without_a_network(tmp_path: Path) -> None:
    subjects = (Subject("copy", "baseline", "the query"), Subject("<b>tuned", "adapter", "a run", "linear", 4, 1))
    rows = [
        {
            "task": "depth", "subject": subject.name, "pair_id": pair_id, "error": None, "counts": None,
            "values": [{"metric": "abs_rel", "value": 0.1 * pair_id + number}],
        }
        for number, subject in enumerate(subjects)
        for pair_id in range(1, 9)
    ]  # fmt: skip
    config = {"data": "chains", "split": "test", "example_split": "train", "selection": "random", "seed": 0}
    results = EvaluationResults(
        **dict(tabulate(rows, subjects, 0)), seconds=1.0, config=config | {"sampling": {"temperature": 0}},
        fingerprints={"codebook": "ab"},
    )  # fmt: skip
    picture = np.full((16, 16, 3), 90, np.uint8)
    strips = [
        Strip("depth", subject.name, "best", 1, 0.1, picture, [picture], picture, picture) for subject in subjects
    ]
    page = str(tmp_path / "index.html")
    write_evaluation_page(results, strips, page)
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    assert re.search(r'<html[^>]*class="js"', dom), "the script ran"
    assert "&lt;b&gt;tuned" in dom, "a hostile name stays text"
    assert "0.450" in dom, "the mean of the copy"
    shot = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,1600")
    assert np.array(Image.open(shot).convert("RGB")).std() > 5, "something is drawn"


def test_the_page_of_a_sweep_shows_its_tables_and_charts_without_a_network(tmp_path: Path) -> None:
    results = sweep_results()
    results["trials"][0] |= {"status": "failed", "error": "<img src=x onerror=alert(1)>"}
    page = str(tmp_path / "index.html")
    write_sweep_page(SweepResults.model_validate(results), page)
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    assert re.search(r'<html[^>]*class="js"', dom), "the script ran"
    assert "&lt;img src=x" in dom, "a hostile error stays text"
    assert all(claim["claim"] in dom for claim in results["claims"])
    assert all(cell["label"] in dom for cell in results["cells"])
    assert len(re.findall(r"<svg", dom)) >= 4, "charts"
    shot = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,1600")
    assert np.array(Image.open(shot).convert("RGB")).std() > 5, "something is drawn"
