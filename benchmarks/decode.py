"""Tokens a second of decoding: covray's decoders against each other and ``transformers.generate``.

    python benchmarks/decode.py --backbone nano --pictures scenes --result benchmarks/results/decode.md
    python benchmarks/decode.py --scale 7b --dtype bfloat16 --tokens-per-image 256 --repetitions 2       # a GPU

All decode greedily, with all threads, on the same weights: three example chains of four pictures that the batch shares,
a query picture a row, three pictures to write. Reading the prompt counts. The contenders take turns, after a warm-up of
each. Tokens of all but block diffusion must agree with the sequential decoder's but where the two likeliest tokens are
closer than float arithmetic tells apart.

How many tokens Jacobi decoding makes final in a pass depends on the pictures: ``--pictures scenes`` takes rendered
scenes and their depth, as tokens of the nano tokenizer; by default codes are random. Block diffusion runs with an
adapter that has learned nothing, as its speed does not depend on what it writes. That of speculative decoding does:
``--drafts`` names the adapter of a run with drafts, whose tokens it verifies; without it drafts have learned nothing.
The backbone is random unless ``--backbone`` names one. On a machine that also does other work measure by ``--clock
cpu --threads 1``: the CPU time of this process is nearly what a quiet machine would take, and the ratios are of one
run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import write_result
from transformers import LlamaForCausalLM

from covray.config import BackboneConfig, EngineConfig, SamplingConfig, TokenizerConfig
from covray.models.lvm.adapter import adapter_tensors, load_adapter_tensors, read_adapter
from covray.models.lvm.backbone import BackboneFacts, backbone_facts, load_backbone, write_backbone
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.decoding.requirements import require_draft
from covray.models.lvm.draft import Draft
from covray.models.lvm.draft_files import DRAFT_PREFIX
from covray.models.lvm.lora import TARGETS, Diffusion, Lora
from covray.models.lvm.model import Lvm
from covray.models.lvm.scales import SCALES
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.pairs.scenes.pairs import labelled, scene_seed
from covray.pairs.scenes.render import render_scene

LENGTH, EXAMPLES = 4, 3
IMAGES = LENGTH - 1
BASE = "sequential"

Contender = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Contenders:
    """Everyone who decodes, by name; each returns the tokens written, [B, steps]."""

    def __init__(self, model: Lvm, masked: Lvm, facts: BackboneFacts, folder: Path, batch: int, tokens: int):
        """Load the decoders.

        Args:
            model: The backbone, with a draft adapter.
            masked: The same with an adapter of block diffusion.
            facts: Of the backbone.
            folder: Its files, for transformers.
            batch: Rows.
            tokens: Of a picture.
        """
        self._facts, self._tokens = facts, tokens
        self._decoder = LvmDecoder(model, facts.codes, tokens, batch)
        self._blocks = LvmDecoder(masked, facts.codes, tokens, batch)
        self._device = model.embed.weight.device
        peer: Any = LlamaForCausalLM.from_pretrained(folder, dtype=model.embed.weight.dtype, attn_implementation="sdpa")
        self._peer = peer.to(self._device)

    @property
    def passes(self) -> int:
        """Passes of covray's decoders so far."""
        return self._decoder.passes + self._blocks.passes

    def by_name(self) -> dict[str, Contender]:
        """Return all contenders."""
        few, many = self._tokens // 8, self._tokens // 4
        return {
            BASE: self._ours(SamplingConfig(decoder="sequential")),
            "jacobi, window 8": self._ours(SamplingConfig(decoder="jacobi", window=8)),
            "jacobi, window 16": self._ours(SamplingConfig(decoder="jacobi", window=16)),
            "jacobi, window auto": self._ours(SamplingConfig(decoder="jacobi")),
            "speculative": self._ours(SamplingConfig(decoder="speculative")),
            "blocks of 8, 8 passes": self._ours(SamplingConfig(block=8)),
            "blocks of 8, 4 passes": self._ours(SamplingConfig(block=8, passes=4)),
            f"a picture a block, {many} passes": self._ours(SamplingConfig(block=self._tokens, passes=many)),
            f"a picture a block, {few} passes": self._ours(SamplingConfig(block=self._tokens, passes=few)),
            "a picture a block, 4 passes": self._ours(SamplingConfig(block=self._tokens, passes=4)),
            "generate, dynamic": self._generate("dynamic"),
            "generate, static": self._generate("static"),
        }

    def _ours(self, sampling: SamplingConfig) -> Contender:
        decoder = self._blocks if sampling.decoder is None else self._decoder

        def run(prompt: np.ndarray, queries: np.ndarray) -> np.ndarray:
            return decoder.decode(prompt, queries, IMAGES, sampling).ids.reshape(len(queries), -1)

        return run

    def _generate(self, cache: str) -> Contender:
        special = list(range(self._facts.codes, self._facts.llama.vocab_size))

        def run(prompt: np.ndarray, queries: np.ndarray) -> np.ndarray:
            whole = np.concatenate([np.repeat(prompt[None], len(queries), 0), queries], 1).astype(np.int64)
            ids = torch.from_numpy(whole).to(self._device)
            written: np.ndarray = self._peer.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
                pad_token_id=self._facts.llama.pad_token_id, suppress_tokens=special,
                max_new_tokens=IMAGES * self._tokens, cache_implementation=cache,
            )[:, ids.shape[1] :].cpu().numpy()  # fmt: skip
            return written

        return run


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


