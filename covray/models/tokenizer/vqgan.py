"""The VQGAN tokenizer: pictures to tokens and back.

It is a ``diffusers.VQModel``, as which LVM's tokenizer can be stored. Unlike Stable Diffusion's VAE it reads pixels in
[0, 1]; one that was trained on [-1, 1], as taming-transformers' are, has a ``covray.json`` beside it that says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError

from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, DatasetError, WeightsError, one_line
from covray.io.device import choose_device
from covray.io.model_folders import NANO_NAMES, fingerprint_folder, local_path, require_files, resolve_folder
from covray.io.tensor_files import require_stored_floats, weight_files
from covray.models.tokenizer.pixel_range import require_unsigned

if TYPE_CHECKING:
    import diffusers

MAX_CODES = 8192
"""Codes in LVM's vocabulary; ids from there on are special."""
_MIN_TOKENS = 16  # fewer result from VQModel's default sample_size of 32, that is, where no size is stated
ABOUT_FILE = "covray.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_FILES = ("config.json", ABOUT_FILE, "diffusion_pytorch_model*.safetensors*")
_UNLOADABLE = (OSError, ValueError, TypeError, RuntimeError, SafetensorError)
"""What diffusers raises for files that it cannot load."""
_HUB_PATTERNS = (*_FILES, *(f"vqvae/{name}" for name in _FILES))


