"""The notebooks of docs/notebooks run as they stand, offline, and show the pictures that are committed in them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from PIL import Image

from scripts import docs_site, notebooks

FILES = sorted(notebooks.FOLDER.glob("*.ipynb"))


def read(file: Path) -> NotebookNode:
    notebook: NotebookNode = nbformat.read(file, as_version=4)
    return notebook


def pictures(notebook: NotebookNode) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the number of the cell and the size of each picture of a notebook."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output["data"]
            coded = re.findall(r"base64,([^\"]+)", data.get("text/html", "")) or [data.get("image/png", "")]
            for png in coded:
                yield number, Image.open(io.BytesIO(base64.b64decode(png))).size


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_is_committed_with_no_output_but_its_pictures(file: Path) -> None:
    notebook = read(file)
    nbformat.validate(notebook)
    assert file.read_text() == nbformat.writes(notebooks.with_pictures_only(notebook)) + "\n"
    assert len(list(pictures(notebook))) >= 3
    assert file.stat().st_size < 700_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_site_shows_a_notebooks_cells_and_pictures(file: Path) -> None:
    notebook = read(file)
    page = docs_site.notebook_page(notebook, file.stem)
    assert len(page.pictures) == len(list(pictures(notebook)))
    assert all(name in page.text for name in page.pictures)
    assert all(cell.source in page.text for cell in notebook.cells)


def test_texts_and_counts_are_dropped() -> None:
    """What a cell prints, and what a picture is called, differs from run to run."""
    picture = nbformat.v4.new_output(
        "execute_result", {"image/png": "cG5n", "text/plain": "<Image>"}, execution_count=3
    )
    table = nbformat.v4.new_output("display_data", {"text/html": "<table></table>"})
    printed = nbformat.v4.new_output("stream", text="1.3 s")
    cell = nbformat.v4.new_code_cell("show()", execution_count=3, outputs=[printed, table, picture])
    kept = notebooks.with_pictures_only(nbformat.v4.new_notebook(cells=[cell])).cells[0]
    assert kept.execution_count is None
    assert [output["data"] for output in kept.outputs] == [{"image/png": "cG5n"}]


@pytest.mark.ray
@pytest.mark.end_to_end
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_its_pictures(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    notebook = read(file)
    executed = notebooks.with_pictures_only(notebooks.execute(notebook, tmp_path))
    assert list(pictures(executed)) == list(pictures(notebook))
