"""Own masks in four codings: from the list to the manifest, the chains, the adapter and the masks that come back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from covray.io.images import decode
from covray.pairs.classes import VOID
from covray.tasks.segmentation import read
from tests.support.photographs import photo, save

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
Run = Callable[..., subprocess.CompletedProcess[str]]

NUMBERS, VOID_NUMBER = (0, 3, 4, 7, 100, 200), 33
COLOURS, VOID_COLOUR = ((10, 10, 10), (255, 0, 0), (0, 255, 0), (70, 70, 70), (0, 0, 255), (250, 250, 0)), (255, 0, 255)


def test_own_classes_come_back_with_their_numbers(tmp_path: Path, run_on_ray: Run, run_here: Run) -> None:
    """By commands alone; those that need no Ray run in this process."""
    (tmp_path / "classes.yaml").write_text(
        json.dumps(
            {
                "classes": [
                    {"name": f"class {number}", "index": number, "colour": colour}
                    for number, colour in zip(NUMBERS, COLOURS, strict=True)
                ],
                "void": {"index": VOID_NUMBER, "colour": VOID_COLOUR},
            }
        )
    )
    numbers, colours = np.zeros(256, np.uint8), np.zeros((256, 3), np.uint8)
    numbers[:6], numbers[VOID], colours[:6], colours[VOID] = NUMBERS, VOID_NUMBER, COLOURS, VOID_COLOUR
    own_palette = np.zeros((256, 3), np.uint8)
    own_palette[numbers[[0, 1, 2, 3, 4, 5, VOID]]] = colours[[0, 1, 2, 3, 4, 5, VOID]]
    truths, lines = {}, ["image,label"]
    for number in range(8):
        blocks = np.random.default_rng(number).integers(0, 7, (4, 6))
        truth = np.where(blocks == 6, VOID, blocks).astype(np.uint8).repeat(12, axis=0).repeat(12, axis=1)
        indexed = Image.fromarray(numbers[truth])
        indexed.putpalette(own_palette.ravel().tolist())
        form = (Image.fromarray(numbers[truth]), indexed, indexed.convert("RGB"), indexed.convert("RGBA"))[number % 4]
        form.save(tmp_path / f"mask{number}.png")
        save(tmp_path / f"{number}.png", photo(number, 48, 72))
        truths[f"{number}.png"] = truth
        lines.append(f"{number}.png,mask{number}.png")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    pairs, chains, adapter = (str(tmp_path / name) for name in ("pairs.parquet", "chains", "run"))
    run_here(
        "pairs", "manifest", str(tmp_path / "list.csv"), "--task", "segmentation", "--out", pairs,
        "--classes", str(tmp_path / "classes.yaml"),
    )  # fmt: skip
    for row in pq.read_table(pairs).to_pylist():
        assert np.array_equal(read(decode(row["label"]["bytes"]), json.loads(row["meta"])), truths[row["image"]["uri"]])
    run_on_ray("build", "--pairs", pairs, "--out", chains, "--lengths", "2", "--methods", "linear", "--actors", "1")
    run_on_ray(
        "train", "--scale", "nano", "--data", chains, "--out", adapter, "--length", "2", "--steps", "1",
        "--set", "sentences.validation_split=null", "--set", "sentences.pairs=[1]", "--tracking-uri", "none",
    )  # fmt: skip
    save(tmp_path / "no_mask.png", photo(9, 48, 72))
    for mask, code in (("no_mask.png", 2), ("mask0.png", 0)):
        done = run_here(
            "generate", "--adapter", adapter, "--example", str(tmp_path / "0.png"), str(tmp_path / mask),
            "--query", str(tmp_path / "1.png"), "--task", "segmentation", "--out", str(tmp_path / "answers"), code=code,
        )  # fmt: skip
        assert ("unknown_class" in done.stderr) == (code == 2)
    returned = np.asarray(Image.open(tmp_path / "answers/1/classes.png"))
    assert returned.shape == (48, 72)
    assert set(np.unique(returned).tolist()) <= {*NUMBERS, VOID_NUMBER}
    assert len(np.unique(returned)) > 1
