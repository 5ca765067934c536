from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from covray.config import EngineConfig, PriorConfig
from covray.errors import ConfigError, WeightsError
from covray.models.diffusion.prior import (
    Prior,
    fingerprint_prior,
    load_prior,
    probe_pictures,
    propose_batch,
    smallest_good_batch,
    verify_prior,
    verify_scale,
)

CPU = EngineConfig(device="cpu")


def load(folder: Path, engine: EngineConfig = CPU, **settings: int) -> Prior:
    return load_prior(PriorConfig(path=str(folder), **{"steps": 5} | settings), engine, verify=False)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def random_input(prior: Prior, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((count, *prior.latent_shape), generator=generator), torch.tensor([1, 501, 981])[:count]


def test_a_folder_says_its_shapes(prior_folder: Path) -> None:
    prior = load(prior_folder)
    assert prior.size_px == 32
    assert prior.latent_shape == (4, 8, 8)
    assert prior.prediction_type == "epsilon"
    assert prior.schedule.timesteps.tolist() == [[801, 601, 401, 201, 1], [1, 201, 401, 601, 801]]
    assert load(prior_folder, size_px=64).latent_shape == (4, 16, 16)


def test_the_cached_context_answers_like_the_stock_network(prior_folder: Path) -> None:
    prior = load(prior_folder)
    stock = UNet2DConditionModel.from_pretrained(prior_folder / "unet").eval()
    latents, timesteps = random_input(prior)
    context = load_file(prior_folder / "empty_prompt.safetensors")["context"]
    with torch.inference_mode():
        expected = stock(latents, timesteps, context.expand(3, -1, -1)).sample
        elsewhere = stock(latents, timesteps, context.expand(3, -1, -1) + 1).sample
    torch.testing.assert_close(prior.predict(latents, timesteps), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, elsewhere, atol=1e-3)  # the context does matter


def test_half_precision_weights_are_computed_in_float32(prior_folder: Path) -> None:
    full = load(prior_folder)
    for room in ("unet", "vae"):
        file = prior_folder / room / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    half = load(prior_folder)
    latents, timesteps = random_input(full)
    assert half.predict(latents, timesteps).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in half.unet.parameters())
    torch.testing.assert_close(half.predict(latents, timesteps), full.predict(latents, timesteps), rtol=1e-2, atol=1e-2)


def test_bfloat16_keeps_latents_in_float32(prior_folder: Path) -> None:
    prior = load(prior_folder, EngineConfig(device="cpu", dtype="bfloat16"))
    latents, timesteps = random_input(prior)
    output = prior.predict(latents, timesteps)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, load(prior_folder).predict(latents, timesteps), rtol=0.1, atol=0.1)
    picture, finite = prior.decode(prior.encode(torch.zeros((1, 32, 32, 3), dtype=torch.uint8)))
    assert picture.dtype == torch.uint8
    assert finite.tolist() == [True]


