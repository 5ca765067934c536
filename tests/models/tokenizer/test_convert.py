"""Every layout is written from its description, and computed by a plain forward of its own, beside ``VQModel``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from covray.cli.app import app
from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, CovrayError, WeightsError
from covray.models.tokenizer.convert import convert_tokenizer
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer

Weights = dict[str, Tensor]
HIDDEN, CODES, DIMENSIONS, LATENTS, SIZE = 32, 64, 4, 8, 16
FACTORS = (1, 2, 2)
LEVELS = len(FACTORS)
MUSE = {
    "_class_name": "VQGANModel",
    "_version": "0.0.1",
    "resolution": SIZE,
    "num_channels": 3,
    "hidden_channels": HIDDEN,
    "channel_mult": list(FACTORS),
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "no_attn_mid_block": True,
    "z_channels": LATENTS,
    "num_embeddings": CODES,
    "quantized_embed_dim": DIMENSIONS,
    "dropout": 0.0,
    "resample_with_conv": True,
    "commitment_cost": 0.25,
}
TAMING = {
    "base_learning_rate": 4.5e-06,
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "embed_dim": DIMENSIONS,
        "n_embed": CODES,
        "ddconfig": {
            "double_z": False,
            "z_channels": LATENTS,
            "resolution": SIZE,
            "in_channels": 3,
            "out_ch": 3,
            "ch": HIDDEN,
            "ch_mult": list(FACTORS),
            "num_res_blocks": 2,
            "attn_resolutions": [4],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"},
    },
}


# --- the network, from its description ------------------------------------------------------------------------------


def conv(weights: Weights, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def residual(weights: Weights, name: str, x: Tensor) -> Tensor:
    h = conv(weights, f"{name}.conv1", F.silu(norm(weights, f"{name}.norm1", x)), padding=1)
    h = conv(weights, f"{name}.conv2", F.silu(norm(weights, f"{name}.norm2", h)), padding=1)
    shortcut = f"{name}.nin_shortcut"
    return h + (conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x)


def attend(weights: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.q.weight" not in weights:
        return x
    h = norm(weights, f"{name}.norm", x)
    q, k, v = (conv(weights, f"{name}.{part}", h).flatten(2) for part in "qkv")
    shares = torch.einsum("bcq,bck->bqk", q, k).mul(q.shape[1] ** -0.5).softmax(-1)
    return x + conv(weights, f"{name}.proj_out", torch.einsum("bqk,bck->bcq", shares, v).view_as(x))


def level(weights: Weights, name: str, block: str, x: Tensor) -> Tensor:
    number = 0
    while f"{name}.{block}.{number}.conv1.weight" in weights:
        x = attend(weights, f"{name}.attn.{number}", residual(weights, f"{name}.{block}.{number}", x))
        number += 1
    if f"{name}.downsample.conv.weight" in weights:
        x = conv(weights, f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    if f"{name}.upsample.conv.weight" in weights:
        x = conv(weights, f"{name}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
    return x


def middle(weights: Weights, first: str, attention: str, second: str, x: Tensor) -> Tensor:
    return residual(weights, second, attend(weights, attention, residual(weights, first, x)))


def out(weights: Weights, name: str, x: Tensor) -> Tensor:
    return conv(weights, f"{name}.conv_out", F.silu(norm(weights, f"{name}.norm_out", x)), padding=1)


def muse_latents(weights: Weights, pixels: Tensor) -> Tensor:
    """Latents before quantisation [n, dimensions, h, w], of muse's and taming's layout."""
    h = conv(weights, "encoder.conv_in", pixels, padding=1)
    for number in range(LEVELS):
        h = level(weights, f"encoder.down.{number}", "block", h)
    h = middle(weights, "encoder.mid.block_1", "encoder.mid.attn_1", "encoder.mid.block_2", h)
    return conv(weights, "quant_conv", out(weights, "encoder", h))


def muse_pixels(weights: Weights, codes: Tensor) -> Tensor:
    h = conv(weights, "decoder.conv_in", conv(weights, "post_quant_conv", codes), padding=1)
    h = middle(weights, "decoder.mid.block_1", "decoder.mid.attn_1", "decoder.mid.block_2", h)
    for number in reversed(range(LEVELS)):
        h = level(weights, f"decoder.up.{number}", "block", h)
    return out(weights, "decoder", h)


def llamagen_latents(weights: Weights, pixels: Tensor) -> Tensor:
    h = conv(weights, "encoder.conv_in", pixels, padding=1)
    for number in range(LEVELS):
        h = level(weights, f"encoder.conv_blocks.{number}", "res", h)
    h = middle(weights, "encoder.mid.0", "encoder.mid.1", "encoder.mid.2", h)
    return conv(weights, "quant_conv", out(weights, "encoder", h))


def llamagen_pixels(weights: Weights, codes: Tensor) -> Tensor:
    h = conv(weights, "decoder.conv_in", conv(weights, "post_quant_conv", codes), padding=1)
    h = middle(weights, "decoder.mid.0", "decoder.mid.1", "decoder.mid.2", h)
    for number in range(LEVELS):  # from the latents up
        h = level(weights, f"decoder.conv_blocks.{number}", "res", h)
    return out(weights, "decoder", h)


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Ids [n, h * w] by distances written out."""
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 1, codebook.shape[1])
    return (flat - codebook).square().sum(-1).argmin(-1).view(len(latents), -1)


