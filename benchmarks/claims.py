"""The project's own table of claims: what ``covray experiments claims`` found, as a dated file.

covray experiments claims --out claims
python benchmarks/claims.py claims --write benchmarks/results/DATE-HARDWARE-claims.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results_file import write_result

from covray.recipes.claims import CLAIMS, SCENES, SPLITS


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The tables of the results of a sweep, in Markdown."""
    tasks, lower = results["tasks"], results["lower_is_better"]
    names = [f"{task} {about['primary']} {'↓' if about['primary'] in lower else '↑'}" for task, about in tasks.items()]
    yield from ("## What the paper says, and what was found", "")
    yield "Gain: the first metric of every task, relative to the second; positive is better. Geometric mean of tasks,"
    yield "mean over seeds, with Student's 95% interval over these."
    yield from ("", "| claim | the paper | gain | 95% | seeds | verdict |", "|---|---|---|---|---|---|")
    for claim in results["claims"]:
        overall = claim["overall"]
        if overall is not None:
            yield (
                f"| {claim['claim']} | {claim['paper']} | {_signed(overall['gain_percent'])}% | "
                f"{_signed(overall['low'])} to {_signed(overall['high'])} | {overall['seeds']} | {overall['verdict']} |"
            )
    yield from ("", "By task:", "", f"| | {' | '.join(tasks)} |", f"|---{'|---' * len(tasks)}|")
    for claim in results["claims"]:
        verdicts = {row["task"]: row["verdict"] for row in claim["rows"]}
        if verdicts:
            yield f"| {claim['claim']} | {' | '.join(verdicts.get(task, '–') for task in tasks)} |"
    for title, metric in (
        ("The first metric of every task", None),
        ("Perplexity of the reference answer after the model's own frames", "perplexity_own"),
        ("Perplexity of the reference answer after the reference frames", "perplexity_reference"),
    ):
        yield from ("", f"## {title}", "")
        yield f"| | {' | '.join(names if metric is None else tasks)} |"
        yield f"|---{'|---' * len(tasks)}|"
        for row in (*results["cells"], *results["references"]):
            found = {(entry["task"], entry["metric"]): entry for entry in row["scores"]}
            entries = [found.get((task, metric or about["primary"])) for task, about in tasks.items()]
            if any(entries):
                yield f"| {row.get('label') or row['name']} | {' | '.join(map(_cell, entries))} |"
    yield from ("", "## Cost", "", "| | tokens | training | context |", "|---|---|---|---|")
    for cell in results["cells"]:
        yield f"| {cell['label']} | {cell['tokens']:,.0f} | {cell['train_seconds']:.0f} s | {cell['context_tokens']} |"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    interval = "" if entry["low"] is None else f" [{entry['low']:.3g}, {entry['high']:.3g}]"
    return f"{entry['mean']:.3g}{interval}"


def main() -> None:
    """Read the results, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of covray experiments claims")
    parser.add_argument("--write", type=Path, required=True, help="Markdown file")
    options = parser.parse_args()
    results = json.loads((options.folder / "claims" / "results.json").read_text(encoding="utf-8"))
    about = [
        f"{SCENES} scenes, seven pairs each, splits {SPLITS}; {json.dumps(CLAIMS)}.",
        "",
    ]
    packages = ("covray", "torch", "ray", "diffusers")
    write_result(options.write, "The paper's claims on the nano family", packages, [*about, *lines(results)])


if __name__ == "__main__":
    main()
