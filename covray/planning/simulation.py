"""A build, or a training, on machines that come late, go, and are taken away: played through, event by event.

    build     nodes join -> actors load -> each takes block after block -> the last block, the audit
              a node that is lost takes its unfinished blocks with it; others do them again
    training  all workers step together; the loss of any node costs what came after the last checkpoint

Times are seconds; a node is paid from the moment it is asked for until it is taken away or its idle timeout has passed.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from covray.errors import ConfigError

_FIRST_LAUNCHES = 5
"""Nodes that Ray's autoscaler lets be under way however few there are (AUTOSCALER_UPSCALING_INITIAL_NUM_NODES)."""
_MOST_EVENTS = 100
"""For every block and actor; with more nothing gets done."""


@dataclass(frozen=True)
class Fleet:
    """Nodes of one kind; see ``covray.config.NodesConfig``."""

    nodes: int
    actors: int = 1
    """Of a node; workers in a training."""
    boot_s: float = 0.0
    upscaling_speed: float = 1.0
    interruptions_per_s: float = 0.0
    """Of each node; the time until one is exponential."""
    idle_timeout_s: float = 0.0


@dataclass(frozen=True)
class BuildWork:
    """What a build has to do."""

    rows: int
    rows_per_block: int
    row_s: float
    """Of one actor."""
    start_s: float = 0.0
    """Between the first node and the first actor: checks, and loading the models once."""
    load_s: float = 0.0
    """Of an actor."""
    end_s: float = 0.0
    """After the last block, without actors: the audit."""
    driver_blocks_per_s: float = math.inf

    @property
    def blocks(self) -> int:
        """The last may be a smaller one."""
        return -(-self.rows // self.rows_per_block)


@dataclass(frozen=True)
class TrainWork:
    """What a training has to do. Validations and checkpoints are also at the end."""

    steps: int
    step_s: float
    start_s: float = 0.0
    """Until the first step, at every start."""
    validation_s: float = 0.0
    validate_every_steps: int = 1
    checkpoint_s: float = 0.0
    checkpoint_every_steps: int = 1

    @property
    def checkpoints(self) -> int:
        """Their number."""
        return -(-self.steps // self.checkpoint_every_steps)

    def seconds_to(self, step: int) -> float:
        """From the first step to the end of number ``step``, with the pauses until then."""
        last = step == self.steps
        validations = step // self.validate_every_steps + (last and step % self.validate_every_steps > 0)
        checkpoints = self.checkpoints if last else step // self.checkpoint_every_steps
        return step * self.step_s + validations * self.validation_s + checkpoints * self.checkpoint_s

    def kept(self, checkpoint: int) -> float:
        """Seconds of ``seconds_to`` that the checkpoint of this number keeps; 0 is the beginning."""
        return self.seconds_to(min(checkpoint * self.checkpoint_every_steps, self.steps))


@dataclass(frozen=True)
class Outcome:
    """How it went; ``paid_s``, ``busy_s`` and ``lost_s`` are summed over actors or workers."""

    seconds: float
    """From the command to its end."""
    paid_s: float
    busy_s: float
    """Work that was kept."""
    lost_s: float
    """Work that was not."""
    interruptions: int
    done: int
    """Blocks, or steps, that were kept."""


def simulate_build(work: BuildWork, fleet: Fleet, generator: np.random.Generator) -> Outcome:
    """One course of a build. Raises ConfigError where nodes are lost faster than they get anything done."""
    return _Build(work, fleet, generator).run()


@dataclass(eq=False, slots=True)
class _Node:
    launched: float
    work: list[tuple[float, float] | None]
    """Of each actor the block it is at: when it begins, and how long it takes."""
    joined: bool = False
    gone: bool = False
    idle_since: float | None = None


@dataclass
class _Build:
    work: BuildWork
    fleet: Fleet
    generator: np.random.Generator
    now: float = 0.0
    events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = field(default_factory=list)
    nodes: dict[_Node, None] = field(default_factory=dict)  # in order, so that sums are the same to the bit
    booting: int = 0
    wanted: int = 1
    """Nodes; one to load the models once, then all."""
    probed: bool = False
    handed: int = 0
    handed_at: float = -math.inf
    again: list[float] = field(default_factory=list)
    """Seconds of the blocks that were lost."""
    idle: list[tuple[_Node, int]] = field(default_factory=list)
    done: int = 0
    paid_s: float = 0.0
    busy_s: float = 0.0
    lost_s: float = 0.0
    interruptions: int = 0

    def __post_init__(self) -> None:
        self.order = itertools.count()  # of events at one time
        self.blocks, self.gap_s = self.work.blocks, 1 / self.work.driver_blocks_per_s
        self.block_s = self.work.rows_per_block * self.work.row_s
        self.last_s = (self.work.rows - (self.blocks - 1) * self.work.rows_per_block) * self.work.row_s

    def run(self) -> Outcome:
        self._launch()
        most = _MOST_EVENTS * (self.blocks + self.fleet.nodes * self.fleet.actors)
        for played in itertools.count():
            if self.done == self.blocks:
                break
            if played > most:
                raise ConfigError(
                    f"build_on.interruptions: {self.interruptions:,} nodes were taken away and {self.done:,} of "
                    f"{self.blocks:,} blocks done; take machines that stay, that come sooner, or fewer"
                )
            self.now, _, event, subject = heapq.heappop(self.events)
            event(*subject)
        for node in self.nodes:
            free = node.idle_since if node.idle_since is not None else self.now
            if not node.joined:
                free = max(self.now, node.launched + self.fleet.boot_s)
            until = max(self.now, free + self.fleet.idle_timeout_s)
            self.paid_s += until - node.launched
        return Outcome(
            seconds=self.now + self.work.end_s,
            paid_s=self.paid_s * self.fleet.actors,
            busy_s=self.busy_s,
            lost_s=self.lost_s,
            interruptions=self.interruptions,
            done=self.done,
        )

    def _at(self, time: float, event: Callable[..., None], *subject: object) -> None:
        heapq.heappush(self.events, (time, next(self.order), event, subject))

    def _launch(self) -> None:
        """Ask for as many nodes as are wanted and the autoscaler allows."""
        allowed = max(_FIRST_LAUNCHES, math.ceil(self.fleet.upscaling_speed * (len(self.nodes) - self.booting)))
        wanted = self.wanted if self.again or self.handed < self.blocks else 0
        while self.booting < allowed and len(self.nodes) < wanted:
            node = _Node(self.now, [None] * self.fleet.actors)
            self.nodes[node] = None
            self.booting += 1
            self._at(self.now + self.fleet.boot_s, self._join, node)
            if self.fleet.interruptions_per_s:
                life = self.generator.exponential(1 / self.fleet.interruptions_per_s)
                self._at(self.now + life, self._interrupt, node)

    def _join(self, node: _Node) -> None:
        if node.gone:
            return
        self.booting -= 1
        node.joined = True
        if self.probed:
            self._at(self.now + self.work.load_s, self._ready, node)
        else:  # the loss of this node begins it again, on the next
            self._at(self.now + self.work.start_s, self._probe, node)
        self._launch()

    def _probe(self, node: _Node) -> None:
        if node.gone:
            return
        self.probed = True
        self.wanted = min(self.fleet.nodes, -(-self.blocks // self.fleet.actors))
        self._at(self.now + self.work.load_s, self._ready, node)
        self._launch()

    def _ready(self, node: _Node) -> None:
        if not node.gone:
            for slot in range(self.fleet.actors):
                self._take(node, slot)

    def _take(self, node: _Node, slot: int) -> None:
        """Begin the next block, as soon as the driver hands it out."""
        if self.again:
            seconds = self.again.pop()
        elif self.handed < self.blocks:
            self.handed += 1
            seconds = self.block_s if self.handed < self.blocks else self.last_s
        else:
            node.work[slot] = None
            self.idle.append((node, slot))
            if not any(node.work):
                node.idle_since = self.now
                self._at(self.now + self.fleet.idle_timeout_s, self._leave, node, self.now)
            return
        begin = self.handed_at = max(self.now, self.handed_at + self.gap_s)
        node.work[slot] = (begin, seconds)
        heapq.heappush(self.events, (begin + seconds, next(self.order), self._commit, (node, slot)))

    def _commit(self, node: _Node, slot: int) -> None:
        if node.gone:
            return
        work = node.work[slot]
        assert work is not None
        self.done += 1
        self.busy_s += work[1]
        self._take(node, slot)

    def _leave(self, node: _Node, since: float) -> None:
        if not node.gone and node.idle_since == since:
            self._remove(node)

    def _interrupt(self, node: _Node) -> None:
        if node.gone:
            return
        self.interruptions += 1
        self._remove(node)
        for work in filter(None, node.work):
            begin, seconds = work
            self.lost_s += max(0.0, self.now - begin)
            self.again.append(seconds)
        while self.idle and self.again:
            other, slot = self.idle.pop()
            if not other.gone:
                other.idle_since = None
                self._take(other, slot)
        self._launch()

    def _remove(self, node: _Node) -> None:
        node.gone = True
        del self.nodes[node]
        self.booting -= not node.joined
        self.paid_s += self.now - node.launched


def simulate_training(work: TrainWork, fleet: Fleet, generator: np.random.Generator) -> Outcome:
    """One course of a training; it has no use for part of its nodes, so it waits for all of them.

    While one is being replaced no other is lost: both at a time are rare, and cost hardly more than one.
    """
    whole_s, checkpoints = work.seconds_to(work.steps), range(work.checkpoints + 1)
    launched = launch_times(fleet)
    seconds = launched[-1] + fleet.boot_s
    before_s = sum(seconds - time for time in launched)  # paid while the last are still booting
    ramp_s, kept_s, lost_s, interruptions = seconds, 0.0, 0.0, 0
    rate = fleet.nodes * fleet.interruptions_per_s
    while True:
        left = work.start_s + whole_s - kept_s
        life = generator.exponential(1 / rate) if rate else math.inf
        if life >= left:
            break
        interruptions += 1
        reached = kept_s + max(0.0, life - work.start_s)
        kept_s = work.kept(bisect.bisect_right(checkpoints, reached, key=work.kept) - 1)
        lost_s += reached - kept_s
        seconds += life + fleet.boot_s
    seconds += left
    workers = fleet.nodes * fleet.actors
    return Outcome(
        seconds=seconds,
        paid_s=(before_s + fleet.nodes * (seconds - ramp_s + fleet.idle_timeout_s)) * fleet.actors,
        busy_s=whole_s * workers,
        lost_s=lost_s * workers,
        interruptions=interruptions,
        done=work.steps,
    )


def launch_times(fleet: Fleet) -> list[float]:
    """When each node is asked for, where all are wanted at once and none is lost."""
    times: list[float] = []
    wave = 0
    while len(times) < fleet.nodes:
        allowed = max(_FIRST_LAUNCHES, math.ceil(fleet.upscaling_speed * len(times)))
        times += [wave * fleet.boot_s] * min(allowed, fleet.nodes - len(times))
        wave += 1
    return times