def looked_up(ids: Tensor, codebook: Tensor) -> Tensor:
    side = int(ids.shape[1] ** 0.5)
    return codebook[ids].view(len(ids), side, side, -1).permute(0, 3, 1, 2)


# --- random checkpoints ---------------------------------------------------------------------------------------------


class Random:
    """Weights by name, large enough to matter, no norm the identity."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.weights: Weights = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def conv(self, name: str, inputs: int, outputs: int, side: int = 3) -> None:
        self.weights[f"{name}.weight"] = self.normal(outputs, inputs, side, side) / (inputs * side**2) ** 0.5
        self.weights[f"{name}.bias"] = 0.1 * self.normal(outputs)

    def norm(self, name: str, channels: int) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.2 * self.normal(channels)
        self.weights[f"{name}.bias"] = 0.1 * self.normal(channels)

    def residual(self, name: str, inputs: int, outputs: int) -> None:
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self.conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def ends(self) -> None:
        """What is called the same everywhere."""
        width = HIDDEN * FACTORS[-1]
        self.conv("encoder.conv_in", 3, HIDDEN)
        self.norm("encoder.norm_out", width)
        self.conv("encoder.conv_out", width, LATENTS)
        self.conv("quant_conv", LATENTS, DIMENSIONS, 1)
        self.conv("post_quant_conv", DIMENSIONS, LATENTS, 1)
        self.conv("decoder.conv_in", LATENTS, width)
        self.norm("decoder.norm_out", HIDDEN)
        self.conv("decoder.conv_out", HIDDEN, 3)

    def codebook(self, latents: Callable[[Weights, Tensor], Tensor]) -> Weights:
        """The weights, with codes where latents are, so that different patches have different ones."""
        found = latents(self.weights, self.normal(8, 3, SIZE, SIZE).sigmoid()).permute(0, 2, 3, 1)
        self.weights["quantize.embedding.weight"] = found[:, 1:3].reshape(CODES, DIMENSIONS)
        return self.weights


def muse_weights(attended: tuple[int, ...] = (), mid_attention: bool = False) -> Weights:
    """muse's and taming's layout; ``attended``: levels with attention, 0 is the picture's."""
    random = Random()
    random.ends()
    widths = [HIDDEN * factor for factor in FACTORS]
    below = HIDDEN
    for number, width in enumerate(widths):
        for block in range(2):
            random.residual(f"encoder.down.{number}.block.{block}", below, width)
            below = width
            if number in attended:
                random.attention(f"encoder.down.{number}.attn.{block}", width)
        if number < LEVELS - 1:
            random.conv(f"encoder.down.{number}.downsample.conv", width, width)
    for number in reversed(range(LEVELS)):
        for block in range(3):
            random.residual(f"decoder.up.{number}.block.{block}", below, widths[number])
            below = widths[number]
            if number in attended:
                random.attention(f"decoder.up.{number}.attn.{block}", below)
        if number > 0:
            random.conv(f"decoder.up.{number}.upsample.conv", below, below)
    for part in ("encoder", "decoder"):
        for block in ("block_1", "block_2"):
            random.residual(f"{part}.mid.{block}", widths[-1], widths[-1])
        if mid_attention:
            random.attention(f"{part}.mid.attn_1", widths[-1])
    return random.codebook(muse_latents)


