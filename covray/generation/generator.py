"""``covray generate``: example pairs and query pictures from files in, frames and answers out. Knows no ray.

examples --prior--> frames --tokenizer--> prompt; query --tokenizer--> tokens
prompt, query --LVM--> frames, answer --tokenizer--> pictures --task--> data
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from covray.chains.build import BlockBuilder
from covray.chains.dataset import ChainDataset, alphas_of
from covray.chains.prepare import prepare_block
from covray.config import (
    BackboneConfig,
    BuildConfig,
    GenerateConfig,
    LoraConfig,
    PriorConfig,
    TokenizerConfig,
    TrainConfig,
)
from covray.errors import ConfigError, DatasetError, PairError, WeightsError, one_line
from covray.io import storage
from covray.io.device import resolve_device
from covray.io.images import decode, encode_png, resize, square
from covray.models.lvm.adapter import WEIGHTS_FILE, load_adapter_tensors, read_adapter, read_run
from covray.models.lvm.backbone import BackboneFacts, backbone_facts, load_backbone
from covray.models.lvm.decoding.base import require_context
from covray.models.lvm.decoding.sequential import SequentialDecoder
from covray.models.tokenizer.vqgan import require_same_codebook
from covray.pairs.manifest import MANIFEST_SCHEMA, Pair, Picture
from covray.report.contact_sheets import draw_strip
from covray.seeds import seed_of
from covray.tasks import TASKS

RESULT_FILE = "generation.json"
_WITHOUT_TASK = "colorization"  # resized as photographs are, read as nothing but a picture


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Answer ``config.queries``; returns what is written to ``generation.json``.

    Every query gets a folder below ``config.out``, by the name of its file: ``strip.png`` (query, frames, answer),
    ``answer.png`` at the query's size, and by the task ``classes.png`` (class indices), ``depth_m.npy``,
    ``normals.npy``, ``edges.npy`` or ``keypoints.json``.
    A query's answer follows from the configuration, the seed, the examples and its own tokens, not from its neighbours.
    Raises CovrayError, where it can before any model is loaded.
    """
    _require_out(config.out)
    queries = [_picture("--query", path) for path in config.queries]
    examples = [_example(image, label) for image, label in config.examples]
    config, trained_on, tokens_per_image = _resolve(config)
    assert config.backbone is not None
    facts = backbone_facts(config.backbone)
    if trained_on is not None and facts.fingerprint != trained_on["backbone"]:
        raise WeightsError(
            f"{config.adapter}: adapts backbone {trained_on['backbone'][:12]}, {_name(config.backbone)} is "
            f"{facts.fingerprint[:12]}; give --backbone the folder or revision it was trained on"
        )
    adapter = None if config.adapter is None else read_adapter(storage.join(config.adapter, "adapter"))
    _require_context(config, facts, facts.tokens_per_image or tokens_per_image)

    torch.set_num_threads(config.engine.threads)
    builder = BlockBuilder(_build_config(config))
    tokenizer = builder.tokenizer
    _require_context(config, facts, tokenizer.tokens_per_image)
    codebook = facts.codebook or (trained_on["codebook"] if trained_on else None)
    if codebook is not None:
        require_same_codebook(codebook, tokenizer.codebook_fingerprint, "--tokenizer")
    if tokenizer.codes > facts.codes:
        raise DatasetError(
            f"--tokenizer: has {tokenizer.codes} codes, the backbone knows {facts.codes}; give the backbone's tokenizer"
        )
    prompt = _prompt(config, builder, examples)
    fit = builder.config.fit
    squares = np.stack([square(picture, tokenizer.size_px, fit) for picture in queries])
    tokens = tokenizer.encode(squares)

    device, dtype = resolve_device(config.engine)
    lora = None if adapter is None else LoraConfig.model_validate(vars(adapter[0]))
    model = load_backbone(facts, config.backbone, lora, dtype=dtype, device=device, seed=config.seed)
    if adapter is not None:
        load_adapter_tensors(model, adapter[1])
    decoder = SequentialDecoder(model, tokenizer.codes, tokenizer.tokens_per_image, config.batch)
    images = _length(config) - 1
    # Of the query's own tokens, so that it gets the same answer alone and among others.
    seeds = [seed_of(config.seed, hashlib.sha256(row.astype("<u2").tobytes()).hexdigest()) for row in tokens]
    written = decoder.decode(prompt, tokens, images, config.sampling, seeds)
    pictures = tokenizer.decode(written.ids.reshape(-1, tokenizer.tokens_per_image))
    pictures = pictures.reshape(len(queries), images, *pictures.shape[1:])

    answers = []
    for number, name in enumerate(_names(config.queries)):
        files = _answer_files(config, queries[number], squares[number], pictures[number], fit)
        for file, data in files.items():
            _write(storage.join(config.out, name, file), data)
        likelihood = written.image_log_likelihood[number].tolist()
        answers.append(
            {
                "query": config.queries[number],
                "folder": name,
                "files": sorted(files),
                "seed": seeds[number],
                "candidate": int(written.candidate[number]),
                "log_likelihood": {"frames": likelihood[:-1], "answer": likelihood[-1]},
            }
        )
    result = {
        "version": 1,
        "config": config.model_dump(mode="json"),
        "fingerprints": {
            **builder.facts().fingerprints,
            "backbone": facts.fingerprint,
            "adapter": _file_hash(storage.join(config.adapter, "adapter", WEIGHTS_FILE)) if config.adapter else None,
        },
        "prompt_tokens": len(prompt),
        "answers": answers,
    }
    _write(storage.join(config.out, RESULT_FILE), (json.dumps(result, indent=2) + "\n").encode())
    return result


