"""One worker's training, whatever the objective: steps, metrics, checkpoints, signals.

    batches of a step (ahead, in a thread) -> gradients of its micro-batches -> sum over workers -> AdamW -> metrics
    every so often: validate, and write a checkpoint from a copy (in a thread)

The trainer does not know who started it: on one process it is called as it is, on many each has a process group
(torch's). What a step computes depends on the configuration and the step only; the number of workers changes the order
in which floats are added, and nothing else.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol

import torch

from covray.config import AdamWConfig, CheckpointsConfig
from covray.config.section import JsonObject
from covray.config.think import AlignmentConfig
from covray.errors import ConfigError
from covray.training.checkpoints import Checkpoints, State
from covray.training.metrics_log import Metrics, MetricsLog
from covray.training.objectives.base import B, Objective, StepBatches
from covray.training.optimizers import Update, learning_rate
from covray.training.records import BestValidation, TrainResult
from covray.training.worker import Signal, WorkerContext

_FEW_STEPS = 20
"""The user is told of a training of fewer steps: the paper's batch is for the paper's 70,000 pairs."""
_POLL_SIGNAL_EVERY_S = 2.0
_PEAK_FLOPS = {  # dense bfloat16, data sheets
    "H200": 989e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "B200": 2250e12,
}  # fmt: skip


class TrainerConfig(Protocol):
    """What the trainer reads of a configuration, whatever the objective."""

    @property
    def out(self) -> str:
        """The run folder."""

    @property
    def optimizer(self) -> AdamWConfig | AlignmentConfig:
        """The optimizer and the length of the training."""

    @property
    def checkpoints(self) -> CheckpointsConfig:
        """When a checkpoint is written."""

    @property
    def validate_every_steps(self) -> int:
        """Steps between two validations."""

    def identity(self) -> JsonObject:
        """Return what decides the losses."""


class Trainer(Generic[B]):
    """The training of one worker, from the last checkpoint of its run to the end."""

    def __init__(
        self,
        config: TrainerConfig,
        objective: Objective[B],
        update: Update[B],
        worker: WorkerContext,
        *,
        numerics: JsonObject,
        report: Callable[[Metrics], None] = lambda metrics: None,
    ):
        """Set up the training; nothing is read or written yet.

        Args:
            config: The configuration.
            objective: What is learned.
            update: The optimizer of the objective's parameters.
            worker: This worker.
            numerics: The settings that decide the order in which floats are added; a change is allowed, and logged.
            report: Called with the metrics of every validation, on every worker.
        """
        self._config, self._objective, self._update, self._worker = config, objective, update, worker
        self._numerics, self._report = dict(numerics), report
        self._checkpoints = Checkpoints(config.out, config.identity(), config.checkpoints.keep)
        self._metrics: MetricsLog | None = None  # of worker 0
        self._step = self._cursor = self._saved_step = 0
        self._polled = 0.0  # when the signal was asked for
        self._best: BestValidation | None = None
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] | None = None

    def run(self) -> TrainResult | None:
        """Train to the end, or until the signal to stop.

        Returns:
            The figures of the finished training. None after the signal to stop, and on workers other than 0.

        Raises:
            CovrayError: The checkpoint is of another configuration, or the loss is not finite.
        """
        with self._writer:
            # All workers load the checkpoint before the first of them opens the log.
            continues = self._load_last_checkpoint()
            if self._worker.is_first:
                kept_until = None
                if continues:
                    kept_until = self._step
                self._metrics = MetricsLog(self._config.out, kept_until)
            # A validation before the first step says what training gains.
            if not continues:
                self._log_few_steps()
                self._validate()
            self._train()
            self._wait_for_checkpoint()
        if self._metrics is not None:
            self._metrics.close()
        self._worker.wait_for_all()
        # Stopped by a signal: there is no result yet.
        if self._step < self._objective.steps or self._metrics is None:
            return None
        return self._finish(self._metrics)

    def _load_last_checkpoint(self) -> bool:
        """Load the last checkpoint, the same on all workers; return whether there is one."""
        worker = self._worker
        state, corrupt = self._checkpoints.read_last()
        step = 0
        if state is not None:
            step = state.step
        # Storage that a node does not share would have this worker begin elsewhere than the others.
        step_of_first = worker.broadcast(step)
        if step_of_first != step:
            raise ConfigError(
                f"{self._config.out}: worker {worker.rank} does not see the checkpoint of step {step_of_first}; "
                "--out must be storage that all nodes share"
            )
        if worker.is_first:
            for name in corrupt:
                worker.log(f"checkpoint {name} is incomplete or corrupt and is skipped")
        if state is None:
            return False
        if worker.is_first:
            self._log_continuing(state)
        self._update.load(state.tensors, state.step)
        if self._objective.rewriter is not None:
            self._objective.rewriter.load(state.tensors)
        self._step = self._saved_step = state.step
        self._cursor, self._best = state.cursor, state.best
        return True

    def _train(self) -> None:
        """Take all steps that are left, or those up to the signal to stop."""
        steps = self._objective.steps
        if self._step >= steps:
            return
        self._polled = time.monotonic()
        saved_on_signal = False
        with ThreadPoolExecutor(1, "assemble") as assembler:
            upcoming: Future[StepBatches[B]] | None = None
            while self._step < steps:
                started = time.monotonic()
                if upcoming is None:
                    self._rewrite_if_due()
                    upcoming = assembler.submit(self._objective.batches, self._cursor, self._worker)
                work = upcoming.result()
                upcoming = None
                # What the model writes itself, it writes after the step before: such a step is not assembled ahead.
                if self._step + 1 < steps and not self._is_rewriting_due(work.next_cursor):
                    upcoming = assembler.submit(self._objective.batches, work.next_cursor, self._worker)
                poll = self._take_step(work, started)
                is_last = self._step == steps
                validate = is_last or self._step % self._config.validate_every_steps == 0
                is_best = validate and self._validate()
                signal = Signal.CONTINUE
                save_on_signal = False
                if poll:
                    self._polled = time.monotonic()
                    signal = self._worker.poll_signal()
                    # A warning that a machine goes away stands for minutes: one checkpoint answers it.
                    save_on_signal = signal is Signal.STOP or (signal is Signal.SAVE and not saved_on_signal)
                    saved_on_signal = signal is Signal.SAVE
                if is_last or is_best or save_on_signal or self._step % self._config.checkpoints.every_steps == 0:
                    self._save()
                if save_on_signal:
                    self._wait_for_checkpoint()
                if signal is Signal.STOP:
                    return

    def _is_rewriting_due(self, cursor: int) -> bool:
        """Return whether the model must write data before the batches at ``cursor`` are assembled."""
        rewriter = self._objective.rewriter
        return rewriter is not None and rewriter.is_due(cursor)

    def _rewrite_if_due(self) -> None:
        """Let the model write the data of the next steps, if that is due."""
        rewriter = self._objective.rewriter
        if rewriter is not None and rewriter.is_due(self._cursor):
            rewriter.rewrite(self._cursor, self._worker)

    def _take_step(self, work: StepBatches[B], started: float) -> bool:
        """Take the step that began at ``started``, and record its metrics; return whether to poll for a signal."""
        device = self._worker.device
        # In float64: how the step is cut into micro-batches must not show in the loss.
        loss = torch.zeros((), device=device, dtype=torch.float64)
        for number, batch in enumerate(work.batches, 1):
            on_device = None  # no batch is left for this worker, but it takes part in the collectives
            if batch is not None:
                on_device = batch.to(device)
            loss += self._update.accumulate(on_device, work.loss_tokens, number == len(work.batches))
        rate = learning_rate(self._config.optimizer, self._step + 1, self._objective.steps)
        norm = self._update.step(rate)
        # Worker 0 decides by its clock whether to poll, and all workers hear of it together with the loss.
        poll_is_due = self._worker.is_first and time.monotonic() - self._polled > _POLL_SIGNAL_EVERY_S
        flag = torch.tensor(float(poll_is_due), device=device, dtype=torch.float64)
        # One collective for both: the loss and the poll.
        total, poll = self._worker.sum(torch.stack((loss, flag)))
        self._step += 1
        self._cursor = work.next_cursor
        mean = total / work.loss_tokens
        # All workers have the same sums, so that all of them stop here.
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise ConfigError(
                f"step {self._step}: loss {mean} and gradient norm {norm} are not finite; lower "
                "optimizer.learning_rate, or use compute.dtype=float32"
            )
        metrics = {
            "steps": self._objective.steps,
            "loss": mean,
            "learning_rate": rate,
            "gradient_norm": norm,
            "sentences": work.sentences,
            "tokens": work.tokens,
            "epoch": work.epoch,
        }
        self._record(metrics | self._speed(work.tokens, time.monotonic() - started))
        return bool(poll)

    def _validate(self) -> bool:
        """Validate and record the metrics; return whether this is the best validation so far."""
        metrics = self._objective.validate(self._update.evaluate, self._worker)
        if metrics is None:
            return False
        self._record(metrics)
        self._report({"step": self._step, **metrics})
        if self._step == 0:
            return False  # nothing is learned yet
        loss = metrics["validation_loss"]
        if self._best is not None and self._best.validation_loss <= loss:
            return False
        self._best = BestValidation(step=self._step, validation_loss=loss)
        return True

    def _save(self) -> None:
        """Copy the state, and let a thread write it while training goes on."""
        if self._saved_step == self._step:
            return
        self._saved_step = self._step
        # On all workers, though only the first writes: under ZeRO they gather the tensors together.
        tensors = self._update.tensors()
        if self._objective.rewriter is not None:
            tensors |= self._objective.rewriter.tensors()
        if self._metrics is None:
            return
        self._wait_for_checkpoint()
        # Before the checkpoint: the steps up to it are never taken again, so their records must be in the file.
        self._metrics.flush()
        state = State(self._step, self._cursor, tensors, self._best, self._numerics)
        self._writing = self._writer.submit(self._write_checkpoint, state)

    def _write_checkpoint(self, state: State) -> None:
        self._checkpoints.write(state, self._objective.export(state.tensors))

    def _wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is written. Raises what its writing raised."""
        if self._writing is not None:
            self._writing.result()

    def _finish(self, log: MetricsLog) -> TrainResult:
        """Write the result and the figures of the run."""
        # No step is known to be best without validation, so the last one is exported.
        step = self._objective.steps
        if self._best is not None:
            step = self._best.step
        adapter = self._checkpoints.export(step)
        result = summarize(log.records, adapter, step)
        result.write(self._config.out)
        return result

    def _record(self, metrics: Metrics) -> None:
        if self._metrics is not None:
            self._metrics.add({"step": self._step, **metrics})

    def _speed(self, tokens: int, seconds: float) -> Metrics:
        """Return what a step of ``tokens`` says of the hardware; only these figures differ between equal runs."""
        device = self._worker.device
        speed = {"seconds": seconds, "tokens_per_s": tokens / seconds}
        if device.type != "cuda":
            peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            unit_bytes = 1024  # Linux counts in KiB, macOS in bytes
            if sys.platform == "darwin":
                unit_bytes = 1
            return speed | {"memory_bytes": peak_memory * unit_bytes}
        speed["memory_bytes"] = torch.cuda.max_memory_allocated()
        peak = peak_flops(torch.cuda.get_device_name(device))
        if peak is not None:
            achieved = speed["tokens_per_s"] * self._objective.flops_per_token
            speed["utilisation"] = achieved / (peak * self._worker.world_size)
        return speed

    def _log_few_steps(self) -> None:
        """Tell the user when so few steps are taken that little can be learned."""
        chosen, steps = self._config.optimizer, self._objective.steps
        if self._worker.is_first and chosen.steps is None and steps < _FEW_STEPS:
            self._worker.log(
                f"the training takes {steps} steps of {chosen.step_size}, too few to learn much; lower "
                f"{chosen.for_more_steps}, or give more epochs"
            )

    def _log_continuing(self, state: State) -> None:
        """Tell the user where training continues, and which settings of the arithmetic have changed."""
        self._worker.log(f"continuing after step {state.step} of {self._objective.steps}")
        changed = []
        for key, value in self._numerics.items():
            if value != state.numerics.get(key):
                changed.append(f"{key} was {state.numerics.get(key)}, is {value}")
        if changed:
            self._worker.log(
                "the losses will equal those of an uninterrupted run up to rounding, not to the bit: "
                + "; ".join(changed)
            )


