"""Convert Stable Diffusion in one file (LDM's layout) to the diffusers folder that ``load_prior`` reads.

diffusers maps the names; this module checks that every tensor is present, fits, and is used. The text encoder is not
written: it is evaluated once, for the empty prompt, whose ids are known without a tokenizer. A file does not record
whether its UNet predicts epsilon or v, so the UNet itself is probed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from covray.config import EngineConfig, PriorConfig
from covray.errors import ConfigError, WeightsError, one_line
from covray.io import storage
from covray.io.model_folders import local_path, require_files
from covray.io.tensor_files import new_folder, read_tensors, require_finite, require_new, require_tensors
from covray.models.diffusion.empty_prompt import CONTEXT_FILE, TOKENIZER_FILES, prompt_ids
from covray.models.diffusion.prior import load_prior, probe_prediction, read_config, verify_scale

Tensors = dict[str, Tensor]
_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = "cond_stage_model.transformer."
_OPEN_CLIP = "cond_stage_model.model."
_FIRST_KEY = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # [channels, width of the prompt]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Configs:
    """The configurations of the three networks and of the scheduler."""

    layout: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    scheduler: dict[str, Any]
    tokenizer: Path | None = None
    """Folder of the tokenizer that belongs to the text encoder, where there is one."""
    v_sample_size: int | None = None
    """The UNet's ``sample_size`` if the probe finds that it predicts v; None where that makes no difference."""


@dataclass(frozen=True)
class ConvertedPrior:
    """What was converted; the keys of ``covray convert prior --json``."""

    layout: str
    out: str
    parameters: int
    prediction_type: str
    size_px: int
    context: tuple[int, ...]
    """Shape of the encoded empty prompt."""


