"""Mixed load on a server whose replicas are killed at random: what ``serve.py --minutes N`` runs.

Requests differ in picture size, task, example, sampling and seed; some are streamed, and some clients leave a stream
in the middle. What ``covray generate`` writes for each is computed once, before the load, and every answer is compared
with it: picture, data and spread byte for byte, likelihoods as numbers. ``covray generate`` writes no file of a single
frame, so frames are compared with those of the first answer to the same request.
"""

from __future__ import annotations

import base64
import io
import json
import random
import statistics
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

SIDES = (24, 64, 200, 640)
"""Widths of the queries; their heights are three quarters of it."""
SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0}, {"temperature": 1.0, "vote": 3})
WHOLE, STREAM, LEAVE = "whole", "streamed", "left in the middle of a stream"
SHARES = {WHOLE: 6, STREAM: 3, LEAVE: 1}
REPLICA = "ray::ServeReplica:covray:Replica"
ROLES = {
    "Door": "ray::ServeReplica:covray:Door", "proxy": "ray::ProxyActor", "controller": "ray::ServeController",
    "each replica": REPLICA,
}  # fmt: skip
"""What the processes of a server are called, by the beginning of their titles."""
SAMPLE_S = 5.0
TIMEOUT_S = 600.0


@dataclass(frozen=True, eq=False)
class Case:
    """A request, and what ``covray generate`` writes for it."""

    body: dict[str, Any]
    files: dict[str, bytes]
    log_likelihood: list[float]


@dataclass(frozen=True, eq=False)
class ExampleFile:
    """An example pair of a task."""

    task: str
    image: bytes
    label: bytes


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def gallery_examples(address: str) -> list[ExampleFile]:
    """Return one example of each task that the server's gallery has."""
    with urllib.request.urlopen(f"{address}/v1/adapters", timeout=TIMEOUT_S) as response:
        adapter = json.load(response)["adapters"][0]
    examples = []
    for task in adapter["gallery"]:
        url = f"{address}/v1/gallery?adapter={adapter['name']}&task={task}"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            pair = json.load(response)["pairs"][0]
        examples.append(ExampleFile(task, base64.b64decode(pair["image"]), base64.b64decode(pair["label"])))
    return examples