def llamagen_weights() -> Weights:
    """LlamaGen's layout: attention at the last level and in the middle, codes of any length."""
    random = Random()
    random.ends()
    widths = [HIDDEN * factor for factor in FACTORS]
    below = HIDDEN
    for number, width in enumerate(widths):
        for block in range(2):
            random.residual(f"encoder.conv_blocks.{number}.res.{block}", below, width)
            below = width
            if number == LEVELS - 1:
                random.attention(f"encoder.conv_blocks.{number}.attn.{block}", width)
        if number < LEVELS - 1:
            random.conv(f"encoder.conv_blocks.{number}.downsample.conv", width, width)
    for number, width in enumerate(reversed(widths)):
        for block in range(3):
            random.residual(f"decoder.conv_blocks.{number}.res.{block}", below, width)
            below = width
            if number == 0:
                random.attention(f"decoder.conv_blocks.{number}.attn.{block}", width)
        if number < LEVELS - 1:
            random.conv(f"decoder.conv_blocks.{number}.upsample.conv", width, width)
    for part in ("encoder", "decoder"):
        for block in ("0", "2"):
            random.residual(f"{part}.mid.{block}", widths[-1], widths[-1])
        random.attention(f"{part}.mid.1", widths[-1])
    random.codebook(llamagen_latents)
    random.weights["quantize.codebook_used"] = torch.zeros(65536)
    return random.weights


def write_muse(folder: Path, weights: Weights, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MUSE | changes))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def write_taming(folder: Path, weights: Weights, model: dict[str, Any] = TAMING, **more: Any) -> Path:
    """As a download of taming's unpacks: ``checkpoints/`` and ``configs/``."""
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "configs" / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    discriminator = {"loss.discriminator.main.0.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": weights | discriminator} | more, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def plain() -> Weights:
    """A muse VQGAN without attention, as LVM's tokenizer is."""
    return muse_weights()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    smooth = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).sigmoid()
    sharp = F.interpolate(smooth, SIZE, mode="bilinear").mul(255).byte()
    return sharp.permute(0, 2, 3, 1).contiguous().numpy()


def load(folder: Path, **config: Any) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(path=str(folder), **config), EngineConfig(image_batch=4, device="cpu"))


def require_same(folder: Path, pictures: np.ndarray, ids: Tensor, decoded: Tensor) -> None:
    """The tokenizer in ``folder`` writes ``ids`` [n, tokens] and reads them as ``decoded`` [n, 3, h, w] in [0, 1]."""
    tokenizer = load(folder)
    found = tokenizer.encode(pictures)
    assert len(np.unique(found)) > 16  # else equality would say little
    assert np.array_equal(found, ids.numpy())
    levels = decoded.clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
    assert levels.std() > 10
    assert np.abs(tokenizer.decode(found).astype(float) - levels).max() < 0.51  # rounding


def as_pixels(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def one_line(error: CovrayError) -> bool:
    return "\n" not in str(error) and ";" in str(error)


# --- what is equal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attended", [(), (1, 2)])
def test_muse_becomes_the_same_network(attended: tuple[int, ...], tmp_path: Path, pictures: np.ndarray) -> None:
    weights = muse_weights(attended, bool(attended))
    sides = [SIZE // 2**number for number in attended]
    source = write_muse(tmp_path / "muse", weights, attn_resolutions=sides, no_attn_mid_block=not attended)
    made = convert_tokenizer(str(source), str(tmp_path / "out"))
    assert (made.layout, made.codes, made.size_px, made.pixels) == ("muse", CODES, SIZE, (0, 1))
    assert made.parameters == sum(tensor.numel() for tensor in weights.values())

    pixels, codebook = as_pixels(pictures), weights["quantize.embedding.weight"]
    latents = muse_latents(weights, pixels)
    ids = nearest(latents, codebook)
    decoded = muse_pixels(weights, looked_up(ids, codebook))
    model = VQModel.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        torch.testing.assert_close(model.encode(pixels).latents, latents, rtol=0, atol=1e-5)
        sample = model.decode(ids.flatten(), force_not_quantize=True, shape=(6, 4, 4, DIMENSIONS)).sample
        torch.testing.assert_close(sample, decoded, rtol=0, atol=1e-5)
    require_same(tmp_path / "out", pictures, ids, decoded)


def test_weights_keep_values_and_type_from_whatever_file(plain: Weights, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in plain.items()}
    pickled = write_muse(tmp_path / "pickled", half)
    safe = write_muse(tmp_path / "safe", half)
    (safe / "pytorch_model.bin").unlink()
    save_file(half, safe / "pytorch_model.safetensors")
    convert_tokenizer(str(pickled), str(tmp_path / "a"))
    convert_tokenizer(str(safe), str(tmp_path / "b"))
    names = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / folder / names) for folder in "ab")
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
    assert sorted(map(float, (tensor.float().sum() for tensor in first.values()))) == sorted(
        map(float, (tensor.float().sum() for tensor in half.values()))
    )