def sentences(options: argparse.Namespace, codes: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a prompt of three chains of four pictures, uint16 [P], and the queries, uint16 [batch, T]."""
    tokens = options.tokens_per_image
    if options.pictures == "random":
        generator = np.random.default_rng(0)
        prompt = generator.integers(0, codes, EXAMPLES * LENGTH * tokens, dtype=np.uint16)
        return prompt, generator.integers(0, codes, (batch, tokens), dtype=np.uint16)
    tokenizer = load_tokenizer(TokenizerConfig(), EngineConfig(threads=torch.get_num_threads()))
    size = tokenizer.size_px
    chains, queries = [], []
    for index in range(EXAMPLES + batch):
        view = render_scene(scene_seed(0, "test", index), size)[0]
        image, label = labelled(view, "depth", np.random.default_rng(index))
        if index >= EXAMPLES:
            queries.append(image)
            continue
        for step in range(LENGTH):  # a linear chain
            share = step / (LENGTH - 1)
            chains.append(np.rint((1 - share) * image + share * label).astype(np.uint8))
    return tokenizer.encode(np.stack(chains)).ravel(), tokenizer.encode(np.stack(queries))


def measure(
    options: argparse.Namespace, batch: int, models: tuple[Lvm, Lvm], facts: BackboneFacts, folder: Path
) -> list[str]:
    """Return the table's lines of one batch size, and what differed.

    Args:
        options: Of the command line.
        batch: Rows.
        models: The backbone, and the same with an adapter of block diffusion.
        facts: Of the backbone.
        folder: Its files.
    """
    prompt, queries = sentences(options, facts.codes, batch)
    contenders = Contenders(*models, facts, folder, batch, options.tokens_per_image)
    runs = {}
    for name, run in contenders.by_name().items():
        if name == BASE or any(part in name for part in options.contenders):
            runs[name] = run
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    written, passes = {}, {}
    for name, run in runs.items():  # the warm-up, in which auto also decides
        before = contenders.passes
        written[name] = run(prompt, queries)
        passes[name] = contenders.passes - before
    seconds: dict[str, list[float]] = {name: [] for name in written}
    for _ in range(options.repetitions):
        for name, run in runs.items():
            before = contenders.passes
            started = clock()
            run(prompt, queries)
            seconds[name].append(clock() - started)
            passes[name] = contenders.passes - before
    steps = IMAGES * options.tokens_per_image
    base = statistics.median(seconds[BASE])
    lines, notes = [], []
    for name, taken in seconds.items():
        speed = batch * steps / statistics.median(taken)
        a_pass = f"{steps / passes[name]:.2f}" if passes[name] else "1"
        equal = float((written[name] == written[BASE]).mean())
        ratio = base / statistics.median(taken)
        lines.append(f"| {batch} | {name} | {a_pass} | {speed:,.0f} | {ratio:.2f} | {equal:.2%} |")
        if "block" in name:
            continue
        for text in differences(models[0], prompt, queries, written[BASE], written[name]):
            notes.append(f"Batch {batch}, {BASE} against {name}: {text}.")
    return [*lines, *notes]


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="nano", choices=SCALES)
    parser.add_argument("--backbone", help="nano or a LlamaForCausalLM folder; by default random weights of the scale")
    parser.add_argument("--drafts", help="adapter folder of a run with drafts for the backbone; by default untrained")
    parser.add_argument("--pictures", default="random", choices=("random", "scenes"))
    parser.add_argument("--tokens-per-image", type=int, help="by default the backbone's, or 64")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--contenders", nargs="+", default=[""], help="parts of the names of those to measure")
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = "custom" if options.backbone else options.scale
    init = "pretrained" if options.backbone else "random"
    config = BackboneConfig.model_validate({"scale": scale, "path": options.backbone, "init": init})
    facts = backbone_facts(config)
    if options.tokens_per_image is None:
        options.tokens_per_image = facts.tokens_per_image or 64
    dtype = getattr(torch, options.dtype)
    drafting = Lora(1, 1.0, TARGETS, draft=Draft(32, 64.0, TARGETS, facts.codes + 1, 3))
    drafts: dict[str, torch.Tensor] = {}
    if options.drafts:
        stored, drafts = read_adapter(options.drafts)
        drafting = replace(drafting, draft=require_draft(stored.draft, options.drafts))
    model = load_backbone(facts, config, drafting, dtype=dtype, device=device, seed=0)
    own = adapter_tensors(model)  # the adapter itself changes nothing: all contenders decode with the backbone
    load_adapter_tensors(model, own | {name: drafts[name] for name in drafts if name.startswith(DRAFT_PREFIX)})
    lora = Lora(1, 1.0, TARGETS, Diffusion(facts.codes + 1, 8))
    masked = load_backbone(facts, config, lora, dtype=dtype, device=device, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = facts.folder or Path(scratch)
        if facts.folder is None:
            write_backbone(folder, facts, model.backbone_tensors().__getitem__, dtype)
        found = []
        for batch in options.batches:
            found += measure(options, batch, (model, masked), facts, folder)
    prompt = EXAMPLES * LENGTH * options.tokens_per_image
    lines = [
        "| batch | | tokens a pass | tokens/s, median | times sequential | tokens as sequential |",
        "|---|---|---|---|---|---|",
        *(line for line in found if line.startswith("|")),
        "",
        f"{options.backbone or options.scale}, {options.dtype}, {options.pictures} pictures, a shared prompt of "
        f"{prompt} tokens, a query of {options.tokens_per_image}, {IMAGES * options.tokens_per_image} written a row, "
        f"{options.threads} threads, {options.repetitions} repetitions in turn, seconds by the {options.clock} clock.",
        *(f"\n{line}" for line in found if not line.startswith("|")),
    ]
    print("\n".join(lines))
    if options.result:
        packages = ("torch", "transformers", "numpy")
        write_result(options.result, "Decoding, covray's decoders and transformers.generate", packages, lines)


if __name__ == "__main__":
    main()
