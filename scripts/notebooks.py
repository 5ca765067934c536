"""The notebooks of ``docs/notebooks``: run from top to bottom, and committed with no output but their pictures.

``python scripts/notebooks.py [NAME ...]`` runs them (all by default), each in a temporary folder, and writes them back.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
CELL_TIMEOUT_S = 900
START_TIMEOUT_S = 300
_PICTURES = re.compile(r"(<img [^<>]*>|<br>)+")


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Return ``notebook`` with the outputs of a run in ``folder``. Raises CellExecutionError where a cell raises."""
    with tempfile.TemporaryDirectory() as sockets:
        # Sockets that are files: a free port can be taken before the kernel binds it.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        client = NotebookClient(
            copy.deepcopy(notebook),  # it writes outputs into the cells
            km=kernel,
            timeout=CELL_TIMEOUT_S,
            startup_timeout=START_TIMEOUT_S,
            resources={"metadata": {"path": str(folder)}},
        )
        executed: NotebookNode = client.execute()
    return executed


def with_pictures_only(notebook: NotebookNode) -> NotebookNode:
    """Return ``notebook`` as it is committed: no counts, times or texts, and of each output the picture."""
    cells = []
    for number, cell in enumerate(notebook.cells):
        values: dict[str, Any] = {
            "id": f"cell-{number}", "cell_type": cell.cell_type, "metadata": {}, "source": cell.source,
        }  # fmt: skip
        if cell.cell_type == "code":
            pictures = [picture for output in cell.outputs for picture in _pictures(output)]
            values |= {"execution_count": None, "outputs": pictures}
        cells.append(nbformat.from_dict(values))
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def _pictures(output: NotebookNode) -> list[dict[str, Any]]:
    """Return an output without its texts, or nothing where it is no picture."""
    data = output.get("data", {})
    html = data.get("text/html", "")
    if _PICTURES.fullmatch(html):
        kept = {"text/html": html}
    elif "image/png" in data:
        kept = {"image/png": data["image/png"]}
    else:
        return []
    return [{"output_type": "display_data", "metadata": {}, "data": kept}]


def main(names: list[str]) -> None:
    """Run the notebooks of these names, and write them back."""
    for file in sorted(FOLDER.glob("*.ipynb")):
        if names and file.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            executed = execute(nbformat.read(file, as_version=4), Path(folder))
        nbformat.write(with_pictures_only(executed), file)


if __name__ == "__main__":
    main(sys.argv[1:])