def make_cases(run: str, picture: Path, examples: Sequence[ExampleFile], folder: Path) -> list[Case]:
    """Return the requests with their answers by ``covray generate``, once for each task and sampling.

    Args:
        run: The adapter.
        picture: What the queries are made of.
        examples: One of each task.
        folder: For the files.
    """
    image = Image.open(picture).convert("RGB")
    queries = []
    for number, side in enumerate(SIDES):
        path = folder / f"query-{side}.png"
        image.rotate(90 * number).resize((side, side * 3 // 4)).save(path)
        queries.append(path)
    cases = []
    for number, example in enumerate(examples):
        pair = (folder / f"{example.task}-image.png", folder / f"{example.task}-label.png")
        pair[0].write_bytes(example.image)
        pair[1].write_bytes(example.label)
        for sampling in (SAMPLINGS[0], SAMPLINGS[1 + number % 2]):
            settings = {"task": example.task, "seed": number, "sampling": sampling}
            out = folder / f"out-{example.task}-{len(sampling)}"
            generate(run, queries, pair, settings, out)
            shown = [{"image": text_of(example.image), "label": text_of(example.label)}]
            for record in json.loads((out / "generation.json").read_text())["answers"]:
                body = settings | {"query": text_of(Path(record["query"]).read_bytes()), "examples": shown}
                files = {name: (out / record["folder"] / name).read_bytes() for name in record["files"]}
                likelihood = record["log_likelihood"]
                cases.append(Case(body, files, [*likelihood["frames"], likelihood["answer"]]))
    return cases


def generate(run: str, queries: Sequence[Path], pair: tuple[Path, Path], settings: dict[str, Any], out: Path) -> None:
    """Answer the queries by the command ``covray generate``, in this process: libraries are loaded once."""
    from covray.cli.app import app

    arguments = ["generate", "--adapter", run, "--task", settings["task"], "--seed", str(settings["seed"])]
    arguments += ["--example", str(pair[0]), str(pair[1]), "--out", str(out)]
    for query in queries:
        arguments += ["--query", str(query)]
    for name, value in settings["sampling"].items():
        arguments += ["--set", f"sampling.{name}={value}"]
    with redirect_stdout(io.StringIO()):
        app(arguments, standalone_mode=False)


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Why each request that the server accepted got no answer."""
    wrong: list[str] = field(default_factory=list)
    """What each wrong answer differs in."""
    killed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """Sends requests one after another, and judges the answers."""

    def __init__(self, address: str, cases: Sequence[Case], tally: Tally, frames: dict[int, list[str]]):
        """Prepare.

        Args:
            address: Of the server.
            cases: To choose from.
            tally: Of all clients.
            frames: Those of the first answer to each case, by its number; of all clients.
        """
        self._address, self._cases, self._tally, self._frames = address, cases, tally, frames

    def run(self, rng: random.Random, end: float) -> None:
        """Send requests until ``end`` of the monotonic clock."""
        while time.monotonic() < end:
            number = rng.randrange(len(self._cases))
            (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
            started = time.monotonic()
            try:
                differs = self._ask(number, kind)
            except urllib.error.HTTPError as error:
                self._refused(error)
                continue
            except (OSError, HTTPException, ValueError, KeyError) as error:  # the server had accepted it
                with self._tally.lock:
                    self._tally.lost.append(f"{kind}: {error!r}")
                continue
            with self._tally.lock:
                self._tally.outcomes[kind] += 1
                if kind != LEAVE:
                    self._tally.latencies_s.append(time.monotonic() - started)
                if differs:
                    self._tally.wrong.append(f"{kind}, {self._cases[number].body['task']}: {', '.join(differs)}")

    def _refused(self, error: urllib.error.HTTPError) -> None:
        """Count a refusal: only one of the full queue was never accepted."""
        with error:
            message = error.read().decode(errors="replace")
        if error.code == 503 and '"queue_full"' in message:
            with self._tally.lock:
                self._tally.outcomes["refused, the queue was full"] += 1
            time.sleep(0.2)
            return
        with self._tally.lock:
            self._tally.lost.append(f"status {error.code}: {message[:200]}")

    def _ask(self, number: int, kind: str) -> list[str]:
        """Send a request; return what its answer differs in from the one it must get."""
        case = self._cases[number]
        headers = {"content-type": "application/json"}
        if kind != WHOLE:
            headers["accept"] = "text/event-stream"
        request = urllib.request.Request(f"{self._address}/v1/answers", json.dumps(case.body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            if kind == WHOLE:
                answer = json.load(response)
                return self._differences(number, answer, answer["frames"], whole=True)
            pictures: list[str] = []
            for name, data in events(response):
                if name == "frame":
                    pictures.append(data["picture"])
                    if kind == LEAVE:
                        return []
                elif name == "answer":
                    return self._differences(number, data, pictures[:-1], whole=False)
                else:
                    raise ConnectionError(f"the stream ends with {data}")
        raise ConnectionError(f"the stream ends after {len(pictures)} pictures")

    def _differences(self, number: int, answer: dict[str, Any], frames: list[str], *, whole: bool) -> list[str]:
        case = self._cases[number]
        expected = {name: text_of(content) for name, content in case.files.items()}
        del expected["strip.png"]
        spread = expected.pop("spread.png", None)
        differs = []
        if answer["data"] | {"answer.png": answer["picture"]} != expected:
            differs.append("picture or data")
        with self._tally.lock:
            first = self._frames.setdefault(number, frames)
        if frames != first:
            differs.append("frames")
        if whole and answer["spread"] != spread:
            differs.append("spread")
        if whole and answer["log_likelihood"] != case.log_likelihood:
            differs.append("likelihood")
        return differs


def events(response: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the Server-Sent Events of a response: name and data."""
    name = ""
    for line in response:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield name, json.loads(text.removeprefix("data: "))


def titled(server: subprocess.Popen[Any], title: str) -> list[psutil.Process]:
    """Return the processes of a server whose title begins so."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(server.pid).children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()[:1]).startswith(title):
                    found.append(process)
    return found


def kill_replicas(server: subprocess.Popen[Any], tally: Tally, rng: random.Random, end: float, every_s: float) -> None:
    """Kill a replica at random moments, ``every_s`` apart on average."""
    while (moment := time.monotonic() + rng.expovariate(1 / every_s)) < end:
        time.sleep(max(0.0, moment - time.monotonic()))
        replicas = titled(server, REPLICA)
        if replicas:
            with suppress(psutil.NoSuchProcess):
                rng.choice(replicas).kill()
                tally.killed += 1


class Memory:
    """The memory of a server's processes over time."""

    def __init__(self, server: subprocess.Popen[Any], seconds: float):
        self._server, self._seconds = server, seconds
        self._mib: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def watch(self) -> None:
        """Look every ``SAMPLE_S`` until the load ends."""
        started = time.monotonic()
        while (at := time.monotonic() - started) < self._seconds:
            processes = {role: titled(self._server, title) for role, title in ROLES.items()}
            processes["command"] = [psutil.Process(self._server.pid)]
            for role, members in processes.items():
                for process in members:
                    with suppress(psutil.Error):
                        self._mib[role].append((at, process.memory_info().rss / 2**20))
            time.sleep(SAMPLE_S)

    def rows(self) -> list[str]:
        """Return the table: medians of each role in the second and the last quarter of the time."""
        rows = ["| memory (RSS), MiB | second quarter | last quarter | most |", "|---|---|---|---|"]
        for role, samples in self._mib.items():
            quarters = []
            for quarter in (1, 3):
                begin, end = (self._seconds * part / 4 for part in (quarter, quarter + 1))
                inside = [mib for at, mib in samples if begin <= at < end]
                quarters.append(f"{statistics.median(inside):.0f}" if inside else "-")
            most = max(mib for _, mib in samples)
            rows.append(f"| {role} | {quarters[0]} | {quarters[1]} | {most:.0f} |")
        return rows


def run_load(
    address: str, server: subprocess.Popen[Any], cases: Sequence[Case], *, minutes: float, clients: int, seed: int,
    kill_every_s: float,
) -> tuple[list[str], bool]:  # fmt: skip
    """Load the server; return the report, and whether nothing was wrong, lost or left taken.

    Args:
        address: Of the server.
        server: Its command.
        cases: Requests with their answers.
        minutes: How long.
        clients: Who send requests at once.
        seed: Of requests, moments and victims.
        kill_every_s: Seconds between two deaths of a replica, on average.
    """
    tally, frames = Tally(), dict[int, list[str]]()
    end = time.monotonic() + 60 * minutes
    memory = Memory(server, 60 * minutes)
    work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (memory.watch, ()),
        (kill_replicas, (server, tally, random.Random(f"{seed} kills"), end, kill_every_s)),
    ]
    for number in range(clients):
        client = Client(address, cases, tally, frames)
        work.append((client.run, (random.Random(f"{seed} client {number}"), end)))
    threads = [threading.Thread(target=function, args=arguments) for function, arguments in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = slots_taken(address)
    p50, p95, longest = np.percentile(tally.latencies_s, [50, 95, 100]) if tally.latencies_s else [0.0] * 3
    report = ["| | |", "|---|---|", f"| minutes | {minutes:g} |", f"| clients | {clients} |"]
    report += [f"| different requests | {len(cases)} |"]
    report += [f"| requests {kind} | {tally.outcomes[kind]} |" for kind in sorted(tally.outcomes)]
    report += [
        f"| replicas killed | {tally.killed} |",
        f"| **wrong answers** | {len(tally.wrong)} |",
        f"| **accepted requests lost** | {len(tally.lost)} |",
        f"| slots still taken after the end | {taken:.0f} |",
        f"| seconds of a request: p50, p95, longest | {p50:.2f}, {p95:.2f}, {longest:.2f} |",
        "",
        *memory.rows(),
    ]
    reasons = Counter([*(f"wrong: {text}" for text in tally.wrong), *(f"lost: {text}" for text in tally.lost)])
    if reasons:
        report += ["", *(f"- {count} times {reason}" for reason, count in reasons.most_common(10))]
    return report, not (tally.wrong or tally.lost or taken)


def slots_taken(address: str) -> float:
    """Return the requests in flight; those whose clients have just left get some seconds to end."""
    deadline = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(f"{address}/metrics", timeout=TIMEOUT_S) as response:
            lines = response.read().decode().splitlines()
        (taken,) = (float(line.split()[1]) for line in lines if line.startswith("covray_requests_in_flight "))
        if not taken or time.monotonic() > deadline:
            return taken
        time.sleep(0.5)