def test_a_folder_of_amused_loads_as_it_is(plain: Weights, tmp_path: Path, pictures: np.ndarray) -> None:
    convert_tokenizer(str(write_muse(tmp_path / "muse", plain)), str(tmp_path / "amused" / "vqvae"))
    folder = tmp_path / "amused" / "vqvae"
    (folder / "covray.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sample_size": 32}))  # amused's, whatever the pictures
    (tmp_path / "amused" / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
    ids = nearest(muse_latents(plain, as_pixels(pictures)), plain["quantize.embedding.weight"])
    assert np.array_equal(load(tmp_path / "amused", size_px=SIZE).encode(pictures), ids.numpy())


@pytest.mark.parametrize("attended", [(2,), (1, 2)])
def test_taming_becomes_the_same_network_on_its_own_pixels(
    attended: tuple[int, ...], tmp_path: Path, pictures: np.ndarray
) -> None:
    weights = muse_weights(attended, mid_attention=True)
    model = json.loads(json.dumps(TAMING))
    model["params"]["ddconfig"]["attn_resolutions"] = [SIZE // 2**number for number in attended]
    made = convert_tokenizer(str(write_taming(tmp_path / "taming", weights, model)), str(tmp_path / "out"))
    assert (made.layout, made.pixels) == ("taming", (-1, 1))
    codebook = weights["quantize.embedding.weight"]
    ids = nearest(muse_latents(weights, 2 * as_pixels(pictures) - 1), codebook)
    decoded = (muse_pixels(weights, looked_up(ids, codebook)) + 1) / 2
    require_same(tmp_path / "out", pictures, ids, decoded)
    # No trick with the first convolution could have told it: its padding is grey, not black.
    (tmp_path / "out" / "covray.json").unlink()
    assert not np.array_equal(load(tmp_path / "out").encode(pictures), ids.numpy())


def test_llamagen_becomes_the_same_network(tmp_path: Path, pictures: np.ndarray) -> None:
    weights = llamagen_weights()
    file = tmp_path / "vq_ds4.pt"
    torch.save({"model": weights}, file)
    made = convert_tokenizer(str(file), str(tmp_path / "out"))
    assert (made.layout, made.pixels, made.size_px) == ("llamagen", (-1, 1), 256)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"sample_size": SIZE}))
    raw = weights["quantize.embedding.weight"]
    codebook = F.normalize(raw, dim=-1)
    latents = llamagen_latents(weights, 2 * as_pixels(pictures) - 1)
    ids = nearest(F.normalize(latents, dim=1), codebook)
    assert not torch.equal(ids, nearest(latents, raw))
    decoded = (llamagen_pixels(weights, looked_up(ids, codebook)) + 1) / 2
    require_same(tmp_path / "out", pictures, ids, decoded)


def test_the_moving_average_of_llamagen_goes_before_the_last_step(tmp_path: Path) -> None:
    weights = llamagen_weights()
    averaged = weights | {"quant_conv.bias": torch.full((DIMENSIONS,), 7.0)}
    torch.save({"model": weights, "ema": averaged, "steps": 3}, tmp_path / "train.pt")
    convert_tokenizer(str(tmp_path / "train.pt"), str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written["quant_conv.bias"], averaged["quant_conv.bias"])


