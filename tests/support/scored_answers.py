"""Evaluations with scored candidates, made up: the score of an answer can be read from its tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covray.evaluation.answers import RESULT_SCHEMA
from covray.models.lvm.adapter import WEIGHTS_FILE
from tests.support.datasets import CODES, TOKENS

BEFORE_TOKENS = 4 * TOKENS


def share_of_low_codes(images: np.ndarray) -> float:
    """What is scored: how many tokens of a candidate are of the lower half of the codes."""
    return float((images < CODES // 2).mean())


def write_answers(
    folder: Path, adapter: str, per_task: Mapping[str, int], *, candidates: int = 6, images: int = 2, **subject: Any
) -> str:
    """Write the folder of a finished evaluation of one run; return it.

    Args:
        folder: To write.
        adapter: The folder of the run's adapter.
        per_task: Queries by task: of ``depth`` a lower score is better, of ``edges`` a higher one.
        candidates: Of every query.
        images: Pictures of a candidate.
        subject: Fields of the run's row that differ.
    """
    generator = np.random.default_rng(0)
    weights = Path(adapter, WEIGHTS_FILE).read_bytes()
    name = "tuned"
    about = {
        "version": 1,
        "config": {},
        "identity": {},
        "fingerprints": {f"{name}.adapter": hashlib.sha256(weights).hexdigest()},
        "subjects": [
            {"name": name, "kind": "adapter", "about": "", "method": "diffusion", "length": images + 1} | subject,
            {"name": "untuned", "kind": "untuned", "about": "", "method": "none", "length": 2},
        ],
        "mlflow_run_id": None,
    }
    folder.mkdir()
    (folder / "_evaluation.json").write_text(json.dumps(about))
    number = 0
    for task, count in per_task.items():
        rows = []
        for _ in range(count):
            written = []
            for _ in range(candidates):
                share = generator.uniform(0.2, 0.8)
                is_low = generator.random((images, TOKENS)) < share
                codes = generator.integers(0, CODES // 2, (images, TOKENS)) + np.where(is_low, 0, CODES // 2)
                value = share_of_low_codes(codes)
                written.append({"images": codes.tolist(), "score": -value if task == "depth" else value})
            before = generator.integers(0, CODES, BEFORE_TOKENS).tolist()
            rows.append(
                {"episode": number, "subject": name, "pair_id": number, "before": before} | {"candidates": written}
            )
            number += 1
        rows.append({"episode": number, "subject": "untuned", "pair_id": number})
        number += 1
        rows.append({"episode": number, "subject": name, "pair_id": number, "error": "gone", "before": [1] * 4})
        number += 1
        target = folder / "rows" / f"task={task}"
        target.mkdir(parents=True)
        table = pa.Table.from_pylist(rows, RESULT_SCHEMA).drop_columns("task")
        pq.write_table(table, target / "part.parquet")
    (folder / "results.json").write_text("{}")
    return str(folder)
