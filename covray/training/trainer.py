"""One worker's training: visual sentences in, an adapter out.

    assemble step (ahead, in a thread) -> gradients of its micro-batches -> sum over workers -> AdamW -> record
    every so often: validate, and write a checkpoint from a copy (in a thread)

Knows nothing of who started it: on one process it is called as it is, on many each has a process group (torch's).
What a step computes depends on the configuration and the step only; the number of workers changes the order in which
floats are added and nothing else.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from covray.chains.dataset import ChainDataset
from covray.chains.sentences import Chains, Sentences, loss_tokens, micro_batches, step_bounds
from covray.config import TrainConfig, require_compiler
from covray.errors import ConfigError
from covray.io import storage
from covray.models.lvm.adapter import adapter_files, load_adapter_tensors, read_start
from covray.models.lvm.backbone import BackboneFacts, backbone_facts, load_backbone
from covray.models.lvm.model import Batch, Lora, Lvm
from covray.models.lvm.scales import parameters
from covray.training.checkpoints import (
    Curve,
    State,
    read_last_checkpoint,
    read_records,
    summation,
    write_adapter,
    write_checkpoint,
)
from covray.training.optimizers import PlainUpdate, Update, learning_rate
from covray.training.zero import ZeroUpdate, read_settings

_FEW_STEPS = 20
"""A run of fewer is told so: the paper's batch is for the paper's 70,000 pairs."""
_ASK_EVERY_S = 2.0
_PEAK_FLOPS = {  # dense bfloat16, data sheets
    "H200": 989e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "B200": 2250e12,
}  # fmt: skip


class Wish(IntEnum):
    """What the world outside wants of a run at the end of a step."""

    GO_ON = 0
    SAVE = 1
    """Write a checkpoint now and go on: a machine is about to be taken away."""
    STOP = 2
    """Write a checkpoint and leave."""


@dataclass(frozen=True)
class Place:
    """Where a worker stands among the others."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ask: Callable[[], Wish] = lambda: Wish.GO_ON
    """Called by all workers after the same step, every few seconds; gives all the same answer."""
    notice: Callable[[str], None] = lambda text: None
    """Takes one line for the user; called by worker 0."""


@dataclass(frozen=True)
class _Step:
    """The work of one step, assembled."""

    last: int  # the cursor after it
    batches: list[Batch | None]  # this worker's
    loss_tokens: int  # all workers'
    tokens: int  # all workers'


def train(
    config: TrainConfig, place: Place | None = None, report: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, Any] | None:
    """Train as one of ``place.world`` workers, from the run's last checkpoint to its end; all values resolved.

    ``report`` takes every validation, on every worker. Worker 0 writes the run folder ``config.out``. Gives the figures
    of the finished run (``_result.json``), None when it was asked to stop before. Raises CovrayError.
    """
    place = place or Place()
    return _Run(config, place, report).run()


def total_steps(sentences: Sentences, config: TrainConfig) -> int:
    """Steps of a run: as asked for, or as many as the epochs take."""
    if config.optimizer.steps is not None:
        return config.optimizer.steps
    cursor, steps, end = 0, 0, _end(sentences, config)
    while cursor < end:
        cursor = step_bounds(sentences, cursor, config.optimizer.batch_tokens)
        steps += 1
    return steps


