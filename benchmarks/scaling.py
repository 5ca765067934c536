"""Chains a second of one actor against as many as there are cores: the same build, through Ray, by turns.

    python benchmarks/scaling.py --scenes 16 --rounds 3 --result benchmarks/results/scaling.md

Each build writes the same pairs; its rate is the audit's, which leaves out the start of Ray and of the models. What
both builds wrote must be the same to the bit. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from results_file import write_result

from covray.chains.dataset import ChainDataset
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs


def build(pairs: Path, out: Path, actors: int, steps: int) -> dict[str, float]:
    """The audit of a build with so many actors."""
    command = [Path(sys.executable).parent / "covray", "build", "--pairs", pairs, "--out", out, "--json"]
    command += ["--actors", str(actors), "--set", f"prior.steps={steps}", "--set", "rows_per_block=14"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    audit: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return audit


def tokens(out: Path) -> dict[int, bytes]:
    """All of a dataset's tokens, by pair."""
    rows = ChainDataset(str(out)).rows()
    return {row["pair_id"]: b"".join(frame["tokens"].tobytes() for frame in row["frames"]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=16, help="of seven pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--actors", type=int, default=os.cpu_count())
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], given.actors: []}
    busy: dict[int, list[float]] = {1: [], given.actors: []}
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder, "pairs.parquet")
        with ManifestWriter(str(pairs)) as writer:
            for pair in scene_pairs(given.scenes):
                writer.add(pair)
        written = {}
        for number in range(given.rounds):
            for actors in rates:
                out = Path(folder, f"chains-{number}-{actors}")
                audit = build(pairs, out, actors, given.steps)
                rates[actors].append(audit["chains_per_s"])
                busy[actors].append(audit["busy_share"])
                written[out.name] = tokens(out)
        first, *others = written.values()
        assert all(other == first for other in others), "builds with other numbers of actors wrote other tokens"
    one, many = (statistics.median(rates[actors]) for actors in rates)
    lines = ["| actors | chains/s, median | all rounds | busy share |", "|---|---|---|---|"]
    lines += [
        f"| {actors} | {statistics.median(rates[actors]):.3f} | {', '.join(f'{rate:.3f}' for rate in rates[actors])} | "
        f"{statistics.median(busy[actors]):.3f} |"
        for actors in rates
    ]
    lines += ["", f"{given.actors} actors: {many / one:.2f}x of one, on {given.scenes * 7} pairs, the same to the bit."]
    print("\n".join(lines))
    if given.result:
        write_result(given.result, "Scaling of a build", ("ray", "torch", "diffusers"), lines)


if __name__ == "__main__":
    main()
