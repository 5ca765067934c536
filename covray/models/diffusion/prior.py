"""The diffusion prior: a diffusers folder with UNet, VAE and scheduler, used without text and without guidance."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from covray.config import EngineConfig, PriorConfig, require_compiler
from covray.config.section import JsonObject
from covray.errors import ConfigError, WeightsError, one_line
from covray.io.device import resolve_device
from covray.io.model_folders import fingerprint_folder, require_files, require_whole, resolve_folder
from covray.io.tensor_files import require_stored_floats, weight_files
from covray.models.diffusion.empty_prompt import CONTEXT_FILE, TOKENIZER_FILES, cache_context, load_context
from covray.models.diffusion.schedule import Schedule, make_schedule

_WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU_BATCH = 32
GPU_BATCHES = (8, 16, 32, 64, 128, 256)
PROBE_LATENTS = 16
"""Side of the latents of the probe pictures: 128 px for Stable Diffusion."""
_CONDITIONS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
"""Keys of a UNet's configuration that are set where it needs more than a latent, a timestep and a prompt."""
LATENT_STD = (0.4, 2.5)
"""Bounds of the standard deviation of the probe pictures' latents: nano's is 1.06, a Stable Diffusion's without its
factor about 5.5."""


def _model_patterns(subfolder: str, stem: str) -> tuple[str, ...]:
    """Return patterns of one model's files, whole or sharded. Variants (fp16, non-EMA) beside them are not read."""
    return (
        f"{subfolder}/config.json",
        f"{subfolder}/{stem}.safetensors",
        f"{subfolder}/{stem}-*-of-*.safetensors",
        f"{subfolder}/{stem}.safetensors.index.json",
    )


NETWORK_PATTERNS = (
    *_model_patterns("unet", "diffusion_pytorch_model"),
    *_model_patterns("vae", "diffusion_pytorch_model"),
    "scheduler/scheduler_config.json",
)
TEXT_PATTERNS = (*_model_patterns("text_encoder", "model"), "tokenizer/*.json", "tokenizer/merges.txt")


@dataclass(frozen=True, eq=False)
class Contexts:
    """What a UNet reads beside each of B rows."""

    states: torch.Tensor
    """[B, n, d], padded."""
    mask: torch.Tensor
    """bool [B, n]: False where it is padding."""

    @classmethod
    def of(cls, states: Sequence[torch.Tensor], tokens: int) -> Contexts:
        """Return contexts padded to ``tokens``, of ``states`` [n <= tokens, d] each."""
        padded = torch.zeros((len(states), tokens, states[0].shape[-1]), device=states[0].device)
        mask = torch.zeros((len(states), tokens), dtype=torch.bool, device=padded.device)
        for number, own in enumerate(states):
            padded[number, : len(own)] = own
            mask[number, : len(own)] = True
        return cls(padded, mask)

    def rows(self, numbers: Sequence[int]) -> Contexts:
        """Return those of some rows."""
        return Contexts(self.states[numbers], self.mask[numbers])


