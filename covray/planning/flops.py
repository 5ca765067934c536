"""Rates of hardware that was not measured: FLOPs over a share of the GPU's peak.

The forward and backward pass of a LoRA training take 4 N FLOPs a token for N parameters: 2 N forward, and 2 N back
through weights that are frozen. A pair of L pictures, K = L - 2 of them by diffusion, takes ``evaluations_per_pair``
passes of the UNet, a pass of the VAE's encoder for every picture that is inverted and of its decoder for every one that
is denoised, and a pass of the tokenizer for each of its pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import LlamaConfig

from covray.chains.prepare import needs_prior
from covray.chains.shard_rows import QUALITY, ShardRow, frame_order, shard_schema, union_alphas
from covray.chains.spacing import PROBES
from covray.config import AssumedConfig, BuildConfig, TrainConfig
from covray.errors import ConfigError
from covray.io.model_folders import NANO_NAMES
from covray.models.lvm.scales import parameters
from covray.planning.rates import BuildRates, TrainRates
from covray.training.memory import adapter_parameters
from covray.training.trainer import peak_flops

_GIGA = 1e9
_TOKENIZER_GFLOPS, _TOKENIZER_PX = 216.3, 256
"""The encoder of LVM's VQGAN at that side; in proportion to the pixels."""
_DOWNSAMPLING, _CODES = 16, 8192
_PRIOR_PX = 512
"""The side of a prior's pictures where the configuration does not say it."""
_MAX_ROWS = 256
"""Of the shard that is written to see how large one is."""


@dataclass(frozen=True)
class _PriorGflops:
    """A pass of each network of Stable Diffusion 2.1; 2 x MAC."""

    unet: float
    encoder: float
    decoder: float


_PRIOR_GFLOPS = {512: _PriorGflops(804.3, 1117.0, 2515.0), 256: _PriorGflops(181.1, 273.0, 622.0)}
"""By side in pixels."""


def evaluations_per_pair(build: BuildConfig, pairs_per_source: float = 1.0) -> float:
    """Return the passes of the UNet for a pair: evaluations each way x (inversions + frames + ends that are checked).

    Args:
        build: The build.
        pairs_per_source: Pairs that follow each other and share their image. With 1 the result is what
            ``covray build --plan`` counts.
    """
    if not needs_prior(build):
        return 0.0
    frames = 0
    if "diffusion" in build.methods:
        frames = len(union_alphas(build.lengths, build.alphas)) + PROBES * (build.spacing == "path")
    # Both ends of a checked pair are returned from their noise.
    denoisings = frames + 2 * build.check_endpoints
    return build.prior.evaluations_each_way * (inversions_per_pair(build, pairs_per_source) + denoisings)


def inversions_per_pair(build: BuildConfig, pairs_per_source: float) -> float:
    """Return the pictures that are inverted for a pair: its label, and its share of an image.

    An image is inverted once a block. A block of r rows, wherever it begins, meets (r + s - 1) / s images of s pairs
    each on average.
    """
    rows, shared = build.most_rows_per_block, pairs_per_source
    return 1 + (rows + shared - 1) / (shared * rows)


def pictures_per_pair(build: BuildConfig) -> int:
    """Return the pictures that are tokenized for a pair: its ends, and the frames of every method."""
    return 2 + len(frame_order(build.methods, union_alphas(build.lengths, build.alphas)))