def summarize(records: list[Metrics], adapter: str, adapter_step: int) -> TrainResult:
    """Return the figures of a run from its metrics: last and best values, and the mean speed.

    Args:
        records: The metrics of all steps and validations.
        adapter: The folder of the adapter.
        adapter_step: The step that the adapter is of.
    """
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    seconds = sum(record["seconds"] for record in steps)
    tokens = sum(record["tokens"] for record in steps)
    # Figures of validation are absent where nothing was validated.
    validated: dict[str, float] = {}
    if validations:
        # The first is from before any step; a run that took no step has only that.
        after_a_step = validations[1:] or validations
        best = min(after_a_step, key=lambda record: record["validation_loss"])
        for key in ("validation_loss", "answer_perplexity"):
            if key in best:
                validated[f"{key}_before"] = validations[0][key]
                validated[key] = best[key]
    return TrainResult(
        adapter=adapter,
        adapter_step=adapter_step,
        steps=int(steps[-1]["step"]),
        tokens=int(tokens),
        sentences=int(sum(record["sentences"] for record in steps)),
        epochs=steps[-1]["epoch"],
        loss=steps[-1]["loss"],
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        memory_bytes=int(max(record["memory_bytes"] for record in steps)),
        **validated,
    )


def peak_flops(name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU by the name that CUDA gives it; None for an unknown one."""
    words = name.replace("-", " ").split()
    for model, peak in _PEAK_FLOPS.items():
        if model in words:
            return peak
    return None