def test_scale_and_shift_of_the_vae_are_undone(prior_folder: Path) -> None:
    """Latents are (mean - shift) * scale, and decoding takes both back: pictures do not depend on them."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    edit(prior_folder / "vae" / "config.json", scaling_factor=1.0, shift_factor=None)
    plain = load(prior_folder)
    edit(prior_folder / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.25)
    moved = load(prior_folder)
    torch.testing.assert_close(moved.encode(images), (plain.encode(images) - 0.25) * 0.5)
    difference = plain.decode(plain.encode(images))[0].int() - moved.decode(moved.encode(images))[0].int()
    assert int(difference.abs().max()) <= 1


def test_decoding_reports_what_is_not_finite(prior_folder: Path) -> None:
    prior = load(prior_folder)
    latents = torch.zeros((2, *prior.latent_shape))
    latents[1, 0, 0, 0] = torch.nan
    assert prior.decode(latents)[1].tolist() == [True, False]


def write_text_encoder(prior_folder: Path, pad_token: str, mapped: str | None = None) -> CLIPTextModel:
    """Tokenizer and text encoder of four words in place of the embedding: 0 is "!", 2 begins, 3 ends.

    ``mapped``: the padding by ``special_tokens_map.json``, which goes before the tokenizer's configuration.
    """
    (prior_folder / "empty_prompt.safetensors").unlink()
    tokenizer = prior_folder / "tokenizer"
    tokenizer.mkdir()
    words = {"!": 0, "!</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (tokenizer / "vocab.json").write_text(json.dumps(words))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad_token}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 6, "unk_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | special))
    if mapped is not None:
        (tokenizer / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": mapped}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=4,
            hidden_size=24,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=6,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
        encoder = CLIPTextModel(config).eval()
    encoder.save_pretrained(prior_folder / "text_encoder")
    return encoder


@torch.inference_mode()
def test_the_empty_prompt_comes_from_the_text_encoder(prior_folder: Path) -> None:
    encoder = write_text_encoder(prior_folder, "!")
    expected = encoder(torch.tensor([[2, 3, 0, 0, 0, 0]])).last_hidden_state
    torch.testing.assert_close(load(prior_folder).context, expected)
    file = prior_folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("fc1.weight"))]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"text_encoder.*fc1\.weight"):
        load(prior_folder)


@pytest.mark.parametrize(
    ("pad_token", "mapped", "pad"),
    [("<|endoftext|>", None, 3), ("!", None, 0), ("<|endoftext|>", "!", 0), ("!", "<|endoftext|>", 3)],
)
@torch.inference_mode()
def test_the_empty_prompt_is_padded_by_the_folders_tokenizer(
    prior_folder: Path, pad_token: str, mapped: str | None, pad: int
) -> None:
    """Stable Diffusion 2's names the end of text in its configuration, and "!" in its map of special tokens."""
    encoder = write_text_encoder(prior_folder, pad_token, mapped)
    expected = encoder(torch.tensor([[2, 3, *[pad] * 4]])).last_hidden_state
    other = encoder(torch.tensor([[2, 3, *[3 - pad] * 4]])).last_hidden_state
    context = load(prior_folder).context
    torch.testing.assert_close(context, expected)
    assert (context - other).abs().max() > 0.01


def test_a_tokenizer_of_another_text_encoder_is_one_line(prior_folder: Path) -> None:
    write_text_encoder(prior_folder, "!")
    words = {"!": 0, "!</w>": 1, "a": 2, "a</w>": 3, "<|startoftext|>": 4, "<|endoftext|>": 5}
    (prior_folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(WeightsError, match=r"tokenizer: pads with id 5, the text encoder has 4 words") as raised:
        load(prior_folder)
    assert "\n" not in str(raised.value)


@torch.inference_mode()
def test_a_folder_like_stable_diffusion_1_5_loads(prior_folder: Path) -> None:
    """Written by libraries of years ago, with more rooms: padded with the end, no scaling factor, PNDM, old names."""
    new = load(prior_folder)
    encoder = write_text_encoder(prior_folder, "<|endoftext|>")
    file = prior_folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(6)[None]}, file, {"format": "pt"})
    for room in ("safety_checker", "feature_extractor"):
        (prior_folder / room).mkdir()
        (prior_folder / room / "config.json").write_text("{}")
    scheduler = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    scheduler |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (prior_folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    file = prior_folder / "vae" / "config.json"
    keys = ("block_out_channels", "down_block_types", "up_block_types", "latent_channels", "norm_num_groups")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: config[key] for key in keys}))
    file = prior_folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, of_old in {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}.items():
        tensors = {key.replace(name, of_old): tensor for key, tensor in tensors.items()}
    assert tensors.keys() != load_file(file).keys()
    save_file(tensors, file, {"format": "pt"})

    old = load(prior_folder)
    expected = encoder(torch.tensor([[2, 3, 3, 3, 3, 3]])).last_hidden_state
    torch.testing.assert_close(old.context, expected)
    assert torch.equal(old.schedule.latent_scale, new.schedule.latent_scale)
    images = torch.from_numpy(probe_pictures(32))
    torch.testing.assert_close(old.encode(images) / 0.18215, new.encode(images) / 6.0)


@pytest.mark.parametrize(
    "missing",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "empty_prompt.safetensors",
    ],
)
def test_a_missing_file_is_named(prior_folder: Path, missing: str) -> None:
    (prior_folder / missing).unlink()
    with pytest.raises(WeightsError, match=missing):
        load(prior_folder)