def picture_tokens(build: BuildConfig) -> int:
    """Return the tokens of a picture with a tokenizer of LVM's kind."""
    return ((build.tokenizer.size_px or 256) // _DOWNSAMPLING) ** 2


def build_flops(build: BuildConfig, pairs_per_source: float = 1.0) -> float:
    """Return the FLOPs of a pair with Stable Diffusion 2.1 and LVM's tokenizer. Raises ConfigError for other sizes."""
    flops = pictures_per_pair(build) * _TOKENIZER_GFLOPS * ((build.tokenizer.size_px or 256) / _TOKENIZER_PX) ** 2
    evaluations = evaluations_per_pair(build, pairs_per_source)
    if evaluations:
        size = build.prior.size_px or _PRIOR_PX
        if build.prior.path in NANO_NAMES or size not in _PRIOR_GFLOPS:
            sizes = " and ".join(map(str, _PRIOR_GFLOPS))
            raise ConfigError(
                f"build.prior: FLOPs are known for Stable Diffusion 2.1 at {sizes} px, not for {build.prior.path} at "
                f"{size}; run covray benchmark, and give its file as calibration"
            )
        gflops = _PRIOR_GFLOPS[size]
        inverted = inversions_per_pair(build, pairs_per_source)
        # What is no inversion is a denoising: both take equally many evaluations.
        denoised = evaluations / build.prior.evaluations_each_way - inverted
        flops += evaluations * gflops.unet + inverted * gflops.encoder + denoised * gflops.decoder
    return flops * _GIGA


def assumed_build(
    build: BuildConfig, assumed: AssumedConfig, gpu: str, pairs_per_source: float, tasks_per_block: int
) -> BuildRates:
    """Return the rates of a build on a GPU that is not at hand.

    Args:
        build: The build.
        assumed: What is assumed of hardware that was not measured.
        gpu: The kind of GPU.
        pairs_per_source: As in ``evaluations_per_pair``.
        tasks_per_block: Tasks whose pairs a block mixes; each is a shard of its own.

    Raises:
        ConfigError: The GPU's peak, or the FLOPs of these models, are not known.
    """
    tokens = picture_tokens(build)
    rows = min(_MAX_ROWS, max(1, build.most_rows_per_block // tasks_per_block))
    row_bytes, shard_bytes = _shard_bytes(build, tokens, rows)
    return BuildRates(
        identity={},
        rows_per_block=build.most_rows_per_block,
        actors=1,
        start_s=assumed.start_s,
        load_s=assumed.load_s,
        row_s=build_flops(build, pairs_per_source) / (assumed.build_utilisation * known_peak(gpu, "build_on")),
        evaluations=evaluations_per_pair(build, pairs_per_source),
        pictures=pictures_per_pair(build),
        tokens_per_image=tokens,
        row_bytes=row_bytes,
        shard_bytes=shard_bytes,
        audit_shard_s=assumed.audit_shard_s,
    )


def assumed_training(train: TrainConfig, llama: LlamaConfig, assumed: AssumedConfig, gpu: str) -> TrainRates:
    """Return the rates of a training on a GPU that is not at hand.

    Args:
        train: The training.
        llama: The architecture of its backbone.
        assumed: What is assumed of hardware that was not measured.
        gpu: The kind of GPU.

    Raises:
        ConfigError: The GPU's peak is not known.
    """
    token_s = 4 * parameters(llama) / (assumed.train_utilisation * known_peak(gpu, "train_on"))
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


def known_peak(gpu: str, section: str) -> float:
    """Return the FLOP/s of a GPU by its kind; ``section`` names the nodes in the error. Raises ConfigError."""
    peak = peak_flops(gpu)
    if peak is None:
        raise ConfigError(
            f"{section}.gpu: the peak of {gpu} is not known; give A100, H100, H200, H20, or a calibration"
        )
    return peak


def parquet_bytes(size: int, metadata: pq.FileMetaData) -> tuple[int, int]:
    """Divide a Parquet file into its rows and the rest: footer, schema, description.

    Args:
        size: The bytes of the whole file.
        metadata: What the file says of itself.

    Returns:
        The bytes of the rows and of the rest.
    """
    rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
    return rows, size - rows


def _shard_bytes(build: BuildConfig, tokens: int, rows: int) -> tuple[float, float]:
    """Return the bytes of a row, and of the rest of a shard, from one that is written to memory.

    Its tokens are random, so that it is as large as can be.
    """
    generator = np.random.default_rng(0)
    table = pa.Table.from_pylist(
        [_random_row(build, tokens, generator) for _ in range(rows)], shard_schema(build.keep_noise)
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue()
    in_rows, rest = parquet_bytes(data.size, pq.read_metadata(pa.BufferReader(data)))
    return in_rows / rows, rest


def _random_row(build: BuildConfig, tokens: int, generator: np.random.Generator) -> ShardRow:
    """Return a row of the shard schema with random tokens."""

    def picture() -> np.ndarray:
        return generator.integers(0, _CODES, tokens, dtype=np.uint16)

    row: ShardRow = {
        "pair_id": int(generator.integers(2**62)),
        "task": "segmentation",
        "split": "train",
        "source": picture(),
        "label": picture(),
        "frames": [],
    }
    for method, alpha in frame_order(build.methods, union_alphas(build.lengths, build.alphas)):
        row["frames"].append({"method": method, "alpha": alpha, "tokens": picture()})
    row["quality"] = dict.fromkeys(QUALITY, float(generator.random()))
    if build.keep_noise:
        # float32 latents of 4 channels, an eighth of the picture's side
        latent_bytes = 4 * 4 * ((build.prior.size_px or _PRIOR_PX) // 8) ** 2
        row |= {"source_noise": generator.bytes(latent_bytes), "label_noise": generator.bytes(latent_bytes)}
        row |= {"source_pixels": generator.bytes(16), "label_pixels": generator.bytes(16)}
    return row