def resolved_dtype(config: TrainConfig) -> torch.dtype:
    """The arithmetic of a configuration whose ``auto`` is resolved."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.compute.dtype]


class _Run:
    def __init__(self, config: TrainConfig, place: Place, report: Callable[[dict[str, Any]], None]):
        self.config, self.place, self.report = config, place, report
        if config.compute.compile:
            require_compiler("compute.compile", place.device.type)
        dataset = ChainDataset(config.data)
        self.facts = backbone_facts(config.backbone)
        context = self.facts.llama.max_position_embeddings
        chosen = config.sentences
        self.sentences = Sentences(Chains.load(dataset, chosen, chosen.split), chosen, context, config.seed)
        self.held_out: Sentences | None = None
        if chosen.validation_split is not None:
            chains = Chains.load(dataset, chosen, chosen.validation_split)
            self.held_out = Sentences(chains, chosen, context, config.seed)
        self.steps = total_steps(self.sentences, config)
        model = load_backbone(
            self.facts, config.backbone, config.lora,
            dtype=resolved_dtype(config), device=place.device, seed=config.seed, recompute=config.compute.recompute,
        )  # fmt: skip
        if config.lora.path is not None:
            load_adapter_tensors(model, read_start(config.lora, self.facts.llama))
        if config.compute.compile:
            for layer in model.layers:
                layer.compile()
        self.flops_per_token = _flops_per_token(self.facts, self.sentences)
        self.update: Update
        if config.compute.deepspeed == "none":
            self.update = PlainUpdate(model, config.optimizer)
        else:
            self.update = ZeroUpdate(model, config.optimizer, read_settings(config.compute.deepspeed), place.device)
        self.step = self.cursor = self.saved = 0
        self.best: dict[str, float] | None = None
        self.writing: Future[None] | None = None

    def run(self) -> dict[str, Any] | None:
        """Train to the end, or to where a stop is asked for."""
        state = self._continue()
        self.curve = Curve(self.config.out, state.step if state else None) if self.place.rank == 0 else None
        if state is None:
            if self.place.rank == 0 and self.config.optimizer.steps is None and self.steps < _FEW_STEPS:
                self.place.notice(
                    f"steps in all: {self.steps}, of {self.config.optimizer.batch_tokens} tokens: few to learn by; "
                    "lower optimizer.batch_tokens (configs/train/nano.yaml has 8192), or give more epochs"
                )
            self._validate()
        with ThreadPoolExecutor(1, "assemble") as assembler, ThreadPoolExecutor(1, "write") as writer:
            self.writer = writer
            stopped = self._train(assembler)
            if self.writing:
                self.writing.result()
        if self.curve:
            self.curve.close()
        if dist.is_initialized():
            dist.barrier()
        if stopped and self.step < self.steps:
            return None
        return self._finish() if self.place.rank == 0 else {}

    def _continue(self) -> State | None:
        """Load the last checkpoint: worker 0 says which, so that all load the same."""
        state, torn = read_last_checkpoint(self.config)
        step = torch.tensor([state.step if state else 0], device=self.place.device)
        if dist.is_initialized():
            dist.broadcast(step, 0)
        if int(step) != (state.step if state else 0):
            raise ConfigError(
                f"{self.config.out}: worker {self.place.rank} does not see the checkpoint of step {int(step)}; "
                "--out must be storage that all nodes share"
            )
        if self.place.rank == 0:
            for name in torn:
                self.place.notice(f"checkpoint {name} is not whole and was passed over")
        if state is None:
            return None
        how = summation(self.config, self.place.world)
        changed = [f"{key} was {state.how.get(key)}, is {how[key]}" for key in how if how[key] != state.how.get(key)]
        if self.place.rank == 0:
            self.place.notice(f"continuing after step {state.step} of {self.steps}")
            if changed:
                self.place.notice(f"equal but for the order of sums, not to the bit: {'; '.join(changed)}")
        self.update.load(state.tensors, state.step)
        self.step, self.cursor, self.best, self.saved = state.step, state.cursor, state.best, state.step
        return state

    def _train(self, assembler: ThreadPoolExecutor) -> bool:
        """All steps that are left; gives whether a stop was asked for."""
        if self.step >= self.steps:
            return False
        upcoming = assembler.submit(self._assemble, self.cursor)
        saved_for_wish = False
        asked = time.monotonic()
        while self.step < self.steps:
            started = time.monotonic()
            work = upcoming.result()
            if self.step + 1 < self.steps:
                upcoming = assembler.submit(self._assemble, work.last)
            loss = self._tensor(0.0)
            for number, batch in enumerate(work.batches, 1):
                on_device = batch.to(self.place.device) if batch else None
                loss += self.update.accumulate(on_device, work.loss_tokens, number == len(work.batches))
            rate = learning_rate(self.config.optimizer, self.step + 1, self.steps)
            norm = self.update.step(rate)
            # Only worker 0 looks at its clock, and all hear of it with the loss.
            to_ask = self.place.rank == 0 and time.monotonic() - asked > _ASK_EVERY_S
            total, asking = self._sum(torch.stack((loss, self._tensor(float(to_ask)))))
            self.step, sentences, self.cursor = self.step + 1, work.last - self.cursor, work.last
            mean = total / work.loss_tokens
            if not math.isfinite(mean) or not math.isfinite(norm):
                raise ConfigError(
                    f"step {self.step}: loss {mean} and gradient norm {norm} are not finite; lower "
                    "optimizer.learning_rate, or use compute.dtype=float32"
                )
            self._record(
                {
                    "steps": self.steps,
                    "loss": mean,
                    "learning_rate": rate,
                    "gradient_norm": norm,
                    "sentences": sentences,
                }
                | {"tokens": work.tokens, "epoch": self.cursor / len(self.sentences)}
                | self._speed(work.tokens, time.monotonic() - started)
            )
            improved = self.step % self.config.validate_every_steps == 0 or self.step == self.steps
            improved = improved and self._validate()
            wish = Wish.GO_ON
            save_now = False
            if asking:
                asked = time.monotonic()
                wish = self.place.ask()
                save_now = wish is Wish.STOP or (wish is Wish.SAVE and not saved_for_wish)
                saved_for_wish = wish is Wish.SAVE
            due = self.step % self.config.checkpoints.every_steps == 0 or self.step == self.steps
            if due or improved or save_now:
                self._save()
            if save_now and self.writing:
                self.writing.result()
            if wish is Wish.STOP:
                return True
        return False

    def _assemble(self, first: int) -> _Step:
        """This worker's share of the step that begins at ``first``."""
        chosen, sentences = self.config.optimizer, self.sentences
        last = step_bounds(sentences, first, chosen.batch_tokens)
        if chosen.steps is None:
            last = min(last, _end(sentences, self.config))
        place = self.place
        batches = micro_batches(sentences, first, last, place.rank, place.world, chosen.micro_batch_tokens)
        tokens = sum(sentences.tokens(index) for index in range(first, last))
        return _Step(last, batches, loss_tokens(sentences, first, last), tokens)

    def _validate(self) -> bool:
        """Record loss and answer perplexity on the validation split; gives whether this is the best so far."""
        if self.held_out is None:
            return False
        place, count = self.place, min(self.config.validation_sentences, len(self.held_out))
        micro_tokens = self.config.optimizer.micro_batch_tokens
        sums = torch.zeros(3, device=place.device, dtype=torch.float64)  # loss, loss of answers, tokens of answers
        for batch in micro_batches(self.held_out, 0, count, place.rank, place.world, micro_tokens):
            on_device = batch.to(place.device) if batch else None
            each = self.update.evaluate(on_device).double()
            if on_device is not None:
                answer = answer_positions(on_device, self.held_out.chains.tokens_per_image)
                sums += torch.stack((each.sum(), each[answer].sum(), answer.sum().double()))
        loss, answer_loss, answer_tokens = self._sum(sums)
        mean = loss / loss_tokens(self.held_out, 0, count)
        record = {"validation_loss": mean, "answer_perplexity": math.exp(answer_loss / answer_tokens)}
        self._record(record)
        self.report({"step": self.step, **record})
        if self.step == 0 or (self.best is not None and self.best["validation_loss"] <= mean):
            return False  # an adapter that is all zero is none
        self.best = {"step": self.step, "validation_loss": mean}
        return True

    def _save(self) -> None:
        """Copy the state, and have it written while training goes on."""
        if self.saved == self.step:
            return
        self.saved = self.step
        tensors = self.update.tensors()
        if self.place.rank != 0 or self.curve is None:
            return
        if self.writing:
            self.writing.result()  # one at a time; also where its errors come out
        self.curve.flush()
        how = summation(self.config, self.place.world)
        state = State(self.step, self.cursor, tensors, self.best, how)
        self.writing = self.writer.submit(self._write, state)

    def _write(self, state: State) -> None:
        with torch.device("meta"):
            lora = Lora(self.config.lora.rank, self.config.lora.alpha, self.config.lora.targets)
            model = Lvm(self.facts.llama, lora)
        model.load_state_dict(dict(state.tensors), strict=False, assign=True)
        write_checkpoint(self.config, state, adapter_files(model, self.config.backbone.path or "nano"))

    def _finish(self) -> dict[str, Any]:
        """Write the adapter and the figures of the run."""
        chosen = int(self.best["step"]) if self.best else self.steps
        adapter = write_adapter(self.config, chosen)
        result = {"adapter": adapter, "adapter_step": chosen, **figures(read_records(self.curve.path))}  # type: ignore[union-attr]
        storage.write_json(storage.join(self.config.out, "_result.json"), result)
        return result

    def _sum(self, values: Tensor) -> list[float]:
        """``values`` summed over the workers."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return [float(value) for value in values.cpu()]

    def _record(self, record: dict[str, Any]) -> None:
        if self.curve:
            self.curve.add({"step": self.step, **record})

    def _tensor(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.place.device, dtype=torch.float64)

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """What a step of ``tokens`` in ``seconds`` says of the hardware; the only figures that differ between runs."""
        rate = tokens / seconds
        if self.place.device.type != "cuda":
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {"seconds": seconds, "tokens_per_s": rate, "memory_bytes": memory}
        found = {"seconds": seconds, "tokens_per_s": rate, "memory_bytes": torch.cuda.max_memory_allocated()}
        peak = peak_flops(torch.cuda.get_device_name(self.place.device))
        if peak is not None:
            found["utilisation"] = rate * self.flops_per_token / (peak * self.place.world)
        return found


def answer_positions(batch: Batch, tokens_per_image: int) -> Tensor:
    """Which of ``batch.positions`` predict a token of an answer, the last picture of a sentence: bool [P]."""
    ends = torch.tensor(batch.lengths, device=batch.ids.device).cumsum(0)
    end = ends[torch.searchsorted(ends, batch.positions, right=True)]
    return batch.positions + 1 >= end - tokens_per_image


def figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the curve says of a run: its last and best values, and the mean speed."""
    steps = [record for record in records if "loss" in record]
    checks = [record for record in records if "validation_loss" in record]
    seconds = sum(record["seconds"] for record in steps)
    found: dict[str, Any] = {
        "steps": steps[-1]["step"],
        "tokens": sum(record["tokens"] for record in steps),
        "sentences": sum(record["sentences"] for record in steps),
        "epochs": steps[-1]["epoch"],
        "loss": steps[-1]["loss"],
        "seconds": seconds,
        "tokens_per_s": sum(record["tokens"] for record in steps) / seconds,
        "memory_bytes": max(record["memory_bytes"] for record in steps),
    }
    if checks:
        best = min(checks[1:] or checks, key=lambda record: float(record["validation_loss"]))
        found |= {
            "validation_loss_before": checks[0]["validation_loss"],
            "validation_loss": best["validation_loss"],
            "answer_perplexity_before": checks[0]["answer_perplexity"],
            "answer_perplexity": best["answer_perplexity"],
        }
    return found


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by the ``name`` CUDA gives; None when it is not known."""
    found = [peak for part, peak in _PEAK_FLOPS.items() if part in name.replace("-", " ").split()]
    return found[0] if found else None


def _flops_per_token(facts: BackboneFacts, sentences: Sentences) -> float:
    """Forward 2N, and backward through frozen weights 2N more, plus causal attention (PaLM, appendix B, halved)."""
    llama = facts.llama
    used = parameters(llama) - llama.vocab_size * llama.hidden_size  # looking up an embedding costs nothing
    mean = sum(sentences.tokens(index) for index in range(len(sentences))) / len(sentences)
    attention = 2 * llama.num_hidden_layers * llama.hidden_size * mean  # scores and mixing, half of them masked
    return 4.0 * used + 3.0 * attention


def _end(sentences: Sentences, config: TrainConfig) -> int:
    """Sentences of the whole run, where epochs say how long it is; at least one."""
    return max(1, round(config.optimizer.epochs * len(sentences)))
