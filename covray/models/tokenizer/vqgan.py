"""The VQGAN tokenizer: pictures to tokens and back.

A ``diffusers.VQModel``, as LVM's tokenizer can be stored. Unlike Stable Diffusion's VAE it reads pixels in [0, 1]; one
that was trained on [-1, 1], as taming-transformers' are, has a ``covray.json`` beside it that says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import diffusers  # its models load where one is named, which a training never does
import numpy as np
import torch
from safetensors import SafetensorError

from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, DatasetError, WeightsError, one_line
from covray.io.device import choose_device
from covray.io.model_folders import fingerprint_folder, require_files, resolve_folder

MAX_CODES = 8192
"""LVM's vocabulary: ids above are special."""
_MIN_TOKENS = 16  # fewer come of VQModel's own default sample_size of 32, that is, of a size nobody stated
ABOUT_FILE = "covray.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_FILES = ("config.json", ABOUT_FILE, "diffusion_pytorch_model*.safetensors*")
_HUB_PATTERNS = (*_FILES, *(f"vqvae/{name}" for name in _FILES))


class Tokenizer:
    """A VQGAN at one picture size.

    A picture's tokens are the same to the bit whatever other pictures are encoded with it: all batches have one padded
    shape, and no operation mixes pictures.
    """

    def __init__(
        self, model: diffusers.VQModel, size_px: int, image_batch: int, fingerprint: str, signed: bool = False
    ):
        """``model`` on its device in float32; ``image_batch``: pictures of the fixed batch. See ``load_tokenizer``.

        ``signed``: the model's pixels are in [-1, 1]. No weights can hide that: zero padding is grey there, black in
        [0, 1].
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
        """SHA-256 (hex) of the codebook's float32 values, however they are stored: who shares it shares the tokens."""
        self._model = model
        self._batch = image_batch
        self._signed = signed

    @property
    def codebook(self) -> np.ndarray:
        """What every code stands for, float32 ``[codes, dimensions]``, read-only; near vectors mean alike patches."""
        values = self._model.quantize.embedding.weight.detach().float().cpu().numpy()
        values.flags.writeable = False  # it may be the model's own memory
        return values

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Tokens uint16 ``[n, tokens_per_image]`` of pictures uint8 ``[n, size_px, size_px, 3]``."""
        expected = (self.size_px, self.size_px, 3)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"pictures are {images.dtype} {images.shape}, not uint8 [n, {self.size_px}, {self.size_px}, 3]"
            )
        ids = np.empty((len(images), self.tokens_per_image), dtype=np.uint16)
        for start, count, batch in self._padded(images):
            # [B, S, S, 3] seen as [B, 3, S, S] is channels_last already.
            pixels = torch.from_numpy(batch).to(self._model.device).permute(0, 3, 1, 2).float().div_(255)
            if self._signed:
                pixels.mul_(2).sub_(1)
            _, _, (_, _, indices) = self._model.quantize(self._model.encode(pixels).latents)
            ids[start : start + count] = indices.view(len(batch), -1)[:count].cpu().numpy()
        return ids

    @torch.inference_mode()
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Pictures uint8 ``[n, size_px, size_px, 3]`` of tokens ``[n, tokens_per_image]`` (any integer type).

        Raises ValueError for an id that is no code.
        """
        if ids.ndim != 2 or ids.shape[1] != self.tokens_per_image or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens are {ids.dtype} {ids.shape}, not integers [n, {self.tokens_per_image}]")
        if ids.size and (ids.min() < 0 or ids.max() >= self.codes):
            raise ValueError(f"tokens are {ids.min()}..{ids.max()}, the codebook has 0..{self.codes - 1}")
        images = np.empty((len(ids), self.size_px, self.size_px, 3), dtype=np.uint8)
        model = self._model
        for start, count, batch in self._padded(ids.astype(np.int64)):
            indices = torch.from_numpy(batch).to(model.device).flatten()
            # VQModel.decode looks codes up only where lookup_from_codebook is set; the flag is not part of the weights.
            codes = model.quantize.get_codebook_entry(indices, (len(batch), *self.grid, model.quantize.vq_embed_dim))
            codes = codes.to(memory_format=torch.channels_last)
            pixels = model.decoder(model.post_quant_conv(codes), codes if model.config.norm_type == "spatial" else None)
            if self._signed:
                pixels.add_(1).div_(2)
            levels = pixels[:count].clamp(0, 1).mul(255).round().to(torch.uint8)
            images[start : start + count] = levels.permute(0, 2, 3, 1).cpu().numpy()
        return images

    def _padded(self, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, rows that count, zero-padded rows) of every batch: another batch shape would change the bits."""
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            batch = np.zeros((self._batch, *rows.shape[1:]), dtype=rows.dtype)
            batch[: len(part)] = part
            yield start, len(part), batch


def load_tokenizer(config: TokenizerConfig, engine: EngineConfig) -> Tokenizer:
    """Load the tokenizer: the nano one, a ``VQModel`` folder (or one with ``vqvae/`` inside, as amused's), or a hub id.

    It computes in float32 whatever ``engine.dtype``: bfloat16 moves latents over the border between two codes, and the
    tokenizer is a few per cent of a chain's arithmetic. Raises WeightsError for weights that are missing, incomplete or
    unfit for uint16 LVM tokens, ConfigError for a size or device that cannot be used.
    """
    if config.path != "nano" and Path(config.path).expanduser().is_file():
        raise _foreign(config.path)
    folder = resolve_folder(config.path, config.revision, "vqgan", _HUB_PATTERNS)
    if not (folder / "config.json").is_file() and (folder / "vqvae").is_dir():
        folder = folder / "vqvae"
    if _is_foreign(folder):
        raise _foreign(folder)
    require_files(folder, ["config.json", (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json")])
    model = _load_model(folder)
    codes = model.config.num_vq_embeddings
    if codes > MAX_CODES:
        raise WeightsError(f"{folder}: has {codes} codes, LVM's vocabulary only {MAX_CODES}; give a smaller codebook")
    if (model.config.in_channels, model.config.out_channels) != (3, 3):
        raise WeightsError(f"{folder}: reads or writes other than 3 channels; give a tokenizer of RGB pictures")
    device = choose_device(engine.device, "engine.device")
    model = model.to(device, memory_format=torch.channels_last)
    size_px, fingerprint = _size_px(model, config, folder), fingerprint_folder(folder, _FILES)
    return Tokenizer(model, size_px, engine.image_batch, fingerprint, _is_signed(folder))


def require_same_codebook(expected: str, found: str, what: str) -> None:
    """Refuse tokens of another codebook: an id then means another patch, and nothing else would show it.

    ``expected``, ``found``: codebook fingerprints; ``what``: whose is the ``found`` one, as the user knows it. Raises
    DatasetError naming both.
    """
    if expected != found:
        raise DatasetError(
            f"{what}: its codebook is {found[:12]}, not {expected[:12]}; tokens of different tokenizers do not mix, "
            "use the same one throughout"
        )


def _is_foreign(folder: Path) -> bool:
    """Whether the folder is one of muse's or taming's, as far as its names tell."""
    if any(folder.glob("diffusion_pytorch_model*")):
        return False
    if any(any(folder.glob(pattern)) for pattern in ("pytorch_model.*", "*.ckpt", "*/*.ckpt")):
        return True
    # Of a hub id only config.json has been downloaded.
    config = folder / "config.json"
    return config.is_file() and b"VQGANModel" in config.read_bytes()


def _foreign(path: Path | str) -> WeightsError:
    return WeightsError(
        f"{path}: is no folder of a diffusers VQModel; if it is a VQGAN of muse, taming or LlamaGen, download it and "
        "give its folder or file to covray convert tokenizer"
    )


def _is_signed(folder: Path) -> bool:
    """Whether ``covray.json`` says that pixels are in [-1, 1]; without one they are in [0, 1]."""
    file = folder / ABOUT_FILE
    if not file.is_file():
        return False
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get the folder again") from error
    version, pixels = (about.get("version"), about.get("pixels")) if isinstance(about, dict) else (None, None)
    if version != 1 or pixels not in ([0, 1], [-1, 1]):
        raise WeightsError(f"{file}: is of version {version} with pixels {pixels}; use the covray that wrote it")
    return bool(pixels == [-1, 1])


def _load_model(folder: Path) -> diffusers.VQModel:
    try:
        model, report = diffusers.VQModel.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        SafetensorError,
    ) as error:  # what diffusers raises for bad files
        reason = one_line(error)
        raise WeightsError(f"{folder}: is not a diffusers VQModel: {reason}") from error
    # diffusers starts what it does not find at random values, with a warning only.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise WeightsError(
                f"{folder}: weights and config.json disagree, {kind}: {sorted(map(str, report[kind]))[0]}"
            )
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
            f"tokenizer.size_px: {folder} states no picture size worth using ({size_px}); set it (LVM works at 256)"
        )
    return size_px


def _downsampling(model: diffusers.VQModel) -> int:
    return int(2 ** (len(model.config.block_out_channels) - 1))


def _fingerprint_codebook(model: diffusers.VQModel) -> str:
    codebook = model.quantize.embedding.weight.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(codebook.astype("<f4", copy=False).tobytes()).hexdigest()
