"""Tokens a second and peak memory of training: covray's loop against Hugging Face Trainer + PEFT.

    python benchmarks/train.py
    python benchmarks/train.py --data CHAINS --dtype bfloat16 --result benchmarks/results/train.md
    python benchmarks/train.py --scale 7b --dtype bfloat16 --batch-tokens 65536 --micro-tokens 8192      # a GPU

Both train the same LoRA (rank 32, alpha 64, all projections, same first values) on the same frozen backbone, the same
sentences in the same steps and micro-batches, with AdamW at a constant rate and all threads: their losses must agree.
Each run is a process of its own, and the two take turns. The first step, which warms up, is not counted. The data are
random tokens unless ``--data`` names a dataset; the backbone is random unless ``--backbone`` names a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import write_result
from sentences import SHAPES, write_dataset

from covray.chains.dataset import ChainDataset
from covray.chains.loading import Chains
from covray.chains.sentences import Sentences, step_bounds
from covray.config import TrainConfig
from covray.models.lvm.adapter import save_adapter
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.scales import SCALES, llama_config
from covray.training.run import train
from covray.training.worker import WorkerContext

LORA_SEED = 0


def run_covray(config: TrainConfig, scratch: Path) -> dict[str, Any]:
    """The loop behind ``covray train``, in this process."""
    train(config, WorkerContext(device=torch.device(config.compute.device)))
    records = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    return {
        "losses": [record["loss"] for record in steps],
        "seconds": [record["seconds"] for record in steps],
        "tokens": [record["tokens"] for record in steps],
    }


def run_peer(config: TrainConfig, scratch: Path) -> dict[str, Any]:
    """Hugging Face Trainer + PEFT, as its documentation has it."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    half = config.compute.dtype == "bfloat16"
    facts = backbone_facts(config.backbone)
    chosen = config.sentences
    chains = Chains.load(ChainDataset(config.data), chosen, chosen.split)
    sentences = Sentences(chains, chosen, facts.llama.max_position_embeddings, config.seed)
    length, optimizer = sentences.tokens(0), config.optimizer
    per_step = step_bounds(sentences, 0, optimizer.batch_tokens)
    per_micro = max(1, optimizer.micro_batch_tokens // length)
    assert optimizer.steps is not None
    assert per_step % per_micro == 0, "a Trainer's micro-batches are all of one size: choose tokens that divide"
    rows = [torch.from_numpy(sentences.sentence(i).ids.astype(np.int64)) for i in range(per_step * optimizer.steps)]
    model = LlamaForCausalLM.from_pretrained(
        config.backbone.path, dtype=torch.bfloat16 if half else torch.float32, attn_implementation="sdpa"
    )
    model = PeftModel.from_pretrained(model, str(scratch / "adapter"), is_trainable=True)

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012
        losses: list[float] = []  # noqa: RUF012
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.monotonic() - self.started)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        per_device_train_batch_size=per_micro,
        gradient_accumulation_steps=per_step // per_micro,
        max_steps=optimizer.steps,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip,
        bf16=half,
        use_cpu=config.compute.device == "cpu",
        train_sampling_strategy="sequential",
        gradient_checkpointing=config.compute.recompute,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[clock]).train()
    return {"losses": clock.losses, "seconds": clock.seconds, "tokens": [per_step * length] * len(clock.seconds)}


CONTENDERS = {"covray": run_covray, "Trainer + PEFT": run_peer}


