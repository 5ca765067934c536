"""What a block, a step, a start and a shard cost: measured by ``covray benchmark``, or computed from FLOPs.

Forward and backward pass of a LoRA training take 4 N FLOPs a token for N parameters: 2 N forward, and 2 N back through
weights that are frozen. A pair of L pictures, K = L - 2 of them by diffusion, takes ``evaluations_per_pair`` passes of
the UNet, a pass of the VAE's encoder for every picture that is inverted and of its decoder for every one that is
denoised, and a pass of the tokenizer for each of its pictures.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field
from transformers import LlamaConfig

from covray.chains.dataset import QUALITY, frame_order, shard_schema, union_alphas
from covray.chains.prepare import needs_prior
from covray.config import AssumedConfig, BuildConfig, Section, TrainConfig, differences, load_config, read_yaml
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.models.lvm.scales import parameters
from covray.training.memory import adapter_parameters
from covray.training.trainer import peak_flops

_GIGA = 1e9
_PRIOR_GFLOPS = {512: (804.3, 1117.0, 2515.0), 256: (181.1, 273.0, 622.0)}
"""Stable Diffusion 2.1: a pass of the UNet, of the VAE's encoder and of its decoder, by side in pixels; 2 x MAC."""
_TOKENIZER_GFLOPS, _TOKENIZER_PX = 216.3, 256
"""The encoder of LVM's VQGAN at that side; in proportion to the pixels."""
_DOWNSAMPLING, _CODES = 16, 8192
_BUILD_KEYS, _TRAIN_KEYS = ("prior", "tokenizer", "engine", "fit", "keep_noise"), ("backbone", "lora", "compute")
_MAX_FILE_CHARACTERS = 100_000
_MOST_ROWS = 256  # of the shard that is written to see how large one is

Seconds = Annotated[float, Field(ge=0, le=1e9)]
Bytes = Annotated[float, Field(ge=0, le=1e15)]


class BuildRates(Section):
    """Of a build."""

    identity: dict[str, Any]
    """The part of the configuration that they hold for; empty where they are assumed."""
    rows_per_block: int = Field(ge=1)
    actors: int = Field(ge=1)
    """At work together when it was measured."""
    start_s: Seconds
    """Before the first actor, and after the last: Ray's start and end, checks, loading the models once."""
    load_s: Seconds
    """Of an actor until it computes at full speed, beside its blocks."""
    row_s: float = Field(ge=1e-12, le=1e9)
    """Of one actor."""
    evaluations: float = Field(ge=0, le=1e9)
    """Of the UNet for a row."""
    pictures: int = Field(ge=2, le=10**9)
    """Tokenized for a row."""
    tokens_per_image: int = Field(ge=1, le=10**9)
    row_bytes: Bytes
    shard_bytes: Bytes
    """Of a shard beside its rows."""
    audit_shard_s: Seconds


class TrainRates(Section):
    """Of a training."""

    identity: dict[str, Any]
    """The part of the configuration that they hold for; empty where they are assumed."""
    workers: int = Field(ge=1)
    start_s: Seconds
    """Until the first step and after the last: Ray, loading, the first validation."""
    token_s: float = Field(ge=1e-15, le=1e9)
    """Of one worker, forward and back."""
    validation_token_s: Seconds
    """Of one worker, forward."""
    checkpoint_s: Seconds
    checkpoint_bytes: Bytes


class Calibration(Section):
    """The file that ``covray benchmark`` writes."""

    version: Literal[1] = 1
    hardware: str
    """Processor and GPU it was measured on."""
    date: str
    build: BuildRates | None = None
    train: TrainRates | None = None


