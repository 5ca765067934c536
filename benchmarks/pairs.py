"""Photographs to pairs by one process and by one and two actors: pairs a second, and whether the bytes are equal.

python benchmarks/pairs.py                          # 200 photographs of 768x1024, about five minutes on two cores
python benchmarks/pairs.py --photographs 40 --out result.md
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from results_file import write_result

SIZE_PX = (768, 1024)
FEW = 4
"""Photographs of the run whose seconds count as the start."""
TASKS_OF_A_PHOTOGRAPH = 3


def write_photographs(folder: Path, count: int) -> None:
    """Soft colours with noise: what JPEG, Canny and PNG take about as long for as for photographs."""
    folder.mkdir()
    for number in range(count):
        generator = np.random.default_rng(number)
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        soft = np.asarray(small.resize((SIZE_PX[1], SIZE_PX[0]), Image.Resampling.BICUBIC), np.int16)
        noisy = soft + generator.normal(0, 4, soft.shape).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=92)


def seconds_of(photographs: Path, out: Path, actors: int | None) -> float:
    """Make all pairs by a command of its own; return its seconds."""
    command = [sys.executable, "-m", "covray", "pairs", "photos", str(photographs), "--out", str(out)]
    if actors is not None:
        command += ["--actors", str(actors)]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--out", type=Path, help="Markdown file of the figures.")
    options = parser.parse_args()
    lines = ["| actors | seconds | pairs/s without the start |", "|---|---|---|"]
    hashes = set()
    with tempfile.TemporaryDirectory() as temporary:
        photographs, few = Path(temporary, "photographs"), Path(temporary, "few")
        write_photographs(photographs, options.photographs)
        write_photographs(few, FEW)
        for actors in (None, 1, 2):
            start_s = seconds_of(few, Path(temporary, "few.parquet"), actors)
            out = Path(temporary, f"{actors}.parquet")
            whole_s = seconds_of(photographs, out, actors)
            hashes.add(hashlib.sha256(out.read_bytes()).hexdigest())
            rate = TASKS_OF_A_PHOTOGRAPH * (options.photographs - FEW) / (whole_s - start_s)
            lines.append(f"| {actors or 'none, one process'} | {whole_s:.1f} | {rate:.2f} |")
            print(lines[-1], flush=True)
    lines += ["", f"Manifests of different bytes: {len(hashes) - 1}."]
    print(lines[-1])
    if options.out:
        write_result(options.out, "Photographs to pairs", ["ray", "numpy", "scikit-image"], lines)


if __name__ == "__main__":
    main()