def in_process_of_its_own(name: str, config: TrainConfig, scratch: Path, threads: int) -> dict[str, Any]:
    """Run one contender and return what it measured."""
    spec = {"name": name, "config": config.model_dump(mode="json"), "scratch": str(scratch), "threads": threads}
    answer = scratch / "answer.json"
    command = [sys.executable, __file__, "--child", json.dumps(spec), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def child(spec: dict[str, Any], answer: Path) -> None:
    """The process of one contender."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(spec["threads"])
    config = TrainConfig.model_validate(spec["config"])
    found = CONTENDERS[spec["name"]](config, Path(spec["scratch"]))
    if torch.cuda.is_available():
        found["memory"] = torch.cuda.max_memory_allocated()
    else:
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.write_text(json.dumps(found))


def prepare(options: argparse.Namespace, scratch: Path) -> TrainConfig:
    """Data, backbone and first adapter, and the configuration of the run."""
    shape = SHAPES[0] if options.scale == "nano" else SHAPES[1]
    data = options.data
    if data is None:
        data = str(scratch / "chains")
        write_dataset(data, shape, 256, 64)
    backbone = options.backbone
    if backbone is None:
        from transformers import LlamaForCausalLM

        backbone = str(scratch / "backbone")
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = LlamaForCausalLM._from_config(llama_config(options.scale), dtype=torch.bfloat16)
        model.save_pretrained(backbone)
        del model
    config = TrainConfig.model_validate(
        {
            "data": data,
            "out": str(scratch / "run"),
            "backbone": {"scale": options.scale, "path": backbone},
            "sentences": {
                "lengths": [options.length], "pairs": [options.pairs], "method": options.method,
                "validation_split": None,
            },
            "optimizer": {
                "learning_rate": 2e-4, "warmup": 0.0, "final": 1.0, "steps": options.steps,
                "batch_tokens": options.batch_tokens, "micro_batch_tokens": options.micro_tokens,
            },
            "compute": {
                "device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": options.dtype,
                "deepspeed": "none", "recompute": options.recompute, "compile": options.compile,
            },
            "checkpoints": {"every_steps": 10_000}, "tracking": {"uri": "none"}, "seed": LORA_SEED,
        }
    )  # fmt: skip
    facts = backbone_facts(config.backbone)
    model = load_backbone(
        facts, config.backbone, config.lora, dtype=torch.bfloat16, device=torch.device("cpu"), seed=LORA_SEED
    )
    save_adapter(model, str(scratch / "adapter"), backbone)
    return config


def main() -> None:
    """Measure, print, and write the result file."""
    if "--child" in sys.argv:
        child(json.loads(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="nano", choices=SCALES)
    parser.add_argument("--backbone", help="LlamaForCausalLM folder; by default random weights of the scale")
    parser.add_argument("--data", help="dataset of chains; by default random tokens")
    parser.add_argument("--method", default="diffusion", choices=("none", "linear", "diffusion"))
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--recompute", action="store_true", help="both compute activations again")
    parser.add_argument("--compile", action="store_true", help="covray compiles its layers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        config = prepare(options, base)
        for repetition in range(options.repetitions):
            for name in CONTENDERS:
                fresh = config.model_copy(update={"out": str(base / f"run{repetition}")})
                runs[name].append(in_process_of_its_own(name, fresh, base, options.threads))
    lines = report(runs, options)
    print("\n".join(lines))
    if options.result:
        packages = ("torch", "transformers", "peft", "accelerate", "numpy")
        write_result(options.result, "Training against Trainer + PEFT", packages, lines)


def report(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    """The table, and how far the losses are apart."""
    speeds = {name: [sum(run["tokens"][1:]) / sum(run["seconds"][1:]) for run in found] for name, found in runs.items()}
    peer = statistics.median(speeds["Trainer + PEFT"])
    lines = ["| | tokens/s, median (range) | ratio | peak memory, MiB |", "|---|---|---|---|"]
    for name, values in speeds.items():
        middle, memory = statistics.median(values), max(run["memory"] for run in runs[name]) / 2**20
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        lines.append(f"| {name} | {middle:,.0f} ({spread}) | {middle / peer:.2f} | {memory:,.0f} |")
    ours, theirs = (np.array(found[0]["losses"]) for found in runs.values())
    sentence = options.length * (options.pairs + 1)
    whose = "the GPU" if torch.cuda.is_available() else "the process"
    return [
        *lines,
        "",
        f"{options.scale}, {options.dtype}, {sentence} pictures a sentence, {options.steps} steps of "
        f"{options.batch_tokens} tokens in micro-batches of {options.micro_tokens}, {options.threads} threads, "
        f"{options.repetitions} repetitions in turn. Memory is {whose}'s.",
        "",
        f"Losses of covray: {', '.join(f'{loss:.4f}' for loss in ours)}; largest difference to the Trainer's "
        f"{np.abs(ours - theirs).max():.1e}.",
    ]


if __name__ == "__main__":
    main()
