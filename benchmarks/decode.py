"""Tokens a second of decoding: covray's decoder against ``transformers.generate``, with a dynamic and a static cache.

    python benchmarks/decode.py
    python benchmarks/decode.py --backbone nano --result benchmarks/results/decode.md
    python benchmarks/decode.py --scale 7b --dtype bfloat16 --tokens-per-image 256 --repetitions 2       # a GPU

All decode greedily, with all threads, on the same weights: three example chains of four pictures that the batch shares,
a query picture a row, three pictures to write. Reading the prompt counts. The contenders take turns, after a warm-up of
each; their tokens must agree but where the two likeliest tokens are closer than float arithmetic tells apart.
The backbone is random unless ``--backbone`` names one. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import write_result
from transformers import LlamaForCausalLM

from covray.config import BackboneConfig
from covray.models.lvm.backbone import BackboneFacts, backbone_facts, load_backbone, write_backbone
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.model import Lvm
from covray.models.lvm.scales import SCALES

LENGTH, EXAMPLES = 4, 3
IMAGES = LENGTH - 1

Contender = Callable[[np.ndarray, np.ndarray], np.ndarray]


def contenders(model: Lvm, facts: BackboneFacts, folder: Path, batch: int, tokens: int) -> dict[str, Contender]:
    """By name, functions of prompt [P] and queries [B, Q] that give the tokens written, [B, steps]."""
    decoder = LvmDecoder(model, facts.codes, tokens, batch)
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    peer: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    special = list(range(facts.codes, facts.llama.vocab_size))

    def covray(prompt: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return decoder.decode(prompt, queries, IMAGES).ids.reshape(len(queries), -1)

    def generate(cache: str) -> Contender:
        def run(prompt: np.ndarray, queries: np.ndarray) -> np.ndarray:
            whole = np.concatenate([np.repeat(prompt[None], len(queries), 0), queries], 1).astype(np.int64)
            ids = torch.from_numpy(whole).to(device)
            written: np.ndarray = peer.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
                pad_token_id=facts.llama.pad_token_id, suppress_tokens=special, max_new_tokens=IMAGES * tokens,
                cache_implementation=cache,
            )[:, ids.shape[1] :].cpu().numpy()  # fmt: skip
            return written

        return run

    return {"covray": covray, "generate, dynamic": generate("dynamic"), "generate, static": generate("static")}


def differences(model: Lvm, prompt: np.ndarray, queries: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """For every row that differs: where first, and how far apart the two tokens' logits are there."""
    found = []
    for row in np.nonzero((ours != theirs).any(1))[0]:
        step = int(np.argmax(ours[row] != theirs[row]))
        before = np.concatenate([prompt, queries[row], ours[row, :step]]).astype(np.int64)
        with torch.inference_mode():
            ids = torch.from_numpy(before).to(model.embed.weight.device)
            logits = model.logits(ids, (len(ids),))[-1].float().cpu().numpy()
        gap = abs(float(logits[ours[row, step]] - logits[theirs[row, step]]))
        found.append(f"row {row} from token {step}, where the two logits are {gap:.1e} apart")
    return found


def measure(options: argparse.Namespace, batch: int, model: Lvm, facts: BackboneFacts, folder: Path) -> list[str]:
    """The table's lines of one batch size, and what differed."""
    generator = np.random.default_rng(0)
    tokens = options.tokens_per_image
    prompt = generator.integers(0, facts.codes, EXAMPLES * LENGTH * tokens, dtype=np.uint16)
    queries = generator.integers(0, facts.codes, (batch, tokens), dtype=np.uint16)
    runs = contenders(model, facts, folder, batch, tokens)
    written = {name: run(prompt, queries) for name, run in runs.items()}  # the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repetitions):
        for name, run in runs.items():
            started = time.perf_counter()
            run(prompt, queries)
            seconds[name].append(time.perf_counter() - started)
    made = batch * IMAGES * tokens
    ours = made / statistics.median(seconds["covray"])
    lines, notes = [], []
    for name, taken in seconds.items():
        speed = made / statistics.median(taken)
        spread = f"{made / max(taken):,.0f} to {made / min(taken):,.0f}"
        equal = float((written[name] == written["covray"]).mean())
        lines.append(f"| {batch} | {name} | {speed:,.0f} ({spread}) | {ours / speed:.2f} | {equal:.2%} |")
        for text in differences(model, prompt, queries, written["covray"], written[name]):
            notes.append(f"Batch {batch}, covray against {name}: {text}.")
    return [*lines, *notes]


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="nano", choices=SCALES)
    parser.add_argument("--backbone", help="nano or a LlamaForCausalLM folder; by default random weights of the scale")
    parser.add_argument("--tokens-per-image", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = "custom" if options.backbone else options.scale
    init = "pretrained" if options.backbone else "random"
    config = BackboneConfig.model_validate({"scale": scale, "path": options.backbone, "init": init})
    facts = backbone_facts(config)
    dtype = getattr(torch, options.dtype)
    model = load_backbone(facts, config, None, dtype=dtype, device=device, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = facts.folder or Path(scratch)
        if facts.folder is None:
            write_backbone(folder, facts, model.backbone_tensors().__getitem__, dtype)
        found = [line for batch in options.batches for line in measure(options, batch, model, facts, folder)]
    prompt = EXAMPLES * LENGTH * options.tokens_per_image
    lines = [
        "| batch | | tokens/s, median (range) | covray is x times | tokens as covray's |",
        "|---|---|---|---|---|",
        *(line for line in found if line.startswith("|")),
        "",
        f"{options.backbone or options.scale}, {options.dtype}, a shared prompt of {prompt} tokens, a query of "
        f"{options.tokens_per_image}, {IMAGES * options.tokens_per_image} written a row, {options.threads} threads, "
        f"{options.repetitions} repetitions in turn.",
        *(f"\n{line}" for line in found if not line.startswith("|")),
    ]
    print("\n".join(lines))
    if options.result:
        packages = ("torch", "transformers", "numpy")
        write_result(options.result, "Decoding against transformers.generate", packages, lines)


if __name__ == "__main__":
    main()