def read_calibration(path: str) -> Calibration:
    """The calibration at ``path``, YAML or JSON. Raises ConfigError: absent, of another version, with unknown keys."""
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration {path}: cannot be read; give a file that covray benchmark wrote") from error
    if len(text) > _MAX_FILE_CHARACTERS:
        raise ConfigError(f"calibration {path}: is no calibration; give a file that covray benchmark wrote")
    try:
        values = read_yaml(text)  # JSON is YAML
    except ValueError as error:
        raise ConfigError(f"calibration {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"calibration {path}: holds {type(values).__name__}, not keys and values")
    try:
        return load_config(Calibration, None, values)
    except ConfigError as error:
        raise ConfigError(f"calibration {path}: {error}") from error


def write_calibration(path: str, calibration: Calibration) -> None:
    """Write ``calibration`` as YAML, or as JSON where ``path`` says so. Raises ConfigError where it cannot."""
    values = calibration.model_dump(mode="json")
    text = json.dumps(values, indent=2) if path.endswith(".json") else yaml.safe_dump(values, sort_keys=False)
    try:
        storage.write_bytes(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"calibration {path}: cannot be written ({one_line(error)}); give another file") from error


def evaluations_per_pair(build: BuildConfig, pairs_per_source: float = 1.0) -> float:
    """Passes of the UNet for a pair: steps x (inversions + frames + ends that are checked).

    ``pairs_per_source``: pairs that follow each other and share their image. With 1 it is what ``covray build --plan``
    counts.
    """
    if not needs_prior(build):
        return 0.0
    frames = len(union_alphas(build.lengths, build.alphas)) if "diffusion" in build.methods else 0
    return build.prior.steps * (inversions_per_pair(build, pairs_per_source) + frames + 2 * build.check_endpoints)


def inversions_per_pair(build: BuildConfig, pairs_per_source: float) -> float:
    """Pictures that are inverted for a pair: its label, and its share of an image that is inverted once a block.

    A block of r rows, wherever it begins, meets (r + s - 1) / s images of s pairs each on average.
    """
    rows, shared = build.rows_per_block, pairs_per_source
    return 1 + (rows + shared - 1) / (shared * rows)


def pictures_per_pair(build: BuildConfig) -> int:
    """Pictures that are tokenized for a pair: its ends, and the frames of every method."""
    return 2 + len(frame_order(build.methods, union_alphas(build.lengths, build.alphas)))


def build_flops(build: BuildConfig, pairs_per_source: float = 1.0) -> float:
    """FLOPs of a pair with Stable Diffusion 2.1 and LVM's tokenizer. Raises ConfigError for other sizes."""
    flops = pictures_per_pair(build) * _TOKENIZER_GFLOPS * ((build.tokenizer.size_px or 256) / _TOKENIZER_PX) ** 2
    evaluations = evaluations_per_pair(build, pairs_per_source)
    if evaluations:
        size = build.prior.size_px or 512
        if build.prior.path == "nano" or size not in _PRIOR_GFLOPS:
            raise ConfigError(
                f"build.prior: FLOPs are known for Stable Diffusion 2.1 at {' and '.join(map(str, _PRIOR_GFLOPS))} px, "
                f"not for {build.prior.path} at {size}; run covray benchmark, and give its file as calibration"
            )
        unet, encode, decode = _PRIOR_GFLOPS[size]
        inverted = inversions_per_pair(build, pairs_per_source)
        denoised = evaluations / build.prior.steps - inverted
        flops += evaluations * unet + inverted * encode + denoised * decode
    return flops * _GIGA


def assumed_build(
    build: BuildConfig, assumed: AssumedConfig, gpu: str, pairs_per_source: float, tasks_per_block: int
) -> BuildRates:
    """Rates of a build on a ``gpu`` that is not at hand. Raises ConfigError for a GPU or sizes that are not known."""
    tokens = ((build.tokenizer.size_px or 256) // _DOWNSAMPLING) ** 2
    row_bytes, shard_bytes = _shard_bytes(
        build, tokens, min(_MOST_ROWS, max(1, build.rows_per_block // tasks_per_block))
    )
    return BuildRates(
        identity={},
        rows_per_block=build.rows_per_block,
        actors=1,
        start_s=assumed.start_s,
        load_s=assumed.load_s,
        row_s=build_flops(build, pairs_per_source) / (assumed.build_utilisation * _peak(gpu, "build_on")),
        evaluations=evaluations_per_pair(build, pairs_per_source),
        pictures=pictures_per_pair(build),
        tokens_per_image=tokens,
        row_bytes=row_bytes,
        shard_bytes=shard_bytes,
        audit_shard_s=assumed.audit_shard_s,
    )


def assumed_training(train: TrainConfig, llama: LlamaConfig, assumed: AssumedConfig, gpu: str) -> TrainRates:
    """Rates of a training on a ``gpu`` that is not at hand. Raises ConfigError for a GPU that is not known."""
    token_s = 4 * parameters(llama) / (assumed.train_utilisation * _peak(gpu, "train_on"))
    return TrainRates(
        identity={},
        workers=1,
        start_s=assumed.start_s + assumed.load_s,
        token_s=token_s,
        validation_token_s=token_s / 2,  # forward only
        checkpoint_s=assumed.checkpoint_s,
        # float32: the adapter for PEFT, and its state, that is itself and Adam's two moments
        checkpoint_bytes=16 * adapter_parameters(llama, train.lora),
    )


def measured_build(build: BuildConfig, calibration: Calibration, pairs_per_source: float) -> tuple[BuildRates, float]:
    """The calibration's rates for ``build``, and how many times the measured row one of ``build`` costs.

    The cost of a row goes with its UNet evaluations, or without a prior with its pictures. Raises ConfigError where
    another prior, tokenizer or engine was measured.
    """
    rates = calibration.build
    if rates is None:
        raise ConfigError("calibration: has no build; run covray benchmark with steps=[build]")
    _require_measured(rates.identity, build.identity(), _BUILD_KEYS, "build")
    evaluations, pictures = evaluations_per_pair(build, pairs_per_source), pictures_per_pair(build)
    if bool(evaluations) != (rates.evaluations >= 1):
        raise ConfigError("calibration: of builds with and without a prior one was measured, the other is planned")
    times = evaluations / rates.evaluations if evaluations else pictures / rates.pictures
    update = {
        "row_s": rates.row_s * times,
        "row_bytes": rates.row_bytes * pictures / rates.pictures,
        "evaluations": evaluations,
        "pictures": pictures,
    }
    return rates.model_copy(update=update), times


def measured_training(train: TrainConfig, calibration: Calibration) -> TrainRates:
    """The calibration's rates for ``train``. Raises ConfigError where another backbone or adapter was measured."""
    if calibration.train is None:
        raise ConfigError("calibration: has no training; run covray benchmark with steps=[build,train]")
    _require_measured(calibration.train.identity, train.identity(), _TRAIN_KEYS, "train")
    return calibration.train


def identity_of(section: Literal["build", "train"], identity: dict[str, Any]) -> dict[str, Any]:
    """The part of the ``identity`` of a configuration that rates depend on, beyond what they are scaled by."""
    kept = {key: identity[key] for key in (_BUILD_KEYS if section == "build" else _TRAIN_KEYS)}
    if section == "build":
        kept["prior"] = {key: value for key, value in kept["prior"].items() if key != "steps"}
    return kept


def parquet_bytes(size: int, metadata: pq.FileMetaData) -> tuple[int, int]:
    """Of a Parquet file of ``size`` bytes those of its rows, and the rest: footer, schema, description."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = sum(group.column(column).total_compressed_size for group in groups for column in range(group.num_columns))
    return rows, size - rows


def _require_measured(theirs: dict[str, Any], ours: dict[str, Any], keys: tuple[str, ...], section: Any) -> None:
    differing = differences(theirs, identity_of(section, ours), open_matches=True)
    if differing:
        raise ConfigError(f"calibration: {section} {'; '.join(differing)}; run covray benchmark with what is planned")


def _peak(gpu: str, section: str) -> float:
    peak = peak_flops(gpu)
    if peak is None:
        raise ConfigError(
            f"{section}.gpu: the peak of {gpu} is not known; give A100, H100, H200, H20, or a calibration"
        )
    return peak


def _shard_bytes(build: BuildConfig, tokens_per_image: int, rows: int) -> tuple[float, float]:
    """Bytes of a row and of the rest of a shard, from one that is written to memory; its tokens are random, so that
    it is as large as can be."""
    generator = np.random.default_rng(0)
    order = frame_order(build.methods, union_alphas(build.lengths, build.alphas))

    def picture() -> np.ndarray:
        return generator.integers(0, _CODES, tokens_per_image, dtype=np.uint16)

    def noise() -> bytes:  # of both ends, float32 latents of 4 channels, an eighth of the side
        return generator.bytes(4 * 4 * ((build.prior.size_px or 512) // 8) ** 2)

    kept = ("source", "label") if build.keep_noise else ()
    table = [
        {
            "pair_id": int(generator.integers(2**62)),
            "task": "segmentation",
            "split": "train",
            "source": picture(),
            "label": picture(),
            "frames": [{"method": method, "alpha": alpha, "tokens": picture()} for method, alpha in order],
            "quality": dict.fromkeys(QUALITY, float(generator.random())),
            **({f"{end}_noise": noise() for end in kept} | {f"{end}_pixels": generator.bytes(16) for end in kept}),
        }
        for _ in range(rows)
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(table, shard_schema(build.keep_noise)), sink)
    data = sink.getvalue()
    in_rows, rest = parquet_bytes(data.size, pq.read_metadata(pa.BufferReader(data)))
    return in_rows / rows, rest