def test_a_missing_tensor_is_not_made_up(prior_folder: Path) -> None:
    file = prior_folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.weight"]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"conv_out\.weight"):
        load(prior_folder)


def test_a_cut_off_file_is_one_line(prior_folder: Path) -> None:
    file = prior_folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="vae: cannot be loaded") as raised:
        load(prior_folder)
    assert "\n" not in str(raised.value)


def test_parts_that_do_not_belong_together_are_refused(prior_folder: Path) -> None:
    save_file({"context": torch.zeros(1, 5, 25)}, prior_folder / "empty_prompt.safetensors")
    with pytest.raises(WeightsError, match=r"25 wide.*cross_attention_dim is 24"):
        load(prior_folder)
    save_file({"other": torch.zeros(1, 5, 24)}, prior_folder / "empty_prompt.safetensors")
    with pytest.raises(WeightsError, match="named context"):
        load(prior_folder)


def test_a_size_the_vae_cannot_make_is_refused(prior_folder: Path) -> None:
    assert load(prior_folder, size_px=40).latent_shape == (4, 10, 10)
    with pytest.raises(ConfigError, match=r"prior\.size_px: 42"):
        load_prior(PriorConfig.model_construct(path=str(prior_folder), revision=None, size_px=42, steps=5), CPU)


@pytest.mark.parametrize("stated", [None, [8, 12]])
def test_a_unet_that_states_no_side_wants_one(prior_folder: Path, stated: list[int] | None) -> None:
    edit(prior_folder / "unet" / "config.json", sample_size=stated)
    with pytest.raises(ConfigError, match=r"prior\.size_px.*sample_size"):
        load(prior_folder)
    assert load(prior_folder, size_px=64).latent_shape == (4, 16, 16)


