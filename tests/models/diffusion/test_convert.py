"""Files of LDM's layout are written from diffusers models, by names from the layout's description; back they must come
as the same models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

from covray.cli.app import app
from covray.config import EngineConfig, PriorConfig
from covray.errors import ConfigError, CovrayError, WeightsError
from covray.io.model_folders import NANO_FOLDER
from covray.models.diffusion import convert
from covray.models.diffusion.convert import PUBLISHED, convert_prior
from covray.models.diffusion.prior import Prior, load_prior, probe_pictures

Weights = dict[str, Tensor]
WORDS, LENGTH, WIDTH = 20, 7, 64


# --- the layout, from its description -------------------------------------------------------------------------------

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_unet_name(name: str, layers: int, attends: Callable[[int], bool]) -> str:
    """LDM counts its blocks in one row, a downsampling being one of them; an upsampling ends the block before it.

    ``attends``: whether a level of the way up has attention.
    """
    stem, _, kind = name.rpartition(".")
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{kind}"
    room, rest = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    part, number, rest = re.fullmatch(r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest).groups()  # type: ignore[union-attr]
    if part == "resnets":
        inner, _, kind = rest.rpartition(".")
        rest = f"{RESIDUAL[inner]}.{kind}"
    place = {"resnets": 0, "attentions": 1}.get(part)
    if room == "mid_block":
        return f"middle_block.{2 * int(number) if place == 0 else 1}.{rest}"
    level = int(room.rpartition(".")[2])
    if part == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{kind}"
    if part == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if attends(level) else 1}.conv.{kind}"
    if room.startswith("down"):
        return f"input_blocks.{1 + level * (layers + 1) + int(number)}.{place}.{rest}"
    return f"output_blocks.{level * (layers + 1) + int(number)}.{place}.{rest}"


def ldm_vae_name(name: str, levels: int) -> str:
    """As taming's: the way up is counted from the picture."""
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in VAE_ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    name = name.replace("down_blocks.", "down.").replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
    return name.replace("samplers.0.conv", "sample.conv").replace("conv_norm_out", "norm_out")


def ldm_unet(unet: Any) -> Weights:
    blocks = list(reversed(unet.config.down_block_types))
    return {
        "model.diffusion_model."
        + ldm_unet_name(name, unet.config.layers_per_block, lambda level: "CrossAttn" in blocks[level]): tensor
        for name, tensor in unet.state_dict().items()
    }


def ldm_vae(vae: Any) -> Weights:
    levels = len(vae.config.block_out_channels)
    weights = {}
    for name, tensor in vae.state_dict().items():
        is_kernel = ".attentions." in name and tensor.ndim == 2  # LDM's attention is of 1 x 1 convolutions
        weights[f"first_stage_model.{ldm_vae_name(name, levels)}"] = tensor[..., None, None] if is_kernel else tensor
    return weights


def clip(encoder: CLIPTextModel) -> Weights:
    prefix = "cond_stage_model.transformer.text_model."
    weights = {f"{prefix}{name.removeprefix('text_model.')}": tensor for name, tensor in encoder.state_dict().items()}
    return weights | {f"{prefix}embeddings.position_ids": torch.arange(LENGTH)[None]}