# --- before anything expensive ---------------------------------------------------------------------------------------


def _require_out(out: str) -> None:
    storage.require_writable(out)
    files = storage.list_files(out)
    if files and RESULT_FILE not in files:
        raise ConfigError(f"--out {out}: holds files that are no generation of covray; give another folder")


def _picture(option: str, path: str) -> NDArray[np.uint8]:
    try:
        return decode(storage.read_bytes(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{option} {path}: is not there; give a picture file") from error
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({one_line(error)}); give a picture file") from error
    except PairError as error:
        raise ConfigError(f"{option} {path}: {error}; give another picture") from error


def _example(image: str, label: str) -> tuple[bytes, bytes]:
    """The encoded files, once both are known to be pictures."""
    for path in (image, label):
        _picture("--example", path)
    return storage.read_bytes(image), storage.read_bytes(label)


def _resolve(config: GenerateConfig) -> tuple[GenerateConfig, dict[str, str] | None, int | None]:
    """``config`` with all that the run decides, the run's fingerprints, its tokens per image; None without a run."""
    if config.adapter is None:
        update: dict[str, Any] = {
            "backbone": BackboneConfig(), "length": 4, "method": "diffusion", "prior": PriorConfig(),
            "tokenizer": TokenizerConfig(), "fit": "stretch",
        }  # fmt: skip
        return _with(config, update), None, None
    run = read_run(config.adapter)
    try:
        trained = TrainConfig.model_validate(run["config"])
        fingerprints = {key: str(run["fingerprints"][key]) for key in ("backbone", "codebook")}
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{config.adapter}/_run.json: is no description of a run; give the --out of a covray train"
        ) from error
    chosen = trained.sentences
    update = {"backbone": trained.backbone, "method": chosen.method}
    if chosen.tasks is not None and len(chosen.tasks) == 1:
        update["task"] = chosen.tasks[0]
    if config.length is None and (config.method or chosen.method) != "none":
        if len(chosen.lengths) > 1:
            lengths = " and ".join(map(str, chosen.lengths))
            raise ConfigError(f"--length: {config.adapter} was trained on chains of {lengths} pictures; say which")
        update["length"] = chosen.lengths[0]
    tokens_per_image = None
    if config.tokenizer is None or config.prior is None or config.fit is None:
        try:
            dataset = ChainDataset(trained.data)
            tokens_per_image = dataset.tokens_per_image
            keys = ("prior", "tokenizer", "fit")
            built = BuildConfig.model_validate(
                {"pairs": "", "out": ""} | {key: dataset.config[key] for key in keys if key in dataset.config}
            )
        except (DatasetError, ValidationError) as error:
            if config.tokenizer is None:
                raise ConfigError(
                    f"--tokenizer: {config.adapter} was trained on {trained.data}, which does not say by which "
                    f"tokenizer ({one_line(error)}); give it, and --prior"
                ) from error
            built = BuildConfig(pairs="", out="")
        update |= {"prior": built.prior, "tokenizer": built.tokenizer, "fit": built.fit}
    return _with(config, update), fingerprints, tokens_per_image


def _with(config: GenerateConfig, update: dict[str, Any]) -> GenerateConfig:
    """``config`` with the values of ``update`` where it has none."""
    return config.model_copy(update={key: value for key, value in update.items() if getattr(config, key) is None})


def _length(config: GenerateConfig) -> int:
    """Pictures of a chain, both ends counted."""
    return 2 if config.method == "none" else config.length or 2


def _require_context(config: GenerateConfig, facts: BackboneFacts, tokens_per_image: int | None) -> None:
    if tokens_per_image is not None:
        pictures = (len(config.examples) + 1) * _length(config)
        require_context(pictures * tokens_per_image, tokens_per_image, facts.llama.max_position_embeddings)


# --- the prompt ------------------------------------------------------------------------------------------------------


def _build_config(config: GenerateConfig) -> BuildConfig:
    """What makes the examples' chains, as ``covray build`` would."""
    length = _length(config)
    framed = config.examples and config.method in ("linear", "diffusion") and length > 2
    return BuildConfig.model_validate(
        {
            "pairs": "", "out": "", "lengths": (length,), "methods": (config.method,) if framed else (),
            "prior": config.prior, "tokenizer": config.tokenizer, "fit": config.fit, "engine": config.engine,
            "check_endpoints": 0.0,
        }
    )  # fmt: skip


def _prompt(config: GenerateConfig, builder: BlockBuilder, examples: Sequence[tuple[bytes, bytes]]) -> np.ndarray:
    """The examples' chains one after another, uint16 [P]."""
    if not examples:
        return np.empty(0, np.uint16)
    task = config.task or _WITHOUT_TASK
    rows = []
    for image, label in examples:
        pair = Pair(task, "", Picture(bytes=image), Picture(bytes=label))
        ends = {"image": {"bytes": image}, "label": {"bytes": label}}
        rows.append({"pair_id": pair.pair_id, "task": task, "split": "", "meta": "{}"} | ends)
    table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA)
    built, _ = builder.build(prepare_block(table, builder.config, builder.facts(), None))
    chains = []
    for row, paths in zip(built.to_pylist(), config.examples, strict=True):
        if row["error"] is not None:
            raise ConfigError(f"--example {' '.join(paths)}: {row['error']}; give another pair")
        chains += [row["source"], *(frame["tokens"] for frame in row["frames"]), row["label"]]
    return np.array(chains, np.uint16).ravel()


