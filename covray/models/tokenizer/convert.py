"""Convert VQGANs of other programs to ``diffusers.VQModel`` folders: muse, taming-transformers, LlamaGen.

All three are one network under three sets of names, and ``VQModel`` is the same network: the weights are renamed, not
changed. There are two differences besides names:

- taming and LlamaGen are trained on pixels in [-1, 1]; the written folder records that, and the tokenizer obeys it.
- LlamaGen compares directions. Among unit vectors, the code nearest to z / |z| is the one nearest to z, so its codebook
  is written normalised.

What ``VQModel`` cannot compute is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
import yaml
from diffusers import VQModel
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from covray.errors import ConfigError, WeightsError, one_line
from covray.io import storage
from covray.io.model_folders import local_path
from covray.io.tensor_files import (
    Shape,
    new_folder,
    read_tensors,
    require_finite,
    require_new,
    require_tensors,
    weight_files,
)
from covray.models.tokenizer.vqgan import ABOUT_FILE, MAX_CODES, WEIGHTS_FILE

M = TypeVar("M", bound=BaseModel)
_Factors = Annotated[list[PositiveInt], Field(min_length=1, max_length=10)]
_GROUPS = 32  # of every group norm, in all three
_MUSE_WEIGHTS = ("pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors")
_LIGHTNING = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
"""A class that checkpoints of PyTorch Lightning, as taming's are, have as a key."""
_LLAMAGEN_PX = 256
"""Side of the pictures that LlamaGen's are trained on; their files do not record it."""
_PARTS = {  # diffusers: muse and taming; replaced in this order
    "down_blocks": "down",
    "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}
_MIDDLE = ("block_1", "attn_1", "block_2")  # in LlamaGen's list


class _Muse(BaseModel):
    """``config.json`` of muse's ``VQGANModel``, with its defaults; literals are all that ``VQModel`` can compute."""

    resolution: PositiveInt = 256
    num_channels: Literal[3] = 3
    hidden_channels: PositiveInt = 128
    channel_mult: _Factors = [1, 1, 2, 2, 4]
    num_res_blocks: PositiveInt = 2
    attn_resolutions: list[int] | int = [16]
    no_attn_mid_block: bool = False
    z_channels: PositiveInt = 256
    num_embeddings: PositiveInt = 1024
    quantized_embed_dim: PositiveInt = 256
    resample_with_conv: Literal[True] = True
    decoder_res_blocks: None = None
    extra_mid_res_blocks: None = None
    decoder_hidden_channels: None = None
    decoder_channel_mult: None = None


class _TamingNetwork(BaseModel):
    """``ddconfig`` of a taming configuration. Other options are refused, because they might change the network."""

    model_config = ConfigDict(extra="forbid")

    ch: PositiveInt
    out_ch: Literal[3]
    in_channels: Literal[3]
    ch_mult: _Factors
    num_res_blocks: PositiveInt
    attn_resolutions: list[int]
    resolution: PositiveInt
    z_channels: PositiveInt
    double_z: Literal[False]
    dropout: float = 0.0
    resamp_with_conv: Literal[True] = True
    attn_type: Literal["vanilla"] = "vanilla"
    use_linear_attn: Literal[False] = False
    tanh_out: Literal[False] = False
    give_pre_end: Literal[False] = False


class _Taming(BaseModel):
    """``model.params`` of a taming configuration."""

    embed_dim: PositiveInt
    n_embed: PositiveInt
    ddconfig: _TamingNetwork
    remap: None = None


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint of one of the layouts."""

    layout: str
    file: Path
    network: _Network
    tensors: dict[str, Tensor]
    name: Callable[[str], str]
    """Returns the checkpoint's name of a tensor of ``VQModel``."""
    signed: bool
    """Whether pixels are in [-1, 1]."""


@dataclass(frozen=True)
class _Network:
    """The sizes of a network, in the terms that all three layouts share."""

    first: int
    """Channels after the first convolution."""
    channels: Sequence[int]
    """Channels of every level, from the picture down."""
    attention: Sequence[bool]
    """Whether each level attends, in the same order."""
    mid_attention: bool
    """Whether the middle block attends."""
    blocks: int
    """Residual blocks of a level."""
    latents: int
    """Channels of the latents."""
    codebook: tuple[int, int]
    """Number of codes, and their dimensions."""
    size_px: int
    """Side of the pictures that the network was trained on."""

    def check(self, where: Path) -> None:
        """Refuse sizes that a ``VQModel`` cannot have. Raises WeightsError, naming ``where`` they come from."""
        if self.first != self.channels[0]:
            raise WeightsError(
                f"{where}: its first level turns {self.first} channels into {self.channels[0]}, which a VQModel "
                "cannot; give another"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``VQModel``."""
        down = {True: "AttnDownEncoderBlock2D", False: "DownEncoderBlock2D"}
        up = {True: "AttnUpDecoderBlock2D", False: "UpDecoderBlock2D"}
        return {
            "block_out_channels": list(self.channels),
            "down_block_types": [down[attends] for attends in self.attention],
            "up_block_types": [up[attends] for attends in reversed(self.attention)],
            "mid_block_add_attention": self.mid_attention,
            "layers_per_block": self.blocks,
            "latent_channels": self.latents,
            "num_vq_embeddings": self.codebook[0],
            "vq_embed_dim": self.codebook[1],
            "norm_num_groups": _GROUPS,
            "sample_size": self.size_px,
            "lookup_from_codebook": True,
        }


@dataclass(frozen=True)
class ConvertedTokenizer:
    """What was converted; the keys of ``covray convert tokenizer --json``."""

    layout: str
    out: str
    parameters: int
    codes: int
    size_px: int
    pixels: tuple[int, int]
    """The range of the network's pixels."""


def convert_tokenizer(source: str, out: str) -> ConvertedTokenizer:
    """Write the VQGAN ``source`` as a ``VQModel`` folder ``out``, and return what was converted.

    ``source`` is muse's folder (``config.json`` and ``pytorch_model.bin`` or safetensors), taming's (with a ``.ckpt``
    and its ``.yaml`` anywhere below), or LlamaGen's ``.pt`` file. ``out`` must be new. Weights keep their type.

    Raises:
        WeightsError: The checkpoint is damaged, is none of these, or computes what ``VQModel`` cannot.
        ConfigError: ``out`` cannot be used.
    """
    path, target = local_path(source), local_path(out)
    require_new(target)
    checkpoint = _read(path)
    file, network = checkpoint.file, checkpoint.network
    codes = network.codebook[0]
    if codes > MAX_CODES:
        raise WeightsError(f"{file}: has {codes} codes, LVM's vocabulary only {MAX_CODES}; give a smaller codebook")
    try:
        with torch.device("meta"):
            model = VQModel(**network.arguments())
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{file}: is a network that VQModel cannot build ({one_line(error)}); give another"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = _renamed(checkpoint, shapes)
    # LlamaGen normalises its codes when it looks them up; VQModel does not.
    if checkpoint.layout == "llamagen":
        codebook = tensors["quantize.embedding.weight"]
        tensors["quantize.embedding.weight"] = F.normalize(codebook.float(), dim=-1).to(codebook.dtype)
    pixels = (-1, 1) if checkpoint.signed else (0, 1)
    with new_folder(target) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        model.save_config(folder)
        storage.write_json(str(folder / ABOUT_FILE), {"version": 1, "pixels": pixels})
    return ConvertedTokenizer(
        layout=checkpoint.layout,
        out=out,
        parameters=sum(map(Tensor.numel, tensors.values())),
        codes=codes,
        size_px=network.size_px,
        pixels=pixels,
    )


def _renamed(checkpoint: _Checkpoint, shapes: dict[str, Shape]) -> dict[str, Tensor]:
    """Return the weights by their names in ``VQModel``, whose tensors have ``shapes``. Raises WeightsError."""
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    expected = {checkpoint.name(name): _stored_shape(name, shape) for name, shape in shapes.items()}
    # All names and shapes first: what is missing is one message, before a tensor is looked at.
    require_tensors(checkpoint.file, stored, expected)
    tensors = {}
    for name, shape in shapes.items():
        stored_name = checkpoint.name(name)
        tensor = require_finite(checkpoint.file, stored_name, checkpoint.tensors[stored_name])
        # Some layouts store the same numbers in another shape.
        tensors[name] = tensor.reshape(shape).contiguous()
    return tensors


def _read(path: Path) -> _Checkpoint:
    """Read a checkpoint of any of the layouts."""
    # Told apart by what lies there: a file, a configuration, or one checkpoint with its YAML.
    if path.is_file():
        return _read_llamagen(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder; give a downloaded checkpoint")
    if any(path.glob("diffusion_pytorch_model*")):
        raise WeightsError(f"{path}: is already a folder of diffusers; pass it to --tokenizer as it is")
    if (path / "config.json").is_file():
        return _read_muse(path)
    checkpoints = sorted(path.glob("**/*.ckpt"))
    if len(checkpoints) != 1:
        raise WeightsError(
            f"{path}: holds {len(checkpoints)} .ckpt files and no config.json; give a folder of muse (config.json, "
            "pytorch_model.bin) or taming (one .ckpt and its .yaml), or a file of LlamaGen (.pt)"
        )
    return _read_taming(path, checkpoints[0])


def _read_muse(folder: Path) -> _Checkpoint:
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get the folder again") from error
    kind = values.get("_class_name") if isinstance(values, dict) else None
    if kind != "VQGANModel":
        raise WeightsError(f"{file}: is of class {kind}, not muse's VQGANModel; give another folder")
    config = _validated(_Muse, values, file)
    # A single resolution may be given as a number.
    attended = config.attn_resolutions if isinstance(config.attn_resolutions, list) else [config.attn_resolutions]
    files = weight_files(folder, _MUSE_WEIGHTS)
    if not files:
        raise WeightsError(f"{folder}: {' or '.join(_MUSE_WEIGHTS)} is missing; complete the folder, or give another")
    levels = len(config.channel_mult)
    attention = _attention(attended, config.resolution, levels)
    if config.num_res_blocks == 1 and any(attention):
        # muse's levels skip their attention if they have only one block.
        raise WeightsError(f"{file}: attn_resolutions with one residual block is not supported; give another")
    network = _Network(
        first=config.hidden_channels,
        channels=[config.hidden_channels * factor for factor in config.channel_mult],
        attention=attention,
        mid_attention=not config.no_attn_mid_block,
        blocks=config.num_res_blocks,
        latents=config.z_channels,
        codebook=(config.num_embeddings, config.quantized_embed_dim),
        size_px=config.resolution,
    )
    network.check(file)
    return _Checkpoint("muse", files[0], network, read_tensors(files[0]), partial(_muse_name, levels), False)


def _read_taming(root: Path, file: Path) -> _Checkpoint:
    # A folder of taming may hold configurations of trainers and logs as well.
    described = []
    for path in sorted(root.glob("**/*.yaml")):
        model = _taming_model(path)
        if model is not None:
            described.append((path, model))
    if len(described) != 1:
        raise WeightsError(
            f"{root}: holds {len(described)} .yaml files with a model.params.ddconfig, not one; put the one of "
            f"{file.name} beside it"
        )
    path, model = described[0]
    kind = str(model.get("target", "VQModel")).rpartition(".")[2]
    if kind not in ("VQModel", "VQModelInterface"):
        raise WeightsError(
            f"{path}: {kind} does not take the nearest code, so VQModel cannot; give a VQModel of taming"
        )
    config = _validated(_Taming, model["params"], path)
    net = config.ddconfig
    levels = len(net.ch_mult)
    network = _Network(
        first=net.ch,
        channels=[net.ch * factor for factor in net.ch_mult],
        attention=_attention(net.attn_resolutions, net.resolution, levels),
        mid_attention=True,
        blocks=net.num_res_blocks,
        latents=net.z_channels,
        codebook=(config.n_embed, config.embed_dim),
        size_px=net.resolution,
    )
    network.check(path)
    stored = read_tensors(file, keys=("state_dict",), inert=_LIGHTNING)
    tensors = {}
    for name, tensor in stored.items():
        if not name.startswith("loss."):  # the discriminator
            tensors[name] = tensor
    return _Checkpoint("taming", file, network, tensors, partial(_muse_name, levels), True)


def _read_llamagen(file: Path) -> _Checkpoint:
    tensors = read_tensors(file, keys=("ema", "model"))
    tensors.pop("quantize.codebook_used", None)  # a statistic of training
    # The file has no configuration: its architecture is read from the names and shapes of its tensors.
    channels: list[int] = []
    while (name := f"encoder.conv_blocks.{len(channels)}.res.0.conv2.weight") in tensors:
        channels.append(tensors[name].shape[0])
    if not channels:
        raise WeightsError(f"{file}: has no encoder.conv_blocks, so is no VQ of LlamaGen; give another checkpoint")
    first_level = re.compile(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight")
    blocks = sum(first_level.fullmatch(name) is not None for name in tensors)
    codes, dimensions = _shape(tensors, file, "quantize.embedding.weight", 2)
    network = _Network(
        first=_shape(tensors, file, "encoder.conv_in.weight", 4)[0],
        channels=channels,
        attention=[False] * (len(channels) - 1) + [True],
        mid_attention=True,
        blocks=blocks,
        latents=_shape(tensors, file, "encoder.conv_out.weight", 4)[0],
        codebook=(codes, dimensions),
        size_px=_LLAMAGEN_PX,
    )
    network.check(file)
    return _Checkpoint("llamagen", file, network, tensors, partial(_llamagen_name, len(channels)), True)


def _taming_model(path: Path) -> dict[str, Any] | None:
    """Return ``model`` of a configuration, or None where it does not describe an autoencoder."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read ({one_line(error)}); get it again") from error
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        return None
    params = model.get("params")
    return model if isinstance(params, dict) and "ddconfig" in params else None


def _validated(model: type[M], values: dict[str, Any], file: Path) -> M:
    """Return ``values`` of ``file`` as a ``model``. Raises WeightsError naming the first key that is not supported."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        value = "is missing" if first["type"] == "missing" else f"is {first['input']!r:.60}"
        raise WeightsError(
            f"{file}: {key} {value}, which a VQModel cannot be ({first['msg']}); give another"
        ) from error


def _attention(resolutions: Sequence[int], size_px: int, levels: int) -> list[bool]:
    """Return whether each level attends: muse and taming list the sides, in pixels, of the levels that do."""
    return [size_px // 2**level in resolutions for level in range(levels)]


def _muse_name(levels: int, name: str) -> str:
    """Return muse's and taming's name of VQModel's tensor ``name``. Their decoder counts levels from the picture."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for ours, theirs in _PARTS.items():
        name = name.replace(ours, theirs)
    return name


def _llamagen_name(levels: int, name: str) -> str:
    """Return LlamaGen's name of VQModel's tensor ``name``. Its decoder counts levels as VQModel's does."""
    name = _muse_name(levels, name)
    name = re.sub(r"mid\.(block_1|attn_1|block_2)", lambda match: f"mid.{_MIDDLE.index(match[1])}", name)
    name = re.sub(r"decoder\.up\.(\d+)", lambda match: f"decoder.conv_blocks.{levels - 1 - int(match[1])}", name)
    return name.replace("encoder.down.", "encoder.conv_blocks.").replace(".block.", ".res.")


def _stored_shape(name: str, shape: Shape) -> Shape:
    """Return the shape of VQModel's tensor ``name`` in a checkpoint, where projections are convolutions of 1x1."""
    return (*shape, 1, 1) if re.search(r"\.to_(q|k|v|out\.0)\.weight$", name) else shape


def _shape(tensors: dict[str, Tensor], file: Path, name: str, rank: int) -> Shape:
    shape = tuple(tensors[name].shape) if name in tensors else ()
    if len(shape) != rank:
        raise WeightsError(f"{file}: {name} is {list(shape) or 'missing'}; get the checkpoint again, or give another")
    return shape