def open_clip(encoder: CLIPTextModel) -> Weights:
    theirs = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inner = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    weights = {theirs[name]: tensors[name] for name in theirs}
    for layer in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            ours, block = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            for name, their in inner.items():
                weights[f"{block}.{their}.{kind}"] = tensors[f"{ours}.{name}.{kind}"]
            parts = [tensors[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    weights |= {"text_projection": torch.zeros(WIDTH, WIDTH), "logit_scale": torch.tensor(4.6)}
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in weights.items()}


# --- small models ---------------------------------------------------------------------------------------------------


class Source:
    """A file, the folder of configs that describes it, and what must come back."""

    def __init__(self, file: Path, like: Path, unet: Any, vae: Any, context: Tensor):
        self.file, self.like, self.unet, self.vae, self.context = file, like, unet, vae, context

    def tensors(self) -> Weights:
        return load_file(self.file)

    def changed(self, folder: Path, drop: str = "", **new: Tensor) -> str:
        """The file without the tensor ``drop``, and with ``new`` ones."""
        tensors = {name: tensor for name, tensor in self.tensors().items() if name != drop}
        file = folder / "changed.safetensors"
        save_file(tensors | new, file)
        return str(file)


def text_model(layers: int, activation: str, seed: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = CLIPTextModel(config).eval()
        for name, parameter in encoder.named_parameters():
            torch.nn.init.normal_(parameter, float("norm" in name and name.endswith("weight")), 0.3)
    return encoder


def write(folder: Path, unet: Any, vae: Any, text: dict[str, Any], of_text: Weights, context: Tensor) -> Source:
    others = {"model_ema.decay": torch.tensor(0.9999), "alphas_cumprod": torch.rand(1000)}
    weights = ldm_unet(unet) | ldm_vae(vae) | of_text | others
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    like = folder / "like"
    unet.save_config(like / "unet")
    vae.save_config(like / "vae")
    (like / "text_encoder").mkdir()
    (like / "text_encoder" / "config.json").write_text(json.dumps(text))
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    DDIMScheduler(**scheduler, set_alpha_to_one=False, steps_offset=1).save_pretrained(like / "scheduler")
    return Source(file, like, unet.eval(), vae.eval(), context)


@pytest.fixture(scope="module")
def epsilon(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """In the manner of Stable Diffusion 1: CLIP, padded with the end of text. The UNet is nano's, of epsilon."""
    encoder = text_model(2, "quick_gelu", seed=1)
    with torch.inference_mode():
        context = encoder(torch.tensor([[WORDS - 2, *[WORDS - 1] * (LENGTH - 1)]])).last_hidden_state
    unet = UNet2DConditionModel.from_pretrained(NANO_FOLDER / "prior" / "unet", torch_dtype=torch.float16)
    vae = AutoencoderKL.from_pretrained(NANO_FOLDER / "prior" / "vae", torch_dtype=torch.float16)
    folder = tmp_path_factory.mktemp("epsilon")
    return write(folder, unet, vae, encoder.config.to_dict(), clip(encoder), context)


@pytest.fixture(scope="module")
def v(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """In the manner of Stable Diffusion 2: OpenCLIP, its last layer left out, padded with 0; linear projections. Random
    weights answer noise with next to nothing, as a v network does."""
    encoder = text_model(3, "gelu", seed=2)
    with torch.inference_mode():
        states = encoder(torch.tensor([[WORDS - 2, WORDS - 1, *[0] * (LENGTH - 2)]]), output_hidden_states=True)
        context = getattr(encoder, "text_model", encoder).final_layer_norm(states.hidden_states[-2])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            layers_per_block=2,
            norm_num_groups=4,
            scaling_factor=6.0,
        )
    text = encoder.config.to_dict() | {"num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return write(tmp_path_factory.mktemp("v"), unet, vae, text, open_clip(encoder), context)


@pytest.fixture(params=["epsilon", "v"])
def source(request: pytest.FixtureRequest) -> Source:
    return request.getfixturevalue(request.param)


def load(folder: Path) -> Prior:
    return load_prior(PriorConfig(path=str(folder), steps=5), EngineConfig(device="cpu"))


# --- what is equal --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_same_prior_comes_back(source: Source, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app, ["convert", "prior", str(source.file), "--out", f"{tmp_path}/out", "--like", str(source.like), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    made = json.loads(ran.output.strip().splitlines()[-1])
    is_v = "[v]" in request.node.name
    assert made["prediction_type"] == ("v_prediction" if is_v else "epsilon")
    assert (made["size_px"], made["context"]) == (32 if is_v else 64, [1, LENGTH, WIDTH])
    for room, model in (("unet", source.unet), ("vae", source.vae)):
        written = load_file(tmp_path / "out" / room / "diffusion_pytorch_model.safetensors")
        assert written.keys() == model.state_dict().keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())
        assert {tensor.dtype for tensor in written.values()} == {model.dtype}

    prior = load(tmp_path / "out")
    assert prior.prediction_type == made["prediction_type"]
    torch.testing.assert_close(prior.context, source.context, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn((2, *prior.latent_shape), generator=generator), torch.tensor([1, 981])
    unet, vae = source.unet.float(), source.vae.float()
    expected = unet(latents, timesteps, source.context.expand(2, -1, -1)).sample
    elsewhere = unet(latents, timesteps, source.context.expand(2, -1, -1).roll(1, dims=2)).sample
    assert (expected - elsewhere).abs().max() > 0.01  # the context does matter
    torch.testing.assert_close(prior.predict(latents, timesteps), expected, rtol=1e-4, atol=1e-4)
    images = torch.from_numpy(probe_pictures(prior.size_px))
    mean = vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(prior.encode(images), mean * vae.config.scaling_factor, rtol=1e-4, atol=1e-4)


def test_a_published_width_needs_no_configs(v: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same network under its width: what it predicts decides its size."""
    known = convert._read_configs(v.like)
    monkeypatch.setitem(PUBLISHED, WIDTH, replace(known, layout="tiny", v_sample_size=12))
    made = convert_prior(str(v.file), str(tmp_path / "out"))
    assert (made.layout, made.size_px) == ("tiny", 48)
    assert load(tmp_path / "out").size_px == 48


def test_published_networks_are_as_large_as_published() -> None:
    sizes = {768: (859_520_964, 123_060_480), 1024: (865_910_724, 340_387_840)}
    for width, (of_unet, of_text) in sizes.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(PUBLISHED[width].unet)
            vae = AutoencoderKL.from_config(PUBLISHED[width].vae)
            encoder = CLIPTextModel(CLIPTextConfig.from_dict(PUBLISHED[width].text))
        models = ((unet, of_unet), (vae, 83_653_863), (encoder, of_text))
        for model, size in models:
            assert sum(parameter.numel() for parameter in model.parameters()) == size


def test_half_the_file_or_more_of_it_makes_no_difference(v: Source, tmp_path: Path) -> None:
    """The last layer of OpenCLIP may be absent; optimiser states and averages may be there."""
    tensors = {name: tensor for name, tensor in v.tensors().items() if ".resblocks.2." not in name}
    averages = {f"model_ema.diffusion_model{number}": torch.zeros(1) for number in range(120)}
    file = tmp_path / "other.safetensors"
    save_file(tensors | averages, file)
    for number, name in enumerate((file, v.file)):
        convert_prior(str(name), str(tmp_path / str(number)), str(v.like))
    first, second = (load_file(tmp_path / number / "empty_prompt.safetensors")["context"] for number in "01")
    assert torch.equal(first, second)


def with_transformers_names(source: Source, layers: int) -> Weights:
    """The file with its OpenCLIP under transformers' names, as converters back from a folder of diffusers write it."""
    encoder = text_model(layers, "gelu", seed=2)
    others = {name: tensor for name, tensor in source.tensors().items() if not name.startswith("cond_stage_model.")}
    return others | {name: tensor.contiguous() for name, tensor in clip(encoder).items() if ".layers.2." not in name}


def write_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A tokenizer of the family in small: "!" is id 0, the last two ids begin and end."""
    folder.mkdir()
    words = {"!": 0, **{f"{letter}</w>": number for number, letter in enumerate("abcdefghijklmnopq", start=1)}}
    words |= {"<|startoftext|>": WORDS - 2, "<|endoftext|>": WORDS - 1}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": pad_token} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


@torch.inference_mode()
def test_the_prompt_of_2_is_padded_as_its_tokenizer_does_under_either_names(v: Source, tmp_path: Path) -> None:
    """The judge is the library: CLIP's tokenizer, padding as the family does, and its text model."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "!")
    ids = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    assert ids[0].tolist() == [WORDS - 2, WORDS - 1, *[0] * (LENGTH - 2)]
    encoder = text_model(3, "gelu", seed=2)
    states = encoder(ids, output_hidden_states=True)
    expected = getattr(encoder, "text_model", encoder).final_layer_norm(states.hidden_states[-2])
    named = with_transformers_names(v, layers=3)
    save_file(named, tmp_path / "named.safetensors")
    for number, file in enumerate((v.file, tmp_path / "named.safetensors")):
        convert_prior(str(file), str(tmp_path / str(number)), str(v.like))
        found = load_file(tmp_path / str(number) / "empty_prompt.safetensors")["context"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pad_token", "pad"), [("!", 0), ("<|endoftext|>", WORDS - 1)])
@torch.inference_mode()
def test_a_tokenizer_beside_the_configs_pads_the_prompt(
    epsilon: Source, tmp_path: Path, pad_token: str, pad: int
) -> None:
    """Whatever the family: a model may have been trained with other padding than the first of its architecture."""
    like = shutil.copytree(epsilon.like, tmp_path / "like")
    write_tokenizer(like / "tokenizer", pad_token)
    convert_prior(str(epsilon.file), str(tmp_path / "out"), str(like))
    encoder = text_model(2, "quick_gelu", seed=1)
    expected = encoder(torch.tensor([[WORDS - 2, WORDS - 1, *[pad] * (LENGTH - 2)]])).last_hidden_state
    found = load_file(tmp_path / "out" / "empty_prompt.safetensors")["context"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_published_families_pad_as_published() -> None:
    """Stable Diffusion 1's tokenizer pads with the end of text, id 49407; 2's with "!", id 0."""
    pads = {width: convert._pad_id(CLIPTextConfig.from_dict(known.text), False) for width, known in PUBLISHED.items()}
    assert pads == {768: 49407, 1024: 0}


# --- what is refused ------------------------------------------------------------------------------------------------

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."


@pytest.mark.parametrize(
    ("drop", "new", "named"),
    [
        (f"{UNET}middle_block.1.norm.weight", {}, r"unet\.mid_block.*is missing"),
        (f"{UNET}output_blocks.3.2.conv.bias", {}, "unet is not complete"),
        (f"{VAE}decoder.up.1.upsample.conv.bias", {}, "vae is not complete"),
        (f"{VAE}encoder.conv_in.weight", {}, r"vae\.encoder\.conv_in\.weight is missing"),
        (f"{TEXT}positional_embedding", {}, r"text_encoder\.embeddings\.position_embedding\.weight is missing"),
        ("", {f"{UNET}input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}, r"unet\.conv_in\.weight is \[16, 9, 3, 3\]"),
        ("", {f"{UNET}label_emb.0.0.weight": torch.zeros(3, 3)}, r"label_emb\.0\.0\.weight is not used"),
        ("", {f"{VAE}loss.logvar": torch.zeros(1)}, r"loss\.logvar is not used"),
        (
            "",
            {f"{TEXT}transformer.resblocks.3.ln_1.weight": torch.ones(WIDTH)},
            r"unexpected tensor .*layers\.3\.layer_norm1",
        ),
        ("", {f"{TEXT}transformer.resblocks.0.attn.in_proj_bias": torch.ones(4 * WIDTH)}, r"v_proj\.bias is \[128\]"),
        ("", {f"{TEXT}transformer.resblocks.0.attn.in_proj_weight": torch.ones(9)}, "text_encoder is not complete"),
        ("", {f"{VAE}encoder.mid.attn_1.q.weight": torch.zeros(16, 16, 3, 3)}, r"attn_1\.q\.weight is not used"),
        ("", {f"{UNET}out.2.bias": torch.full((4,), torch.nan)}, r"out\.2\.bias holds values that are not finite"),
        ("", {f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.int64)}, r"out\.2\.bias is of type torch\.int64"),
        ("", {f"{UNET}out.2.bias": torch.zeros(4).to(torch.float8_e4m3fn)}, r"out\.2\.bias is of type torch\.float8"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(v: Source, tmp_path: Path, drop: str, new: Weights, named: str) -> None:
    with pytest.raises(WeightsError, match=named) as raised:
        convert_prior(v.changed(tmp_path, drop, **new), str(tmp_path / "out"), str(v.like))
    require_one_line(raised.value, "changed.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["changed.safetensors"]  # nothing was written


def test_what_is_no_such_file_is_one_line(v: Source, tmp_path: Path) -> None:
    content = v.file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.safetensors").touch()
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    (tmp_path / "pickle.safetensors").write_bytes((tmp_path / "model.ckpt").read_bytes())
    save_file({"conditioner.embedders.0.x": torch.zeros(2)}, tmp_path / "xl.safetensors")
    save_file({convert._FIRST_KEY: torch.zeros(3, 640)}, tmp_path / "wide.safetensors")
    save_file({convert._FIRST_KEY: torch.zeros(3, 768)}, tmp_path / "stub.safetensors")
    refused = {
        "cut": "cannot be read",
        "empty": "cannot be read",
        "pickle": "cannot be read",
        "xl": "not a Stable Diffusion 1 or 2",
        "wide": "width 640, not 768 or 1024",
        "stub": r"unet\.\S+ is missing",
    }
    for name, named in refused.items():
        with pytest.raises(WeightsError, match=named) as raised:
            convert_prior(str(tmp_path / f"{name}.safetensors"), str(tmp_path / "out"))
        require_one_line(raised.value, name)
    with pytest.raises(WeightsError, match=r"model\.ckpt: is not a \.safetensors file"):
        convert_prior(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"absent\.safetensors: no such file"):
        convert_prior(str(tmp_path / "absent.safetensors"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_there_is_kept(v: Source, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        convert_prior(str(v.file), str(tmp_path), str(v.like))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize(
    ("room", "changes", "named"),
    [
        ("vae/config.json", {"scaling_factor": 1.0}, "scaling_factor 1"),
        ("vae/config.json", {"down_block_types": ["Unheard", "Of", "Blocks"]}, "vae/config.json: describes no network"),
        ("unet/config.json", {"block_out_channels": [3, 5, 7]}, "unet/config.json: describes no network"),
        ("unet/config.json", {"sample_size": None}, "model.safetensors/unet/config.json has sample_size None"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "text_encoder/config.json: describes no network"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample is True"),
    ],
)
def test_configs_that_do_not_fit_are_one_line(
    v: Source, tmp_path: Path, room: str, changes: dict[str, Any], named: str
) -> None:
    like = tmp_path / "like"
    for file in v.like.glob("*/*.json"):
        (like / file.parent.name).mkdir(parents=True)
        (like / file.parent.name / file.name).write_text(file.read_text())
    (like / room).write_text(json.dumps(json.loads((like / room).read_text()) | changes))
    with pytest.raises(CovrayError, match=named) as raised:
        convert_prior(str(v.file), str(tmp_path / "out"), str(like))
    require_one_line(raised.value, "")
    assert not (tmp_path / "out").exists()
    (like / room).unlink()
    with pytest.raises(WeightsError, match=f"{room} is missing"):
        convert_prior(str(v.file), str(tmp_path / "out"), str(like))


def require_one_line(error: CovrayError, named: str) -> None:
    assert "\n" not in str(error)
    assert named in str(error)