# --- the answers -----------------------------------------------------------------------------------------------------


def _answer_files(
    config: GenerateConfig, query: np.ndarray, small: np.ndarray, pictures: np.ndarray, fit: str
) -> dict[str, bytes]:
    """A query's files by name. ``pictures``: uint8 [images, s, s, 3], its frames and its answer."""
    task = config.task
    height_px, width_px = query.shape[:2]
    if fit == "crop":
        height_px = width_px = min(height_px, width_px)
    answer = resize(pictures[-1], height_px, width_px, TASKS[task or _WITHOUT_TASK].resample)
    alphas = alphas_of(len(pictures) + 1)
    captions = ["query", *(f"α = {alpha:.3g}" for alpha in alphas), "answer"]
    files = {"strip.png": draw_strip([small, *pictures], captions), "answer.png": encode_png(answer)}
    if task is not None:
        meta = {"classes": [str(number) for number in range(config.classes)]}
        files |= TASKS[task].export(answer, meta)
    return files


def _names(paths: Sequence[str]) -> list[str]:
    """A folder a query: the file's name without its ending, numbered where several have one."""
    names: list[str] = []
    for path in paths:
        stem = posixpath.splitext(posixpath.basename(path))[0]
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _write(path: str, data: bytes) -> None:
    try:
        storage.write_bytes(path, data)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({one_line(error)}); give another folder") from error


def _file_hash(path: str) -> str:
    return hashlib.sha256(storage.read_bytes(path)).hexdigest()


def _name(backbone: BackboneConfig) -> str:
    return backbone.path or backbone.scale
