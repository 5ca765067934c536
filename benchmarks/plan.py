"""The plan against what then happens, on this machine: calibrate with small runs, predict larger ones, run these.

python benchmarks/plan.py --work /tmp/plan --result benchmarks/results/DATE-HARDWARE-plan.md

A build and a training of the nano family; the plan must be within 15% of either's time. Wants a quiet machine: about
half an hour on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from results_file import write_result

from covray.config import PlanConfig, load_config
from covray.distributed.benchmark import calibrate
from covray.distributed.build import build
from covray.distributed.train import train
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs
from covray.planning.plan import build_config, plan, train_config
from covray.tasks import TASKS

TOLERANCE = 0.15


def main() -> None:
    """Calibrate, predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is built, empty or absent")
    parser.add_argument("--calibration-pairs", type=int, nargs=2, default=[64, 192])
    parser.add_argument("--pairs", type=int, default=700)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--calibration-steps", type=int, default=24)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--prior-steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()

    config = configured(options)
    path = str(options.work / "calibration.yaml")
    calibrate(config, path, options.calibration_pairs, options.calibration_steps)
    planned = plan(config.model_copy(update={"calibration": path})).to_json()

    manifest, chains = str(options.work / "pairs.parquet"), str(options.work / "chains")
    scenes = scene_pairs(-(-options.pairs // len(TASKS)), splits={"train": 9.0, "val": 1.0})
    with ManifestWriter(manifest) as writer:
        for pair, _ in zip(scenes, range(options.pairs), strict=False):
            writer.add(pair)
    chosen = build_config(config).model_copy(update={"pairs": manifest, "out": chains})
    started = time.monotonic()
    audit = build(chosen).to_json()
    build_s = time.monotonic() - started
    files = list(Path(chains, "shards").rglob("*.parquet"))
    shard_bytes = sum(file.stat().st_size for file in files)

    run = str(options.work / "run")
    started = time.monotonic()
    result = train(train_config(config).model_copy(update={"data": chains, "out": run}))
    train_s = time.monotonic() - started
    checkpoint_bytes = sum(file.stat().st_size for file in Path(run, "checkpoints").rglob("*") if file.is_file())

    compared = [
        ("build, seconds", planned["build"]["hours"]["mean"] * 3600, build_s),
        ("build, UNet evaluations", planned["build"]["unet_evaluations"], audit["unet_evaluations"]),
        ("build, shards", planned["build"]["shards"], len(files)),
        ("build, bytes of shards", planned["build"]["shard_bytes"], shard_bytes),
        ("training, seconds", planned["train"]["hours"]["mean"] * 3600, train_s),
        ("training, tokens", planned["train"]["tokens"], result.tokens),
        ("training, bytes of checkpoints", planned["train"]["checkpoint_bytes"], checkpoint_bytes),
    ]
    lines = ["| | planned | measured | planned / measured |", "|---|---|---|---|"]
    lines += [f"| {name} | {due:,.0f} | {found:,.0f} | {due / found:.3f} |" for name, due, found in compared]
    sizes = " and ".join(map(str, options.calibration_pairs))
    lines += [
        "",
        f"{options.pairs} pairs of scenes, {options.prior_steps} DDIM steps, {audit['actors']} actors, busy "
        f"{audit['busy_share']:.1%} of their time; {options.train_steps} steps of "
        f"{result.tokens // options.train_steps} tokens. Calibrated with builds of {sizes} pairs and "
        f"{options.calibration_steps} steps; their rates:",
        "",
        *(f"    {line}" for line in Path(path).read_text(encoding="utf-8").splitlines()),
    ]
    print("\n".join(lines))
    if options.result:
        write_result(options.result, "The plan against what then happened", ("covray", "torch", "ray"), lines)
    off = [name for name, due, found in compared if "seconds" in name and abs(due / found - 1) > TOLERANCE]
    if off:
        sys.exit(f"more than {TOLERANCE:.0%} off: {', '.join(off)}")


def configured(options: argparse.Namespace) -> PlanConfig:
    """What is planned: a build by as many actors as there are, one after the other a training by one worker."""
    values: dict[str, Any] = {
        "steps": ["build", "train"],
        "pairs": options.pairs,
        "train_pairs": options.pairs,
        "pairs_per_source": len(TASKS),
        "tasks_per_block": len(TASKS),
        "build": {
            "lengths": [4],
            "prior": {"steps": options.prior_steps},
            "actors": {"min": options.actors, "max": options.actors},
            "rows_per_block": 16,
        },
        "build_on": {"gpus": options.actors, "gpus_per_node": options.actors},
        "train": {
            "optimizer": {"batch_tokens": 8192, "micro_batch_tokens": 4096, "steps": options.train_steps},
            "validate_every_steps": 50,
            "checkpoints": {"every_steps": 50},
            "tracking": {"uri": "none"},
        },
        "replicas": 1,
    }
    return load_config(PlanConfig, None, values)


if __name__ == "__main__":
    main()
