"""Latency and answers a second of ``covray serve``, against one ``covray generate`` process a request.

    python benchmarks/serve.py --run RUN --query room.png --example a.png:a_depth.png --task depth --result FILE.md

Starts a server of the run on a free port of this machine, and lets 1, 4 and 16 clients each send requests one by one.
Their queries differ (the picture, turned and cut), their example, task and seed do not, so that the server may answer
several in a batch. Then the same queries are answered by ``covray generate``, a process each, as a script without a
server would. The server's first answer is compared with that of ``covray generate``: the pictures must be equal to the
bit.

    python benchmarks/serve.py --run RUN --query room.png --example a.png:a_depth.png --task depth --minutes 30

In place of all this, load the server for so long with requests of many kinds, kill its replicas at random, and compare
every answer with that of ``covray generate`` (``mixed_load.py``). Requests of other tasks take their examples from
``--other``, or else from the server's gallery. The exit code is 1 if an answer is wrong or an accepted request lost.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mixed_load import ExampleFile, gallery_examples, make_cases, run_load
from PIL import Image
from results_file import write_result

START_S = 1800.0


@dataclass(frozen=True)
class Figures:
    """What was measured of one way to answer."""

    name: str
    latencies_s: list[float]
    wall_s: float

    def row(self) -> str:
        """Return the row of the table."""
        p50, p95 = np.percentile(self.latencies_s, [50, 95])
        count = len(self.latencies_s)
        return f"| {self.name} | {count} | {p50:.2f} | {p95:.2f} | {count / self.wall_s:.2f} |"


def queries(picture: Path, count: int) -> list[bytes]:
    """Return ``count`` different pictures, as PNG."""
    image = Image.open(picture).convert("RGB")
    side = min(image.size)
    files = []
    for number in range(count):
        cut = number // 4
        turned = image.rotate(90 * (number % 4)).crop((cut, cut, side, side))
        buffer = io.BytesIO()
        turned.save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@contextmanager
def server(run: str, *sets: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server of ``run`` and yield its address and its command, once it takes requests.

    Args:
        run: The adapter.
        sets: Settings, ``key=value``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "covray", "serve", "--adapter", run, "--port", str(port)]
    for setting in sets:
        command += ["--set", setting]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not is_ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"covray serve did not start (exit code {process.poll()})")
            time.sleep(0.5)
        yield address, process
    finally:
        process.terminate()
        process.wait(120)


def is_ready(address: str) -> bool:
    """Return whether the server takes requests."""
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one request."""
    post = urllib.request.Request(
        f"{address}/v1/answers", json.dumps(request).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(post, timeout=START_S) as answer:
        loaded: dict[str, Any] = json.load(answer)
    return loaded


def by_clients(address: str, requests: list[dict[str, Any]], clients: int) -> Figures:
    """Let ``clients`` send the requests, each its share one after another."""
    latencies: list[float] = []

    def client(share: list[dict[str, Any]]) -> None:
        for request in share:
            started = time.perf_counter()
            ask(address, request)
            latencies.append(time.perf_counter() - started)

    threads = [threading.Thread(target=client, args=(requests[number::clients],)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(latencies) != len(requests):
        raise SystemExit(f"{len(requests) - len(latencies)} of {len(requests)} requests of {clients} clients failed")
    return Figures(f"covray serve, {clients} clients", latencies, time.perf_counter() - started)


def by_processes(options: argparse.Namespace, files: list[bytes], folder: Path) -> tuple[Figures, Path]:
    """Answer each query by a process of its own; return the figures and the folder of the first answer."""
    latencies = []
    for number, data in enumerate(files):
        query = folder / f"query-{number}.png"
        query.write_bytes(data)
        command = [sys.executable, "-m", "covray", "generate", "--adapter", options.run, "--query", str(query)]
        command += ["--example", *options.example.split(":"), "--task", options.task]
        command += ["--out", str(folder / f"out-{number}")]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        latencies.append(time.perf_counter() - started)
    return Figures("covray generate, a process a request", latencies, sum(latencies)), folder / "out-0"


def require_equal(answer: dict[str, Any], folder: Path) -> None:
    """Refuse figures of a server whose answer differs from that of ``covray generate``."""
    served = np.array(Image.open(io.BytesIO(base64.b64decode(answer["picture"]))))
    (file,) = folder.rglob("answer.png")
    if not np.array_equal(served, np.array(Image.open(file))):
        raise SystemExit(f"the server's answer differs from {file}")


def load(options: argparse.Namespace, example: ExampleFile) -> None:
    """Run the mixed load, print and write the result file; end the program with 1 if the server failed."""
    # One request more at once than fit the queue: now and then one is refused.
    sets = (
        f"replicas.min={options.replicas}", f"replicas.max={options.replicas}", "replicas.cpus=0.5",
        f"limits.queue={max(1, options.load_clients - 1)}", "limits.time_s=600",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, server(options.run, *sets) as (address, process):
        others = []
        for entry in options.other or ():
            task, image, label = entry.split(":")
            others.append(ExampleFile(task, Path(image).read_bytes(), Path(label).read_bytes()))
        if not others:
            others = [each for each in gallery_examples(address) if each.task != example.task]
        cases = make_cases(options.run, options.query, [example, *others], Path(scratch))
        report, good = run_load(
            address, process, cases, minutes=options.minutes, clients=options.load_clients, seed=options.seed,
            kill_every_s=options.kill_every,
        )  # fmt: skip
    print("\n".join(report))
    if options.result:
        write_result(options.result, "A server under mixed load", ("torch", "ray", "numpy"), report)
    if not good:
        raise SystemExit(1)


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="finished run of covray train")
    parser.add_argument("--query", type=Path, required=True, help="picture that the queries are made of")
    parser.add_argument("--example", required=True, help="IMAGE:LABEL")
    parser.add_argument("--task", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="requests of each number of clients")
    parser.add_argument("--processes", type=int, default=4, help="queries that covray generate answers")
    parser.add_argument("--minutes", type=float, help="load with requests of many kinds, while replicas are killed")
    parser.add_argument("--other", action="append", metavar="TASK:IMAGE:LABEL", help="another task of --minutes")
    parser.add_argument("--load-clients", type=int, default=8, help="clients of --minutes")
    parser.add_argument("--replicas", type=int, default=2, help="replicas of --minutes")
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=0, help="of requests, moments and victims of --minutes")
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    image, label = (Path(part).read_bytes() for part in options.example.split(":"))
    if options.minutes is not None:
        load(options, ExampleFile(options.task, image, label))
        return
    example = {"image": base64.b64encode(image).decode(), "label": base64.b64encode(label).decode()}
    files = queries(options.query, options.requests)
    requests = [
        {"query": base64.b64encode(data).decode(), "examples": [example], "task": options.task} for data in files
    ]
    with tempfile.TemporaryDirectory() as scratch:
        with server(options.run) as (address, _):
            first = ask(address, requests[0])  # also warms up
            figures = [by_clients(address, requests, clients) for clients in options.clients]
        alone, folder = by_processes(options, files[: options.processes], Path(scratch))
        require_equal(first, folder)
    report = ["| | requests | p50, s | p95, s | answers a second |", "|---|---|---|---|---|"]
    report += [each.row() for each in [*figures, alone]]
    rates = [len(each.latencies_s) / each.wall_s for each in figures]
    report += [
        "",
        f"{max(options.clients)} clients get {rates[-1] / rates[0]:.1f} times the answers of {options.clients[0]}.",
    ]
    print("\n".join(report))
    if options.result:
        write_result(options.result, "Answers of a server", ("torch", "ray", "numpy"), report)


if __name__ == "__main__":
    main()