class Tokenizer:
    """A VQGAN at one picture size.

    A picture's tokens are the same to the bit whatever other pictures are encoded with it: all batches have one padded
    shape, and no operation mixes pictures.
    """

    def __init__(
        self, model: diffusers.VQModel, size_px: int, image_batch: int, fingerprint: str, signed: bool = False
    ):
        """Use a loaded model; see ``load_tokenizer``.

        Args:
            model: On its device, in float32.
            size_px: Side of the square pictures.
            image_batch: Pictures of the fixed batch.
            fingerprint: SHA-256 (hex) of the model folder.
            signed: Whether the model's pixels are in [-1, 1]. Weights cannot be rewritten for [0, 1]: zero padding is
                grey in [-1, 1] and black in [0, 1].
        """
        side = size_px // _downsampling(model)
        self.size_px = size_px
        """Side of the square pictures."""
        self.grid: tuple[int, int] = (side, side)
        """Rows and columns of tokens; a picture's tokens are the rows one after another."""
        self.tokens_per_image = side * side
        self.codes = int(model.config.num_vq_embeddings)
        """Size of the codebook; ids are below it."""
        self.fingerprint = fingerprint
        """SHA-256 (hex) of the model folder."""
        self.codebook_fingerprint = _fingerprint_codebook(model)
        """SHA-256 (hex) of the codebook's float32 values, whatever type they are stored in. Tokenizers that share it
        give the same tokens the same meaning."""
        self._model = model
        self._batch = image_batch
        self._signed = signed

    @property
    def codebook(self) -> np.ndarray:
        """The vector of every code, float32 ``[codes, dimensions]``, read-only; near vectors mean similar patches."""
        values = self._model.quantize.embedding.weight.detach().float().cpu().numpy()
        values.flags.writeable = False  # it may be the model's own memory
        return values

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return the tokens, uint16 ``[n, tokens_per_image]``, of pictures uint8 ``[n, size_px, size_px, 3]``."""
        expected = (self.size_px, self.size_px, 3)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"pictures are {images.dtype} {images.shape}, not uint8 [n, {self.size_px}, {self.size_px}, 3]"
            )
        ids = np.empty((len(images), self.tokens_per_image), dtype=np.uint16)
        for start, count, batch in self._padded(images):
            # [B, S, S, 3] viewed as [B, 3, S, S] is channels_last already.
            pixels = torch.from_numpy(batch).to(self._model.device).permute(0, 3, 1, 2).float().div_(255)
            if self._signed:
                pixels.mul_(2).sub_(1)
            # The third item is (perplexity, one-hot codes, indices).
            _, _, (_, _, indices) = self._model.quantize(self._model.encode(pixels).latents)
            ids[start : start + count] = indices.view(len(batch), -1)[:count].cpu().numpy()
        return ids

    @torch.inference_mode()
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Return the pictures, uint8 ``[n, size_px, size_px, 3]``, of tokens ``[n, tokens_per_image]`` of any int type.

        Raises ValueError for an id that is not a code.
        """
        if ids.ndim != 2 or ids.shape[1] != self.tokens_per_image or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens are {ids.dtype} {ids.shape}, not integers [n, {self.tokens_per_image}]")
        if ids.size and (ids.min() < 0 or ids.max() >= self.codes):
            raise ValueError(f"tokens are {ids.min()}..{ids.max()}, the codebook has 0..{self.codes - 1}")
        images = np.empty((len(ids), self.size_px, self.size_px, 3), dtype=np.uint8)
        model = self._model
        for start, count, batch in self._padded(ids.astype(np.int64)):
            indices = torch.from_numpy(batch).to(model.device).flatten()
            # VQModel.decode looks codes up only if lookup_from_codebook is set, which is not part of the weights.
            codes = model.quantize.get_codebook_entry(indices, (len(batch), *self.grid, model.quantize.vq_embed_dim))
            codes = codes.to(memory_format=torch.channels_last)
            pixels = model.decoder(model.post_quant_conv(codes), codes if model.config.norm_type == "spatial" else None)
            # Pictures on disk are in [0, 1]; the model's own range may be [-1, 1].
            if self._signed:
                pixels.add_(1).div_(2)
            levels = pixels[:count].clamp(0, 1).mul(255).round().to(torch.uint8)
            images[start : start + count] = levels.permute(0, 2, 3, 1).cpu().numpy()
        return images

    def _padded(self, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (first row, number of rows, zero-padded rows) of every batch; another batch shape would change bits."""
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            batch = np.zeros((self._batch, *rows.shape[1:]), dtype=rows.dtype)
            batch[: len(part)] = part
            yield start, len(part), batch


def find_tokenizer(config: TokenizerConfig) -> Path:
    """Return the local folder of a ``VQModel``, which is complete; a hub id is downloaded.

    Raises:
        WeightsError: The folder is missing or incomplete, or of another program.
    """
    if config.path not in NANO_NAMES and local_path(config.path).is_file():
        raise _foreign(config.path)
    folder = resolve_folder(config.path, config.revision, "vqgan", _HUB_PATTERNS)
    # amused's folder has the tokenizer inside.
    if not (folder / "config.json").is_file() and (folder / "vqvae").is_dir():
        folder = folder / "vqvae"
    if _is_foreign(folder):
        raise _foreign(folder)
    require_files(folder, ["config.json", (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json")])
    return folder


def load_tokenizer(config: TokenizerConfig, engine: EngineConfig) -> Tokenizer:
    """Load the tokenizer: the nano one, a ``VQModel`` folder (or one with ``vqvae/`` inside, as amused's), or a hub id.

    It computes in float32 whatever ``engine.dtype`` is: bfloat16 moves latents over the border between two codes, and
    the tokenizer is only a few per cent of a chain's arithmetic.

    Raises:
        WeightsError: The weights are missing or incomplete, do not fit LVM's vocabulary, or read pixels in [-1, 1] and
            do not say so.
        ConfigError: The size or device cannot be used.
    """
    folder = find_tokenizer(config)
    model = _load_model(folder)
    codes = model.config.num_vq_embeddings
    if codes > MAX_CODES:
        raise WeightsError(f"{folder}: has {codes} codes, LVM's vocabulary only {MAX_CODES}; give a smaller codebook")
    if (model.config.in_channels, model.config.out_channels) != (3, 3):
        raise WeightsError(f"{folder}: does not read and write 3 channels; give a tokenizer of RGB pictures")
    device = choose_device(engine.device, "engine.device")
    model = model.to(device, memory_format=torch.channels_last)
    size_px, fingerprint = _size_px(model, config, folder), fingerprint_folder(folder, _FILES)
    # Without covray.json nothing says which range the pixels have: it is measured.
    if not (folder / ABOUT_FILE).is_file():
        require_unsigned(model, _downsampling(model), folder)
    return Tokenizer(model, size_px, engine.image_batch, fingerprint, _is_signed(folder))


def codebook_neighbours(codebook: np.ndarray, count: int) -> np.ndarray:
    """Return the ``count`` codes nearest to each code by Euclidean distance, itself left out, int64 [codes, count].

    Of equal distances the smaller code comes first; a small codebook repeats its codes.

    Args:
        codebook: float32 [codes, dimensions].
        count: Neighbours of each code.
    """
    # |a - b|^2 = |a|^2 + |b|^2 - 2 ab; the row's own |a|^2 does not change the order.
    squares = np.square(codebook, dtype=np.float64).sum(1)
    # A codebook with too few codes repeats its nearest ones.
    columns = np.arange(count) % (len(codebook) - 1)
    nearest = np.empty((len(codebook), count), np.int64)
    for code, vector in enumerate(codebook.astype(np.float64)):
        distances = squares - 2 * (codebook @ vector)  # but for a constant
        distances[code] = np.inf
        nearest[code] = np.argsort(distances, kind="stable")[columns]
    return nearest


def require_same_codebook(expected: str, found: str, what: str) -> None:
    """Refuse tokens of another codebook: an id then means another patch, and nothing else would show it.

    Args:
        expected: Fingerprint of the codebook in use.
        found: Fingerprint of another.
        what: What has the ``found`` codebook, as the user knows it.

    Raises:
        DatasetError: They differ.
    """
    if expected != found:
        raise DatasetError(
            f"{what}: its codebook is {found[:12]}, not {expected[:12]}; tokens of different tokenizers do not mix, "
            "use the same one throughout"
        )


def _is_foreign(folder: Path) -> bool:
    """Return whether the folder is one of muse's or taming's, judging by its file names."""
    if any(folder.glob("diffusion_pytorch_model*")):
        return False
    # Patterns of other programs' files, which load_tokenizer does not read.
    if any(any(folder.glob(pattern)) for pattern in ("pytorch_model.*", "*.ckpt", "*/*.ckpt")):
        return True
    # Of a hub id only config.json has been downloaded.
    config = folder / "config.json"
    return config.is_file() and b"VQGANModel" in config.read_bytes()


def _foreign(path: Path | str) -> WeightsError:
    return WeightsError(
        f"{path}: is not a folder of a diffusers VQModel; if it is a VQGAN of muse, taming or LlamaGen, download it "
        "and give its folder or file to covray convert tokenizer"
    )


def _is_signed(folder: Path) -> bool:
    """Return whether ``covray.json`` says that pixels are in [-1, 1]; without one they are in [0, 1]."""
    file = folder / ABOUT_FILE
    if not file.is_file():
        return False
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get the folder again") from error
    version, pixels = (about.get("version"), about.get("pixels")) if isinstance(about, dict) else (None, None)
    if version != 1 or pixels not in ([0, 1], [-1, 1]):
        raise WeightsError(f"{file}: is of version {version} with pixels {pixels}; use the covray that wrote it")
    return bool(pixels == [-1, 1])


def _load_model(folder: Path) -> diffusers.VQModel:
    import diffusers  # where it is needed: it takes seconds

    try:
        model, report = diffusers.VQModel.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except _UNLOADABLE as error:
        raise WeightsError(f"{folder}: is not a diffusers VQModel ({one_line(error)}); get it again") from error
    # diffusers fills a missing tensor with random numbers and only warns.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise WeightsError(
                f"{folder}: weights and config.json disagree, {kind}: {min(map(str, report[kind]))}; get it again"
            )
    require_stored_floats(weight_files(folder, (f"{WEIGHTS_FILE}.index.json", WEIGHTS_FILE)))  # as diffusers chooses
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise WeightsError(f"{folder}: holds weights that are not finite; get the folder again")
    return model.eval().requires_grad_(False)


def _size_px(model: diffusers.VQModel, config: TokenizerConfig, folder: Path) -> int:
    downsampling = _downsampling(model)
    size_px = config.size_px or int(model.config.sample_size)
    if size_px % downsampling:
        raise ConfigError(f"tokenizer.size_px: {size_px} is not a multiple of {downsampling}, the model's downsampling")
    if config.size_px is None and (size_px // downsampling) ** 2 < _MIN_TOKENS:
        raise ConfigError(
            f"tokenizer.size_px: {folder} states a picture size of {size_px}, too small to use; set it (LVM has 256)"
        )
    return size_px


def _downsampling(model: diffusers.VQModel) -> int:
    return int(2 ** (len(model.config.block_out_channels) - 1))


def _fingerprint_codebook(model: diffusers.VQModel) -> str:
    codebook = model.quantize.embedding.weight.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(codebook.astype("<f4", copy=False).tobytes()).hexdigest()