def test_a_clipping_scheduler_is_refused(prior_folder: Path) -> None:
    edit(prior_folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    with pytest.raises(WeightsError, match="clip_sample is True"):
        load(prior_folder)


class Answer(torch.nn.Module):
    """A network whose answer is ``slope`` times its input."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def forward(self, latents: torch.Tensor, *_: object, return_dict: bool) -> tuple[torch.Tensor]:
        return (latents * self.slope,)


@pytest.mark.parametrize(
    ("slope", "is_epsilon"),
    [(1.0, True), (0.9, True), (0.07, False), (-0.2, False)],  # a v network answers noise with sqrt(alpha_T) of it
)
def test_the_probe_tells_epsilon_from_v(priors: Callable[[str], Prior], slope: float, is_epsilon: bool) -> None:
    right, wrong = ("epsilon", "v_prediction") if is_epsilon else ("v_prediction", "epsilon")
    verify_prior(replace(priors(right), unet=Answer(slope)))
    with pytest.raises(WeightsError, match=f"says prediction_type {wrong}.*like {right}"):
        verify_prior(replace(priors(wrong), unet=Answer(slope)))


def test_the_probe_finds_what_is_not_finite(priors: Callable[[str], Prior]) -> None:
    with pytest.raises(WeightsError, match="not finite"):
        verify_prior(replace(priors("epsilon"), unet=Answer(float("nan"))))


@pytest.mark.parametrize("factor", [1.0, 1.0 / 6.0, 60.0, 0.0])
def test_a_scaling_factor_of_other_weights_is_refused(prior_folder: Path, factor: float) -> None:
    edit(prior_folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    load_prior(PriorConfig(path=str(prior_folder), steps=5), CPU)
    edit(prior_folder / "vae" / "config.json", scaling_factor=factor)
    with pytest.raises(WeightsError, match=f"scaling_factor {factor:g}.*vae/config.json") as raised:
        load_prior(PriorConfig(path=str(prior_folder), steps=5), CPU)
    assert "\n" not in str(raised.value)


def test_an_absent_scaling_factor_is_stable_diffusions(prior_folder: Path) -> None:
    file = prior_folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    del config["scaling_factor"]
    file.write_text(json.dumps(config))
    prior = load(prior_folder)
    assert prior.vae.config.scaling_factor == 0.18215
    with pytest.raises(WeightsError, match=r"scaling_factor 0\.18215"):
        verify_scale(prior)


def test_probe_pictures_are_neither_flat_nor_alike() -> None:
    for size in (32, 128):
        images = probe_pictures(size)
        assert images.shape == (2, size, size, 3)
        assert images.astype(float).std(axis=(1, 2)).min() > 20
        assert len(np.unique(images[0].reshape(-1, 3), axis=0)) > size * 4
        assert len(np.unique(images[1].reshape(-1, 3), axis=0)) == 3


def test_loading_verifies_unless_told_otherwise(prior_folder: Path) -> None:
    """Random weights do not answer noise with noise: an epsilon prior they are not."""
    with pytest.raises(WeightsError, match="prediction_type epsilon"):
        load_prior(PriorConfig(path=str(prior_folder), steps=5), CPU)
    edit(prior_folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    load_prior(PriorConfig(path=str(prior_folder), steps=5), CPU)


def test_the_fingerprint_is_of_what_is_read(prior_folder: Path) -> None:
    before = fingerprint_prior(prior_folder)
    assert load(prior_folder).fingerprint == before
    (prior_folder / "README.md").write_text("unread")
    (prior_folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"unread")
    assert fingerprint_prior(prior_folder) == before
    seen = {before}
    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "empty_prompt.safetensors",
    ):
        content = bytearray((prior_folder / file).read_bytes())
        content[-2] ^= 1
        (prior_folder / file).write_bytes(content)
        seen.add(fingerprint_prior(prior_folder))
    assert len(seen) == 5


def test_loading_twice_gives_the_same_numbers(prior_folder: Path) -> None:
    one, two = load(prior_folder), load(prior_folder)
    latents, timesteps = random_input(one)
    assert torch.equal(one.predict(latents, timesteps), two.predict(latents, timesteps))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"engine\.compile: .* g\+\+ is not there"):
        load_prior(PriorConfig(path="nano"), EngineConfig(compile=True, device="cpu"))


def test_the_proposed_batch_is_the_smallest_that_is_nearly_best(priors: Callable[[str], Prior]) -> None:
    assert propose_batch(priors("epsilon")) == 32
    assert smallest_good_batch({8: 50.0, 16: 98.0, 32: 100.0, 64: 99.0}) == 16


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("room", ["unet", "vae"])
def test_codes_of_a_quantised_network_are_no_weights(prior_folder: Path, room: str, dtype: torch.dtype) -> None:
    """diffusers loads them as numbers."""
    file = prior_folder / room / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    save_file(tensors | {name: (tensors[name] * 100).to(dtype)}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=rf"{name} is stored as .*; give the weights as they were before") as raised:
        load(prior_folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("room", ["unet", "vae"])
def test_weights_that_the_configuration_does_not_mention_are_refused(prior_folder: Path, room: str) -> None:
    """A network of fewer layers than its weights would load, and compute something else."""
    file = prior_folder / room / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"mid_block.resnets.7.conv1.bias": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=rf"{room}: 1 tensors are not part of .*mid_block\.resnets\.7") as raised:
        load(prior_folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("room", "changes", "named"),
    [
        ("unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
        ("vae", {"latents_mean": [0.0, 1.0, 0.0, 0.0]}, "latents_mean"),
        ("vae", {"latents_std": [1.0, 2.0, 1.0, 1.0]}, "latents_std"),
    ],
)
def test_networks_that_need_more_than_they_get_are_refused(
    prior_folder: Path, room: str, changes: dict[str, Any], named: str
) -> None:
    """A distilled UNet wants to know the guidance; a VAE of other families scales every channel by itself."""
    file = prior_folder / room / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if room == "unet":
        weights = prior_folder / room / "diffusion_pytorch_model.safetensors"
        more = {"time_embedding.cond_proj.weight": torch.zeros(16, 8)}
        save_file(load_file(weights) | more, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=named) as raised:
        load(prior_folder)
    assert "\n" not in str(raised.value)


def test_shards_count_whatever_they_are_called(prior_folder: Path) -> None:
    folder = prior_folder / "unet"
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    expected = load(prior_folder).unet.state_dict()
    save_file(tensors, folder / "part-one.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part-one.safetensors")}
    (folder / f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()
    prior = load(prior_folder)
    assert all(torch.equal(prior.unet.state_dict()[name], tensor) for name, tensor in expected.items())
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "part-one.safetensors", {"format": "pt"})
    assert load(prior_folder).fingerprint != prior.fingerprint