@dataclass(frozen=True, eq=False)
class Prior:
    """A loaded prior, ready to evaluate. Latents are float32 everywhere; ``dtype`` is the networks' arithmetic."""

    unet: Any
    vae: Any
    schedule: Schedule
    context: torch.Tensor
    """The embedding of the empty prompt [1, n, d]. Its keys and values are cached inside ``unet``."""
    size_px: int
    latent_shape: tuple[int, int, int]
    """(c, h, w) of one latent."""
    device: torch.device
    dtype: torch.dtype
    fingerprint: str

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: ``epsilon`` or ``v_prediction``."""
        return self.schedule.prediction_type

    @torch.inference_mode()
    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, contexts: Contexts | None = None) -> torch.Tensor:
        """Return the UNet's output, float32 [B, c, h, w].

        Args:
            latents: [B, c, h, w].
            timesteps: Integers [B].
            contexts: What the UNet reads beside each row, after ``read_contexts``; None: the empty prompt.
        """
        inputs = latents.to(self.dtype)
        if contexts is None:
            context = self.context.expand(len(latents), -1, -1)
            return self.unet(inputs, timesteps, context, return_dict=False)[0].float()
        states, mask = contexts.states.to(self.dtype), contexts.mask
        return self.unet(inputs, timesteps, states, encoder_attention_mask=mask, return_dict=False)[0].float()

    def read_contexts(self) -> None:
        """Let the UNet read a context of each row's own: it forgets the keys and values of the empty prompt."""
        from diffusers.models.attention_processor import AttnProcessor2_0  # where it is needed: it takes seconds

        self.unet.set_attn_processor(AttnProcessor2_0())

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return latents, float32 [B, c, h, w], the mean of the VAE's posterior, of uint8 pictures [B, S, S, 3]."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1.0  # channels_last by its strides
        # The mean and no sample: the latent of a picture must not depend on chance.
        mean = self.vae.encode(pixels).latent_dist.mean.float()
        return (mean - self._shift) * self.vae.config.scaling_factor

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pictures, uint8 [B, S, S, 3], of latents [B, c, h, w], and whether each is finite, bool [B]."""
        latents = latents / self.vae.config.scaling_factor + self._shift
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        pixels = self.vae.decode(latents, return_dict=False)[0].float().permute(0, 2, 3, 1)
        finite = pixels.isfinite().flatten(1).all(1)
        # NaN has no byte: such a pixel becomes grey, and ``finite`` tells.
        scaled = (pixels.nan_to_num(0.0) * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0
        return scaled.round().to(torch.uint8), finite

    @property
    def _shift(self) -> float:
        return self.vae.config.shift_factor or 0.0


def load_prior(config: PriorConfig, engine: EngineConfig, *, verify: bool = True) -> Prior:
    """Load a prior folder onto the engine's device.

    The folder has the diffusers layout: ``unet/``, ``vae/``, ``scheduler/`` and either ``empty_prompt.safetensors`` (a
    tensor ``context`` [1, n, d]) or ``text_encoder/`` and ``tokenizer/`` (CLIP), from which the context is computed
    once. Only safetensors are read.

    Args:
        config: Which prior, at which size, with how many steps.
        engine: Device, type of arithmetic, and whether to compile.
        verify: Also check the network itself, see ``verify_prior``.

    Raises:
        WeightsError: The folder is missing or incomplete, or contradicts itself.
        ConfigError: The size, the number of steps, the device or the compilation is not possible.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel  # where it is needed: it takes seconds

    folder = find_prior(config)
    device, dtype = resolve_device(engine)
    if engine.compile:
        require_compiler("engine.compile", device.type)
    schedule = read_schedule(folder, config)
    unet = _load_model(UNet2DConditionModel, folder / "unet", device, dtype)
    vae = _load_model(AutoencoderKL, folder / "vae", device, dtype)
    context = load_context(folder).to(device, dtype)
    _require_agreement(folder, unet, vae, context)

    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    sample_size = unet.config.sample_size
    if config.size_px is None and not isinstance(sample_size, int):
        raise ConfigError(
            f"prior.size_px: {folder}/unet/config.json has sample_size {sample_size}, not one side; set it"
        )
    size_px = config.size_px or sample_size * factor
    if size_px % factor:
        raise ConfigError(f"prior.size_px: {size_px} is not a multiple of {factor}, the downsampling of {folder}/vae")
    cache_context(unet, context)
    prior = Prior(
        unet=unet,
        vae=vae,
        schedule=schedule.to(device),
        context=context,
        size_px=size_px,
        latent_shape=(unet.config.in_channels, size_px // factor, size_px // factor),
        device=device,
        dtype=dtype,
        fingerprint=fingerprint_prior(folder),
    )
    if verify:
        verify_prior(prior, folder)
    if engine.compile:
        # The batch has one shape for the whole build, so the shapes are compiled in. On a CPU a step takes 14% less
        # time, after half a minute at the start.
        unet.compile(dynamic=False)
    return prior


def fingerprint_prior(folder: Path) -> str:
    """Return a SHA-256 (hex) over the files of a prior folder that decide its numbers; no tensor is loaded."""
    prompt_patterns = (CONTEXT_FILE,) if (folder / CONTEXT_FILE).is_file() else TEXT_PATTERNS
    return fingerprint_folder(folder, (*NETWORK_PATTERNS, *prompt_patterns))


def verify_prior(prior: Prior, where: str | Path = "prior") -> None:
    """Check that prediction type and scaling factor belong to the weights. Raises WeightsError.

    With a wrong one everything runs, and the frames are noise.
    """
    probed, slope = probe_prediction(prior, where)
    if probed != prior.prediction_type:
        raise WeightsError(
            f"{where}: scheduler_config.json says prediction_type {prior.prediction_type}, but the UNet answers noise "
            f"like {probed} (slope {slope:.2f}); use the scheduler that belongs to these weights"
        )
    verify_scale(prior, where)


def probe_prediction(prior: Prior, where: str | Path = "prior") -> tuple[str, float]:
    """Return what the UNet predicts, ``epsilon`` or ``v_prediction``, by its answer to noise, and that answer's slope.

    At the last training timestep a latent is nearly all noise. A network that predicts the noise therefore answers with
    its input (slope near 1), and one that predicts v nearly with minus the picture (slope near 0; Salimans & Ho,
    arXiv:2202.00512). Raises WeightsError for an answer that is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((4, *prior.latent_shape), generator=generator).to(prior.device)
    noise = noise.contiguous(memory_format=torch.channels_last)
    timesteps = torch.full((len(noise),), prior.schedule.train_timesteps - 1, device=prior.device)
    output = prior.predict(noise, timesteps)
    if not bool(output.isfinite().all()):
        raise WeightsError(f"{where}: the UNet answers Gaussian noise with values that are not finite; get it again")
    # Least squares of the answer on the noise, through the origin.
    slope = float((output * noise).sum() / noise.square().sum())
    return ("epsilon" if slope > 0.5 else "v_prediction"), slope


def verify_scale(prior: Prior, where: str | Path = "prior") -> None:
    """Check that the scaling factor brings the VAE's latents near unit variance, as the UNet expects them.

    There are only two pictures, so the bounds are wide: they find a factor that is absent or of another family of VAEs
    (a Stable Diffusion's is 0.18215), not one that is slightly wrong. Raises WeightsError.
    """
    side = PROBE_LATENTS * (prior.size_px // prior.latent_shape[-1])
    deviation = float(prior.encode(torch.from_numpy(probe_pictures(side))).std())
    if not LATENT_STD[0] <= deviation <= LATENT_STD[1]:  # nan is in no bounds either
        factor = prior.vae.config.scaling_factor
        raise WeightsError(
            f"{where}: with scaling_factor {factor:g} the VAE's latents have a standard deviation of {deviation:.2f}, "
            "not near 1; use the vae/config.json that belongs to these weights"
        )


def probe_pictures(size_px: int) -> np.ndarray:
    """Return two pictures, uint8 [2, size_px, size_px, 3]: shades, edges and texture as in a photo, and flat areas.

    They are computed in whole numbers only, so that they are the same to the bit on every machine.
    """
    y, x = np.mgrid[:size_px, :size_px] * 256 // size_px
    disc = ((x - 96) ** 2 + (y - 112) ** 2 < 64**2)[..., None]
    checks = ((x // 16 + y // 16) % 2 * (x > 144))[..., None] > 0
    shades = np.stack([x, (x + y) // 2, 255 - y], axis=-1)
    background = np.where(checks, (60, 40, 20), shades)
    photo = np.where(disc, 255 - shades, background)
    halves = np.where(x[..., None] > 144, (244, 232, 32), (32, 96, 160))
    label = np.where(disc, (220, 20, 60), halves)
    return np.stack([photo, label]).astype(np.uint8)


def propose_batch(prior: Prior) -> int:
    """Return the rows of the UNet's batch for this machine.

    On a CPU it is a constant; on a GPU the smallest of the doubling sizes that fit in memory whose samples a second are
    within 3% of the best. Raises ConfigError where not even the smallest fits.
    """
    if prior.device.type == "cpu":
        return CPU_BATCH  # 64 rows are slower: activations leave the cache
    speeds: dict[int, float] = {}
    with torch.compiler.set_stance("force_eager"):  # compiling every size would take longer than it could save
        for size in GPU_BATCHES:
            try:
                speeds[size] = size / _time_prediction(prior, size)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
    if not speeds:
        raise ConfigError(f"engine.batch: not even {GPU_BATCHES[0]} rows fit in the GPU's memory; set a smaller one")
    return smallest_good_batch(speeds)


def smallest_good_batch(speeds: dict[int, float]) -> int:
    """Return the smallest batch whose samples a second (``speeds`` by batch) are within 3% of the best."""
    # Smaller ones are as fast within the noise of the clock, and leave memory and less padding.
    enough = 0.97 * max(speeds.values())
    return min(size for size, speed in speeds.items() if speed >= enough)


def _time_prediction(prior: Prior, size: int, repetitions: int = 3) -> float:
    """Return the seconds that one prediction of ``size`` rows takes on a GPU."""
    latents = torch.zeros((size, *prior.latent_shape), device=prior.device)
    latents = latents.contiguous(memory_format=torch.channels_last)
    timesteps = torch.zeros(size, dtype=torch.int64, device=prior.device)
    # Once without the clock: the first call with a shape chooses kernels and takes memory.
    prior.predict(latents, timesteps)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        prior.predict(latents, timesteps)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repetitions


def find_prior(config: PriorConfig) -> Path:
    """Return the local folder of a prior, which is complete; a hub id is downloaded.

    Raises:
        WeightsError: The folder is missing or incomplete.
    """
    folder = resolve_folder(config.path, config.revision, "prior", (*NETWORK_PATTERNS, CONTEXT_FILE, *TEXT_PATTERNS))
    require_prior_files(folder)
    return folder


def require_prior_files(folder: Path) -> None:
    """Check that a prior folder is complete. Raises WeightsError naming the first file that is missing."""
    required: list[str | tuple[str, ...]] = ["scheduler/scheduler_config.json"]
    models = [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")]
    if not (folder / CONTEXT_FILE).is_file():
        require_files(folder, [(CONTEXT_FILE, "text_encoder/config.json")])
        required.append(tuple(f"tokenizer/{name}" for name in TOKENIZER_FILES))
        models.append(("text_encoder", "model"))
    for subfolder, stem in models:
        weights = f"{subfolder}/{stem}.safetensors"
        required += [f"{subfolder}/config.json", (weights, f"{weights}.index.json")]
    require_files(folder, required)


def read_schedule(folder: Path, config: PriorConfig) -> Schedule:
    """Return the schedule of a prior folder with the solver of ``config``. Raises WeightsError, ConfigError."""
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    return make_schedule(scheduler, config.steps, config.solver, config.evaluations)


def read_config(file: Path) -> JsonObject:
    """Return the keys and values of a JSON file. Raises WeightsError for a file of anything else."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: is not valid JSON ({one_line(error)}); get the folder again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file}: holds {type(config).__name__}, not keys and values; get the folder again")
    return config


def _load_model(model_class: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be loaded as {model_class.__name__}: {one_line(error)}") from error
    require_whole(folder, report)
    _require_used(folder, report)
    require_stored_floats(weight_files(folder, (f"{_WEIGHTS}.index.json", _WEIGHTS)))  # as diffusers chooses
    # channels_last: 4% less time a step on a CPU at batch 32, and the layout of a GPU's tensor cores.
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def _require_used(folder: Path, report: Mapping[str, Collection[str]]) -> None:
    # diffusers passes over them: a network with fewer layers than its weights have would compute something else.
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        raise WeightsError(
            f"{folder}: {len(unexpected)} tensors are not part of what config.json describes, {unexpected[0]} among "
            "them; use the config.json that belongs to these weights"
        )


def _require_agreement(folder: Path, unet: Any, vae: Any, context: torch.Tensor) -> None:
    for key in _CONDITIONS:
        if unet.config[key] is not None:
            raise WeightsError(
                f"{folder}/unet: {key} is {unet.config[key]!r}; covray runs UNets without conditions, give another"
            )
    for key in ("latents_mean", "latents_std"):
        if vae.config[key] is not None:
            raise WeightsError(
                f"{folder}/vae: has {key} for every channel, covray knows one scaling factor; give another"
            )
    channels = vae.config.latent_channels
    if not unet.config.in_channels == unet.config.out_channels == channels:
        raise WeightsError(
            f"{folder}: the UNet has {unet.config.in_channels} input and {unet.config.out_channels} output channels, "
            f"the VAE {channels} latent channels; use the VAE that belongs to the UNet"
        )
    width = unet.config.cross_attention_dim
    if width != context.shape[-1]:
        raise WeightsError(
            f"{folder}: the empty prompt is {context.shape[-1]} wide, the UNet's cross_attention_dim is {width}; "
            "use the text encoder that belongs to the UNet"
        )