_PUBLISHED_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_PUBLISHED_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
PUBLISHED = {
    768: Configs(
        "Stable Diffusion 1",
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae=_PUBLISHED_VAE,
        text={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
        scheduler=_PUBLISHED_SCHEDULER,
    ),
    1024: Configs(
        "Stable Diffusion 2",
        unet={
            "sample_size": 64,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae=_PUBLISHED_VAE,
        text={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,  # of 24: the prompt is the output of the last but one
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        scheduler=_PUBLISHED_SCHEDULER,
        v_sample_size=96,
    ),
}
"""By the width of the prompt. Keys that are absent have the defaults of diffusers and transformers."""


def convert_prior(source: str, out: str, like: str | None = None) -> ConvertedPrior:
    """Write the checkpoint ``source`` as a prior folder, and return what was converted.

    Weights keep their type. Memory is that of UNet and VAE in float32.

    Args:
        source: A ``.safetensors`` file with UNet, VAE and text encoder in LDM's layout. Its other tensors, as averaged
            weights (``model_ema``), are left out.
        out: A new folder.
        like: A diffusers folder whose ``config.json`` files describe the networks and the scheduler, and whose
            tokenizer, if it has one, pads the prompt. Without it the file must be a Stable Diffusion 1 or 2.

    Raises:
        WeightsError: The file is damaged, is none of these, or would be refused by ``load_prior``.
        ConfigError: ``out``, ``source`` or ``like`` cannot be used.
    """
    file, target = local_path(source), local_path(out)
    # Refused before a file of gigabytes is read.
    require_new(target)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a downloaded checkpoint")
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{file}: is not a .safetensors file; get the checkpoint as one, or as a folder of diffusers"
        )
    tensors = read_tensors(file)
    configs = _recognise(file, tensors) if like is None else _read_configs(local_path(like))
    unet, unet_tensors = _network(file, "unet", UNet2DConditionModel, configs.unet, _part(tensors, _UNET))
    vae, vae_tensors = _network(file, "vae", AutoencoderKL, configs.vae, _part(tensors, _VAE))
    context = _empty_prompt(file, configs.text, tensors, configs.tokenizer)

    # Written beside its place and renamed: a conversion that fails leaves no half folder.
    with new_folder(target) as folder:
        for subfolder, network, weights in (("unet", unet, unet_tensors), ("vae", vae, vae_tensors)):
            network.save_config(folder / subfolder)
            save_file(weights, folder / subfolder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        # The encoded prompt stands in for the text encoder.
        save_file({"context": context}, folder / CONTEXT_FILE)
        prediction_type = _write_scheduler(file, folder, configs.scheduler)
        # Stable Diffusion 2 was released at two sizes; the one that predicts v is the larger.
        if prediction_type == "v_prediction" and configs.v_sample_size is not None:
            unet.register_to_config(sample_size=configs.v_sample_size)
            unet.save_config(folder / "unet")
    parameters = 0
    for tensor in (*unet_tensors.values(), *vae_tensors.values()):
        parameters += tensor.numel()
    return ConvertedPrior(
        layout=configs.layout,
        out=out,
        parameters=parameters,
        prediction_type=prediction_type,
        size_px=unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1),
        context=tuple(context.shape),
    )


def _recognise(file: Path, tensors: Tensors) -> Configs:
    """Return the configurations of Stable Diffusion 1 or 2, by the width of the prompt."""
    # A cross-attention's key projection: its second side is the width of the prompt.
    key = tensors.get(_FIRST_KEY)
    if key is None or key.ndim != 2:
        raise WeightsError(
            f"{file}: has no {_FIRST_KEY}, so is not a Stable Diffusion 1 or 2 in one file; give one, or --like FOLDER"
        )
    width = key.shape[1]
    if width not in PUBLISHED:
        known = " or ".join(map(str, PUBLISHED))
        raise WeightsError(f"{file}: reads prompts of width {width}, not {known}; give --like FOLDER for its configs")
    return PUBLISHED[width]


def _read_configs(folder: Path) -> Configs:
    """Return the configurations of a diffusers folder."""
    names = {}
    for network in ("unet", "vae", "text_encoder"):
        names[network] = f"{network}/config.json"
    names["scheduler"] = "scheduler/scheduler_config.json"
    if not folder.is_dir():
        raise ConfigError(f"--like {folder}: no such folder; give one of diffusers")
    require_files(folder, names.values())
    values = {part: read_config(folder / name) for part, name in names.items()}
    tokenizer: Path | None = folder / "tokenizer"
    if not any((folder / "tokenizer" / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = None
    return Configs(
        layout=f"like {folder}",
        unet=values["unet"],
        vae=values["vae"],
        text=values["text_encoder"],
        scheduler=values["scheduler"],
        tokenizer=tokenizer,
    )


def _network(file: Path, name: str, kind: Any, config: dict[str, Any], part: Tensors) -> tuple[Any, Tensors]:
    """Return a network of class ``kind`` without weights, and its weights by diffusers' names.

    Args:
        file: The checkpoint, for messages.
        name: ``unet`` or ``vae``.
        kind: The class, of diffusers.
        config: Its configuration.
        part: The network's tensors by LDM's names.
    """
    convert = convert_ldm_unet_checkpoint if kind is UNet2DConditionModel else convert_ldm_vae_checkpoint
    network = _weightless(name, lambda: kind.from_config(config))
    return network, _renamed(file, name, network, part, lambda: convert(part, network.config))


def _weightless(name: str, build: Callable[[], Any]) -> Any:
    """Return the network that ``build`` makes, without memory. Raises WeightsError for a configuration of none."""
    try:
        # "meta" tensors have shapes and no memory: the weights come from the file.
        with torch.device("meta"):
            return build()
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        raise WeightsError(f"{name}/config.json: describes no network ({one_line(e)}); give another --like") from e


def _renamed(
    file: Path, network_name: str, network: Any, part: Tensors, convert: Callable[[], Mapping[str, Tensor | None]]
) -> Tensors:
    """Return what ``convert`` makes of ``part``, after checking that it is all of ``network`` from all of ``part``.

    Args:
        file: The checkpoint, for messages.
        network_name: ``unet``, ``vae`` or ``text_encoder``.
        network: The network that the tensors must fit, without memory.
        part: The network's tensors by LDM's names.
        convert: Returns the tensors of ``part`` by the names of diffusers or transformers.

    Raises:
        WeightsError: A tensor is missing, unexpected, unused, of another shape or type, or not finite.
    """
    try:
        converted = {}
        for name, tensor in convert().items():
            if tensor is not None:  # how some converters mark what a network has no place for
                converted[name] = tensor
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{file}: its {network_name} is not complete ({type(error).__name__}: {one_line(error)}); get the "
            "checkpoint again"
        ) from error
    # All three networks have tensors of one name, which messages must tell apart.
    shapes = _named_shapes(network_name, converted)
    require_tensors(file, shapes, _named_shapes(network_name, network.state_dict()))
    # The converters pass over what they do not know, and take the first pixel of a kernel where they expect only one.
    # The text encoder's fused projections are copied into three tensors, whose shapes were checked.
    # A renamed tensor is a view of the file's: what is used is found by its address.
    used = {tensor.data_ptr(): tensor.numel() for tensor in converted.values()}
    for name, tensor in part.items():
        if tensor.dtype not in _DTYPES:
            raise WeightsError(f"{file}: {name} is of type {tensor.dtype}; get the checkpoint in float16 or float32")
        require_finite(file, name, tensor)
        if used.get(tensor.data_ptr()) != tensor.numel() and "attn.in_proj_" not in name:
            raise WeightsError(f"{file}: {name} is not used; give --like a folder of this architecture")
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _named_shapes(network: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by their names with ``network`` before them."""
    return {f"{network}.{name}": tuple(tensor.shape) for name, tensor in tensors.items()}


def _part(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with ``prefix``."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.inference_mode()
def _empty_prompt(file: Path, config: dict[str, Any], tensors: Tensors, tokenizer: Path | None = None) -> Tensor:
    """Return the text encoder's answer to the empty prompt, float32 [1, n, d].

    Args:
        file: The checkpoint, for messages.
        config: Of the text encoder. OpenCLIP's last layer is left out of the prompt: ``config`` counts the others.
        tensors: Of the checkpoint, by their names in it.
        tokenizer: Folder of the model's own tokenizer; None is CLIP's vocabulary, padded as ``_pad_id`` says.
    """
    encoder = _weightless("text_encoder", lambda: CLIPTextModel(CLIPTextConfig.from_dict(config)))
    open_clip = f"{_OPEN_CLIP}ln_final.weight" in tensors
    part = _text_tensors(file, encoder.config.num_hidden_layers, tensors, open_clip)

    def convert() -> Mapping[str, Tensor | None]:
        named = convert_open_clip_checkpoint(encoder, part) if open_clip else convert_ldm_clip_checkpoint(part)
        return {name.removeprefix("text_model."): tensor for name, tensor in named.items()}

    weights = _renamed(file, "text_encoder", encoder, part, convert)
    in_float32 = {name: tensor.float() for name, tensor in weights.items()}
    encoder.load_state_dict(in_float32, assign=True)
    length, words = encoder.config.max_position_embeddings, encoder.config.vocab_size
    if tokenizer is not None:
        ids = prompt_ids(tokenizer, length, words)
    else:
        begin, end = words - 2, words - 1  # CLIP's vocabulary ends so; its configurations are known to say otherwise
        ids = torch.tensor([[begin, end, *[_pad_id(encoder.config, open_clip)] * (length - 2)]])
    positions = torch.arange(ids.shape[1])[None]  # the encoder's own were never filled
    context: Tensor = encoder.eval()(ids, position_ids=positions).last_hidden_state
    return context.contiguous()


def _text_tensors(file: Path, layers: int, tensors: Tensors, open_clip: bool) -> Tensors:
    """Return the tensors of the text encoder that the prompt depends on, with ``layers`` layers."""
    if open_clip:
        # Layers from the config's count on do not reach the prompt; a checkpoint has all of them.
        left_out = f"{_OPEN_CLIP}transformer.resblocks.{layers}."
        unused = {f"{_OPEN_CLIP}{name}" for name in ("text_projection", "logit_scale", "attn_mask")}
        part = {}
        for name, tensor in _part(tensors, _OPEN_CLIP).items():
            if not name.startswith(left_out):
                part[name] = tensor
    else:
        part = _part(tensors, _CLIP)
        unused = {f"{_CLIP}{name}embeddings.position_ids" for name in ("", "text_model.")}
    part = {name: tensor for name, tensor in part.items() if name not in unused}
    if not part:
        raise WeightsError(f"{file}: has no text encoder (cond_stage_model); give a checkpoint with all three networks")
    return part


def _pad_id(config: CLIPTextConfig, open_clip: bool) -> int:
    """Return the id that the family's tokenizer pads with.

    OpenAI's CLIP (Stable Diffusion 1) pads with the end of text, OpenCLIP (2) with "!", id 0. Where its tensors have
    transformers' names, OpenCLIP shows by its activation: it has the exact GELU where CLIP has ``quick_gelu``.
    """
    return 0 if open_clip or config.hidden_act == "gelu" else config.vocab_size - 1


def _write_scheduler(file: Path, folder: Path, scheduler: dict[str, Any]) -> str:
    """Load what was written to ``folder``, and write the scheduler of what its UNet predicts, which is returned."""
    path = str(folder / "scheduler" / "scheduler_config.json")
    # What the UNet predicts is probed below; until then the usual kind stands here.
    storage.write_json(path, scheduler | {"prediction_type": "epsilon"})
    try:
        prior = load_prior(PriorConfig(path=str(folder)), EngineConfig(device="cpu", dtype="float32"), verify=False)
    except (ConfigError, WeightsError) as error:
        # The message is of the folder that is being written, which the user has not named.
        raise type(error)(str(error).replace(str(folder), str(file))) from error
    prediction_type, _ = probe_prediction(prior, file)
    verify_scale(prior, file)
    storage.write_json(path, scheduler | {"prediction_type": prediction_type})
    return prediction_type
