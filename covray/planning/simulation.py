"""Simulate a build, or a training, event by event, on nodes that boot, idle and are lost.

    build     nodes join -> actors load -> each takes one block after another -> the last block, the audit
              others repeat the unfinished blocks of a node that is lost
    training  all workers step together; the loss of any node costs the steps since the last checkpoint

Times are seconds. A node is paid from its request until it is taken away, or until its idle timeout has passed.
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

_MIN_LAUNCHES = 5
"""Ray's autoscaler may always launch this many nodes at once (AUTOSCALER_UPSCALING_INITIAL_NUM_NODES)."""
_MAX_EVENTS = 100
"""For every block and actor: with more, the build makes no progress."""


@dataclass(frozen=True)
class Fleet:
    """Nodes of one kind; see ``covray.config.NodesConfig``."""

    nodes: int
    actors: int = 1
    """Actors of a build, or workers of a training, on each node."""
    boot_s: float = 0.0
    upscaling_speed: float = 1.0
    interruptions_per_s: float = 0.0
    """Of each node; the time until an interruption is exponential."""
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
    """From the start of an actor until it computes."""
    end_s: float = 0.0
    """After the last block, without actors: the audit."""
    driver_blocks_per_s: float = math.inf
    """Blocks that the driver can hand out."""

    @property
    def blocks(self) -> int:
        """The number of blocks; the last one may be smaller."""
        return -(-self.rows // self.rows_per_block)


@dataclass(frozen=True)
class TrainWork:
    """What a training has to do. It also ends with a validation and a checkpoint."""

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
        """The number of checkpoints."""
        return -(-self.steps // self.checkpoint_every_steps)

    def seconds_to(self, step: int) -> float:
        """Return the seconds from the first step to the end of number ``step``, with the pauses until then."""
        last = step == self.steps
        validations = step // self.validate_every_steps + (last and step % self.validate_every_steps > 0)
        checkpoints = self.checkpoints if last else step // self.checkpoint_every_steps
        return step * self.step_s + validations * self.validation_s + checkpoints * self.checkpoint_s

    def kept(self, checkpoint: int) -> float:
        """Return the seconds of ``seconds_to`` that the checkpoint of this number keeps; 0 is the beginning."""
        return self.seconds_to(min(checkpoint * self.checkpoint_every_steps, self.steps))


@dataclass(frozen=True)
class Outcome:
    """The outcome of one simulation; ``paid_s``, ``busy_s`` and ``lost_s`` are summed over actors or workers."""

    seconds: float
    """From the command to its end."""
    paid_s: float
    busy_s: float
    """Work that is kept."""
    lost_s: float
    """Work that is not kept."""
    interruptions: int
    done: int
    """Blocks, or steps, that are kept."""


def simulate_build(work: BuildWork, fleet: Fleet, generator: np.random.Generator) -> Outcome:
    """Simulate one build. Raises ConfigError where nodes are lost faster than they get anything done."""
    return _Build(work, fleet, generator).run()


@dataclass(frozen=True, slots=True)
class _Block:
    """A block that an actor computes."""

    begin: float
    seconds: float


@dataclass(eq=False, slots=True)
class _Node:
    """A node from its request to its end."""

    launched: float
    blocks: list[_Block | None]
    """What each actor computes; None while it is idle."""
    joined: bool = False
    gone: bool = False
    idle_since: float | None = None


@dataclass
class _Build:
    """The state of a simulated build, and the events that change it."""

    work: BuildWork
    fleet: Fleet
    generator: np.random.Generator
    now: float = 0.0
    events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = field(default_factory=list)
    nodes: dict[_Node, None] = field(default_factory=dict)  # in order, so that sums are the same to the bit
    booting: int = 0
    wanted: int = 1
    """Nodes to request: one that loads the models once, then all."""
    probed: bool = False
    """Whether the models have been loaded once."""
    handed_out: int = 0
    """Blocks that were handed out, without repetitions."""
    handed_out_at: float = -math.inf
    """When the driver handed out a block last."""
    lost_blocks: list[float] = field(default_factory=list)
    """Seconds of the blocks that must be repeated."""
    idle: list[tuple[_Node, int]] = field(default_factory=list)
    """Actors without work, each as its node and its number there."""
    done: int = 0
    paid_s: float = 0.0
    busy_s: float = 0.0
    lost_s: float = 0.0
    interruptions: int = 0

    def __post_init__(self) -> None:
        self.order = itertools.count()  # breaks ties between events of one time
        self.blocks, self.gap_s = self.work.blocks, 1 / self.work.driver_blocks_per_s
        self.block_s = self.work.rows_per_block * self.work.row_s
        rows_of_last = self.work.rows - (self.blocks - 1) * self.work.rows_per_block
        self.last_block_s = rows_of_last * self.work.row_s

    def run(self) -> Outcome:
        """Simulate until every block is done."""
        self._launch()
        max_events = _MAX_EVENTS * (self.blocks + self.fleet.nodes * self.fleet.actors)
        for count in itertools.count():
            if self.done == self.blocks:
                break
            if count > max_events:
                raise ConfigError(
                    f"build_on.interruptions: {self.interruptions:,} nodes were taken away and {self.done:,} of "
                    f"{self.blocks:,} blocks done; take machines that stay, that come sooner, or fewer"
                )
            self.now, _, event, subject = heapq.heappop(self.events)
            event(*subject)
        # Nodes that are still up are paid until their idle timeout has passed.
        for node in self.nodes:
            idle_from = node.idle_since if node.idle_since is not None else self.now
            if not node.joined:
                idle_from = max(self.now, node.launched + self.fleet.boot_s)
            released = max(self.now, idle_from + self.fleet.idle_timeout_s)
            self.paid_s += released - node.launched
        return Outcome(
            seconds=self.now + self.work.end_s,
            paid_s=self.paid_s * self.fleet.actors,
            busy_s=self.busy_s,
            lost_s=self.lost_s,
            interruptions=self.interruptions,
            done=self.done,
        )

    def _at(self, time: float, event: Callable[..., None], *subject: object) -> None:
        """Have ``event`` happen to ``subject`` at a time."""
        heapq.heappush(self.events, (time, next(self.order), event, subject))

    def _launch(self) -> None:
        """Request as many nodes as are wanted and the autoscaler allows."""
        # The autoscaler launches in proportion to the nodes that are up, and never fewer than a few.
        allowed = max(_MIN_LAUNCHES, math.ceil(self.fleet.upscaling_speed * (len(self.nodes) - self.booting)))
        has_work = bool(self.lost_blocks) or self.handed_out < self.blocks
        wanted = self.wanted if has_work else 0
        while self.booting < allowed and len(self.nodes) < wanted:
            node = _Node(self.now, [None] * self.fleet.actors)
            self.nodes[node] = None
            self.booting += 1
            self._at(self.now + self.fleet.boot_s, self._join, node)
            if self.fleet.interruptions_per_s:
                # Drawn at the request: a node can be taken away while it boots, too.
                life = self.generator.exponential(1 / self.fleet.interruptions_per_s)
                self._at(self.now + life, self._interrupt, node)

    def _join(self, node: _Node) -> None:
        """A node is up; the first one loads the models once, all others start their actors."""
        if node.gone:
            return
        self.booting -= 1
        node.joined = True
        if self.probed:
            self._at(self.now + self.work.load_s, self._ready, node)
        else:  # if this node is lost, the next one begins again
            self._at(self.now + self.work.start_s, self._probe, node)
        self._launch()

    def _probe(self, node: _Node) -> None:
        """The models have been loaded once: request all nodes."""
        if node.gone:
            return
        self.probed = True
        self.wanted = min(self.fleet.nodes, -(-self.blocks // self.fleet.actors))
        self._at(self.now + self.work.load_s, self._ready, node)
        self._launch()

    def _ready(self, node: _Node) -> None:
        """The actors of a node have loaded the models."""
        if not node.gone:
            for slot in range(self.fleet.actors):
                self._take(node, slot)

    def _take(self, node: _Node, slot: int) -> None:
        """Begin the next block as soon as the driver hands it out."""
        if self.lost_blocks:
            seconds = self.lost_blocks.pop()
        elif self.handed_out < self.blocks:
            self.handed_out += 1
            seconds = self.block_s if self.handed_out < self.blocks else self.last_block_s
        else:
            node.blocks[slot] = None
            self.idle.append((node, slot))
            if not any(node.blocks):
                node.idle_since = self.now
                self._at(self.now + self.fleet.idle_timeout_s, self._leave, node, self.now)
            return
        # The driver hands out one block at a time, so that many actors wait for it.
        begin = self.handed_out_at = max(self.now, self.handed_out_at + self.gap_s)
        node.blocks[slot] = _Block(begin, seconds)
        heapq.heappush(self.events, (begin + seconds, next(self.order), self._commit, (node, slot)))

    def _commit(self, node: _Node, slot: int) -> None:
        """An actor has finished its block."""
        if node.gone:
            return
        block = node.blocks[slot]
        assert block is not None
        self.done += 1
        self.busy_s += block.seconds
        self._take(node, slot)

    def _leave(self, node: _Node, since: float) -> None:
        """The idle timeout of a node has passed; it is released if it has been idle all the time."""
        if not node.gone and node.idle_since == since:
            self._remove(node)

    def _interrupt(self, node: _Node) -> None:
        """A node is taken away, and its unfinished blocks are lost."""
        if node.gone:
            return
        self.interruptions += 1
        self._remove(node)
        # Idle actors of other nodes repeat the lost blocks at once.
        for block in filter(None, node.blocks):
            # A block that still waits for the driver has not begun: nothing of it is lost.
            self.lost_s += max(0.0, self.now - block.begin)
            self.lost_blocks.append(block.seconds)
        while self.idle and self.lost_blocks:
            other, slot = self.idle.pop()
            if not other.gone:
                other.idle_since = None
                self._take(other, slot)
        self._launch()

    def _remove(self, node: _Node) -> None:
        """Take a node out, and count what it cost."""
        node.gone = True
        del self.nodes[node]
        self.booting -= not node.joined
        self.paid_s += self.now - node.launched


def simulate_training(work: TrainWork, fleet: Fleet, generator: np.random.Generator) -> Outcome:
    """Simulate one training, which waits for all its nodes: it has no use for a part of them.

    While a node is being replaced no other is lost: two at a time are rare, and cost hardly more than one.
    """
    whole_s, checkpoints = work.seconds_to(work.steps), range(work.checkpoints + 1)
    launched = launch_times(fleet)
    first_start_s = launched[-1] + fleet.boot_s
    paid_before_s = sum(first_start_s - time for time in launched)  # while the last nodes are still booting
    seconds, kept_s, lost_s, interruptions = first_start_s, 0.0, 0.0, 0
    rate = fleet.nodes * fleet.interruptions_per_s
    while True:
        # Every start goes on from the last checkpoint, and ends with the training or with the next loss.
        left = work.start_s + whole_s - kept_s
        # Exponential times have no memory, so that every start may draw a new one.
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
        paid_s=(paid_before_s + fleet.nodes * (seconds - first_start_s + fleet.idle_timeout_s)) * fleet.actors,
        busy_s=whole_s * workers,
        lost_s=lost_s * workers,
        interruptions=interruptions,
        done=work.steps,
    )


def launch_times(fleet: Fleet) -> list[float]:
    """Return when each node is requested, where all are wanted at once and none is lost."""
    times: list[float] = []
    wave = 0
    while len(times) < fleet.nodes:
        # A wave counts for the next one when it has booted.
        allowed = max(_MIN_LAUNCHES, math.ceil(fleet.upscaling_speed * len(times)))
        times += [wave * fleet.boot_s] * min(allowed, fleet.nodes - len(times))
        wave += 1
    return times
