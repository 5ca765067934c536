"""The judge of solvers: the same adapter is trained on chains of each, with equal budgets, and its answers are scored.

    python benchmarks/solver_training.py solver-training --plan
    python benchmarks/solver_training.py solver-training
    python benchmarks/solver_training.py solver-training --result benchmarks/results/solver-training.md

One sweep for each solver, of the pairs and settings of ``covray experiments claims``: diffusion chains of length 4, two
seeds, every answer scored after the model's own frames. Run the same command again to continue after an interruption;
``--result`` writes the table of what is finished.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from results_file import write_result

from covray.config import SweepConfig, load_config
from covray.distributed.sweep import sweep
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs
from covray.recipes.claims import CLAIMS, SCENES, SPLITS

SOLVERS: dict[str, dict[str, Any]] = {
    "ddim, 50 steps": {},
    "ddim, 16 of 50 evaluated": {"evaluations": 16},
    "dpm, 12 steps": {"solver": "dpm"},
}
SEEDS = [0, 1]


def config_of(out: Path, number: int, prior: dict[str, Any]) -> SweepConfig:
    """The sweep of one solver."""
    options = CLAIMS | {
        "out": str(out / f"solver-{number}"),
        "manifest": str(out / "pairs.parquet"),
        "grid": {"methods": ["diffusion"], "lengths": [4], "pairs": [1], "seeds": SEEDS},
        "build": {"prior": prior, "check_endpoints": 0.0},
    }
    return load_config(SweepConfig, None, options)


def write_pairs(out: Path) -> None:
    """Write the manifest of the scenes, once."""
    manifest = out / "pairs.parquet"
    if manifest.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    with ManifestWriter(manifest) as writer:
        for pair in scene_pairs(SCENES, splits=SPLITS):
            writer.add(pair)


def scores(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    """The means over seeds of the one cell of a sweep, by task and metric."""
    (cell,) = results["cells"]
    means = {}
    for entry in cell["scores"]:
        mean = entry["mean"]
        means[entry["task"], entry["metric"]] = math.nan if mean is None else float(mean)
    return means


def table(by_solver: dict[str, dict[str, Any]]) -> list[str]:
    """The first metric of every task, and the perplexity after own frames, in Markdown."""
    tasks = next(iter(by_solver.values()))["tasks"]
    lines = [f"| solver | {' | '.join(by_solver)} |", f"|---{'|---' * len(by_solver)}|"]
    for task, about in tasks.items():
        for metric in (about["primary"], "perplexity_own"):
            cells = []
            for results in by_solver.values():
                cells.append(f"{scores(results).get((task, metric), math.nan):.4g}")
            lines.append(f"| {task}, {metric} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run the sweeps of all solvers, or say what they are; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the experiment")
    parser.add_argument("--plan", action="store_true", help="only check the configurations, and print them")
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    configs = {name: config_of(options.out, number, prior) for number, (name, prior) in enumerate(SOLVERS.items())}
    if options.plan:
        for name, config in configs.items():
            print(f"{name}: {config.model_dump_json(include={'out', 'grid', 'build', 'train', 'evaluate'})}")
        return
    write_pairs(options.out)
    lines = table({name: sweep(config) for name, config in configs.items()})
    lines += ["", f"Means over seeds {SEEDS}; {SCENES} scenes, the settings of `covray experiments claims`."]
    print("\n".join(lines))
    if options.result:
        write_result(options.result, "Training on chains of each solver", ("torch", "diffusers", "numpy"), lines)


if __name__ == "__main__":
    main()