def test_the_pixels_are_part_of_what_a_tokenizer_is(plain: Weights, tmp_path: Path) -> None:
    convert_tokenizer(str(write_muse(tmp_path / "muse", plain)), str(tmp_path / "out"))
    before = load(tmp_path / "out")
    (tmp_path / "out" / "covray.json").write_text('{"version": 1, "pixels": [-1, 1]}')
    assert load(tmp_path / "out").fingerprint != before.fingerprint
    for text in ("{", "[" * 200_000, "[]", '{"version": 2, "pixels": [0, 1]}', '{"version": 1, "pixels": [0, 255]}'):
        (tmp_path / "out" / "covray.json").write_text(text)
        with pytest.raises(WeightsError, match=r"covray\.json: ") as raised:
            load(tmp_path / "out")
        assert one_line(raised.value)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "MaskGitVQGAN"}, "is of class MaskGitVQGAN, not muse's VQGANModel"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"hidden_channels": "many"}, "hidden_channels is 'many'"),
        ({"channel_mult": []}, r"channel_mult is \[\]"),
        ({"channel_mult": [2, 2, 2]}, "first level turns 32 channels into 64"),
        ({"hidden_channels": 16}, "is a network that VQModel cannot build"),
        ({"decoder_channel_mult": [1, 2, 4]}, r"decoder_channel_mult is \[1, 2, 4\]"),
        ({"extra_mid_res_blocks": 2}, "extra_mid_res_blocks is 2"),
        ({"resample_with_conv": False}, "resample_with_conv is False"),
        ({"num_res_blocks": 1, "attn_resolutions": [4]}, "attn_resolutions with one residual block"),
        ({"num_embeddings": 16384}, "has 16384 codes, LVM's vocabulary only 8192"),
        ({"num_embeddings": 32}, r"quantize\.embedding\.weight is \[64, 4\], not \[32, 4\]"),
        ({"no_attn_mid_block": False}, r"encoder\.mid\.attn_1\.\S+ is missing"),
        ({"channel_mult": [1, 2]}, r"(conv_out|mid)\S* is .*\d\], not \[|unexpected tensor"),
        ({"channel_mult": [1, 2, 2, 2]}, r"down\.2\.downsample\.conv\.\S+ is missing"),
    ],
)
def test_a_muse_configuration_that_is_not_ours_is_refused(
    plain: Weights, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = write_muse(tmp_path / "muse", plain, **changes)
    with pytest.raises(WeightsError, match=message) as raised:
        convert_tokenizer(str(source), str(tmp_path / "out"))
    assert one_line(raised.value)
    assert str(source) in str(raised.value)
    assert not (tmp_path / "out").exists()


def edited(path: str, value: Any) -> dict[str, Any]:
    """taming's ``model`` with the value at ``path`` changed."""
    model = json.loads(json.dumps(TAMING))
    *parents, last = path.split(".")
    inner = model
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return dict(model)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("target", "taming.models.vqgan.GumbelVQ", "GumbelVQ does not take the nearest code"),
        ("params.remap", "used.npy", "remap is 'used.npy'"),
        ("params.ddconfig.double_z", True, "ddconfig.double_z is True"),
        ("params.ddconfig.attn_type", "linear", "ddconfig.attn_type is 'linear'"),
        ("params.ddconfig.resamp_with_conv", False, "ddconfig.resamp_with_conv is False"),
        ("params.ddconfig.something_new", 1, "ddconfig.something_new is 1"),
        ("params.ddconfig", {"ch": 32}, r"ddconfig\.\w+ is missing"),
        ("params.n_embed", 16384, "16384 codes"),
    ],
)
def test_a_taming_configuration_that_is_not_ours_is_refused(
    plain: Weights, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    source = write_taming(tmp_path / "taming", plain, edited(path, value))
    with pytest.raises(WeightsError, match=message) as raised:
        convert_tokenizer(str(source), str(tmp_path / "out"))
    assert one_line(raised.value)


def test_a_folder_that_is_not_one_checkpoint_is_refused(plain: Weights, tmp_path: Path) -> None:
    def refusal(source: Path) -> str:
        with pytest.raises(CovrayError) as raised:
            convert_tokenizer(str(source), str(tmp_path / "out"))
        assert one_line(raised.value)
        return str(raised.value)

    source = write_taming(tmp_path / "taming", plain)
    settings = source / "configs" / "model.yaml"
    (source / "configs" / "lightning.yaml").write_text("trainer: {gpus: 1}")  # no second description
    assert "attn.0.norm.weight is missing" in refusal(source)  # plain has none: got as far as the weights
    shutil.copy(settings, source / "configs" / "again.yaml")
    assert "holds 2 .yaml files with a model.params.ddconfig, not one" in refusal(source)
    (source / "configs" / "again.yaml").write_text("a: [")
    assert "again.yaml: cannot be read" in refusal(source)
    (source / "configs" / "again.yaml").unlink()
    settings.unlink()
    assert "holds 0 .yaml files" in refusal(source)
    shutil.copy(source / "checkpoints" / "last.ckpt", source / "other.ckpt")
    assert "holds 2 .ckpt files" in refusal(source)
    (tmp_path / "empty").mkdir()
    assert "holds 0 .ckpt files and no config.json" in refusal(tmp_path / "empty")
    assert "no such file or folder" in refusal(tmp_path / "absent")
    (write_muse(tmp_path / "muse", plain) / "pytorch_model.bin").unlink()
    assert "pytorch_model.bin or pytorch_model.safetensors" in refusal(tmp_path / "muse")
    (tmp_path / "muse" / "config.json").write_text("{")
    assert "config.json: cannot be read" in refusal(tmp_path / "muse")
    (tmp_path / "muse" / "diffusion_pytorch_model.safetensors").touch()
    assert "is already a folder of diffusers" in refusal(tmp_path / "muse")
    torch.save({"model": plain}, tmp_path / "other.pt")
    assert "is no VQ of LlamaGen" in refusal(tmp_path / "other.pt")
    torch.save({"weights": plain}, tmp_path / "other.pt")
    assert "has no ema or model in it" in refusal(tmp_path / "other.pt")


class Malice:
    """Runs when unpickled."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.touched),)


def drop(weights: Weights) -> None:
    del weights["encoder.down.1.block.0.conv1.weight"]


def add(weights: Weights) -> None:
    weights["encoder.down.9.weight"] = torch.zeros(1)


def reshape(weights: Weights) -> None:
    weights["decoder.conv_in.weight"] = torch.zeros(64, 8, 1, 1)


def poison(weights: Weights) -> None:
    weights["quant_conv.weight"] = weights["quant_conv.weight"] * torch.nan


def count(weights: Weights) -> None:
    weights["quant_conv.bias"] = torch.zeros(DIMENSIONS, dtype=torch.int64)


def shrink(weights: Weights) -> None:
    weights["quant_conv.bias"] = weights["quant_conv.bias"].to(torch.float8_e4m3fn)


def nest(weights: Weights) -> None:
    weights["optimizer"] = {}  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "encoder.down.1.block.0.conv1.weight is missing"),
        (add, "unexpected tensor encoder.down.9.weight"),
        (reshape, r"decoder.conv_in.weight is \[64, 8, 1, 1\], not \[64, 8, 3, 3\]"),
        (poison, "quant_conv.weight holds values that are not finite"),
        (count, "quant_conv.bias is of type torch.int64"),
        (shrink, "quant_conv.bias is of type torch.float8_e4m3fn"),
        (nest, "optimizer is not a plain tensor"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    plain: Weights, tmp_path: Path, damage: Callable[[Weights], None], message: str
) -> None:
    weights = dict(plain)
    damage(weights)
    source = write_muse(tmp_path / "muse", weights)
    with pytest.raises(WeightsError, match=message) as raised:
        convert_tokenizer(str(source), str(tmp_path / "out"))
    assert one_line(raised.value)
    assert f"{source}/pytorch_model.bin: " in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["muse"]  # nothing half-made is left


def test_files_that_are_no_weights_are_refused_and_nothing_in_them_runs(plain: Weights, tmp_path: Path) -> None:
    source = write_muse(tmp_path / "muse", plain)
    file = source / "pytorch_model.bin"
    whole = file.read_bytes()

    def refusal() -> str:
        with pytest.raises(WeightsError) as raised:
            convert_tokenizer(str(source), str(tmp_path / "out"))
        assert one_line(raised.value)
        assert "weights_only" not in str(raised.value)
        return str(raised.value)

    torch.save(plain, file, _use_new_zipfile_serialization=False)
    before_1_6 = file.read_bytes()
    for part in (before_1_6[:100], before_1_6[: len(before_1_6) // 2]):
        file.write_bytes(part)
        assert "pytorch_model.bin: " in refusal()
    for data in (b"version https://git-lfs.github.com/spec/v1\n", b"", whole[: len(whole) // 2]):
        file.write_bytes(data)
        assert "pytorch_model.bin: is not a PyTorch file, or only a part of one" in refusal()
    torch.save(plain | {"more": Malice(tmp_path / "ran")}, file)
    assert "needs posix.mkdir, and covray runs no code from a file" in refusal()
    torch.save(plain | {"more": Malice(tmp_path / "ran")}, file, _use_new_zipfile_serialization=False)
    assert "needs posix.mkdir, and covray runs no code from a file" in refusal()
    for position in (whole.index(b"PK\x06\x07") + 4, whole.index(b"ctorch._utils") - 3, whole.index(b"ctorch._utils")):
        damaged = bytearray(whole)  # the archive's number of disks, the pickle's framing, a name in it
        damaged[position] = 77
        file.write_bytes(damaged)
        refusal()
    torch.save(plain | {"a\nb": torch.zeros(1)}, file)
    assert r"'a\nb' is not a plain tensor" in refusal()
    torch.save([1, 2], file)
    assert "holds a list, not tensors by name" in refusal()
    shutil.make_archive(str(tmp_path / "some"), "zip", tmp_path / "muse")
    file.write_bytes((tmp_path / "some.zip").read_bytes())
    assert "pytorch_model.bin: cannot be read" in refusal()
    file.unlink()
    (source / "pytorch_model.safetensors").write_bytes(b"{}")
    assert "pytorch_model.safetensors: cannot be read" in refusal()
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_lightning_is_read_without_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    ran = tmp_path / "ran"
    exec("class ModelCheckpoint: pass", module.__dict__)
    module.ModelCheckpoint.__module__ = name
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, parent, module)
        weights = muse_weights((2,), mid_attention=True)
        callbacks = {module.ModelCheckpoint: {"best_model_score": torch.zeros(()), "best_model_path": "x"}}
        source = write_taming(tmp_path / "taming", weights, callbacks=callbacks, epoch=3, optimizer_states=[{}])
        bad = write_taming(tmp_path / "bad", weights, callbacks={"a": Malice(ran)})
    assert convert_tokenizer(str(source), str(tmp_path / "out")).layout == "taming"
    with pytest.raises(WeightsError, match=r"last\.ckpt: needs posix\.mkdir"):
        convert_tokenizer(str(bad), str(tmp_path / "other"))
    assert not ran.exists()


def test_the_command_says_what_it_wrote(plain: Weights, tmp_path: Path) -> None:
    source = write_muse(tmp_path / "muse", plain)
    arguments = ["convert", "tokenizer", str(source), "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, arguments)
    made = json.loads(done.stdout)
    assert (made["layout"], made["out"], made["codes"]) == ("muse", str(tmp_path / "out"), CODES)


def test_a_folder_that_is_there_is_not_overwritten(plain: Weights, tmp_path: Path) -> None:
    source = write_muse(tmp_path / "muse", plain)
    with pytest.raises(ConfigError, match="already exists; give a new folder"):
        convert_tokenizer(str(source), str(source))


def test_a_tokenizer_that_is_not_converted_names_the_command(plain: Weights, tmp_path: Path) -> None:
    muse = write_muse(tmp_path / "muse", plain)
    taming = write_taming(tmp_path / "taming", plain)
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.copy(muse / "config.json", hub)  # what is downloaded of a hub id that is muse's
    for path in (muse, taming, hub, taming / "checkpoints" / "last.ckpt"):
        with pytest.raises(WeightsError, match=r"covray convert tokenizer") as raised:
            load(path)
        assert one_line(raised.value)
        assert str(path) in str(raised.value)
