from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file

from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, DatasetError, WeightsError
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer, require_same_codebook

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _load(folder: Path, image_batch: int = 4, **config: int) -> Tokenizer:
    return load_tokenizer(
        TokenizerConfig(path=str(folder), **config), EngineConfig(image_batch=image_batch, device="cpu")
    )


@pytest.fixture(scope="module")
def tokenizer(vqgan_folder: Path) -> Tokenizer:
    return _load(vqgan_folder)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def copy(vqgan_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vqgan_folder, tmp_path / "copy"))


def test_attributes_follow_the_model(tokenizer: Tokenizer) -> None:
    assert (tokenizer.size_px, tokenizer.grid, tokenizer.tokens_per_image, tokenizer.codes) == (16, (4, 4), 16, 64)


def test_the_codebook_is_what_latents_are_compared_with(tokenizer: Tokenizer, pictures: np.ndarray) -> None:
    assert (tokenizer.codebook.dtype, tokenizer.codebook.shape) == (np.float32, (64, 4))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        model = tokenizer._model
        latents = model.encode(pixels).latents.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    distances = np.linalg.norm(latents[:, None] - tokenizer.codebook, axis=2)
    assert np.array_equal(distances.argmin(axis=1), tokenizer.encode(pictures).ravel())


def test_the_codebook_cannot_be_written(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.codebook[0, 0] = 1


def test_tokens_and_pictures_do_not_depend_on_neighbours_place_or_padding(
    tokenizer: Tokenizer, pictures: np.ndarray
) -> None:
    ids = tokenizer.encode(pictures)
    decoded = tokenizer.decode(ids)
    assert len(np.unique(ids)) > 16  # else equality would say little
    order = np.random.default_rng(2).permutation(len(pictures))
    assert np.array_equal(tokenizer.encode(pictures[order]), ids[order])
    assert np.array_equal(tokenizer.decode(ids[order]), decoded[order])
    for place in range(len(pictures)):
        assert np.array_equal(tokenizer.encode(pictures[place : place + 1])[0], ids[place])
        assert np.array_equal(tokenizer.decode(ids[place : place + 1])[0], decoded[place])


def test_the_network_sees_one_batch_shape_only(vqgan_folder: Path, pictures: np.ndarray) -> None:
    # A network as small as this one gives the same tokens at any shape; larger ones do not.
    tokenizer = _load(vqgan_folder)
    seen: set[int] = set()
    for layer in (tokenizer._model.encoder, tokenizer._model.decoder):
        layer.register_forward_pre_hook(lambda _, inputs: seen.add(len(inputs[0])))
    for count in (1, 4, 11):
        tokenizer.decode(tokenizer.encode(pictures[:count]))
    assert seen == {4}


def test_agrees_with_diffusers(vqgan_folder: Path, tokenizer: Tokenizer, pictures: np.ndarray) -> None:
    model = VQModel.from_pretrained(vqgan_folder).eval()
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        _, _, (_, _, indices) = model.quantize(model.encode(pixels).latents)
        sample = model.decode(indices, force_not_quantize=True, shape=(len(pictures), 4, 4, 4)).sample
    ids = tokenizer.encode(pictures)
    assert np.array_equal(ids, indices.reshape(len(pictures), 16).numpy())
    expected = (sample.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(tokenizer.decode(ids).astype(int) - expected).max() <= 1


def test_decoding_does_not_depend_on_the_lookup_flag(copy: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"lookup_from_codebook": False}))
    ids = np.arange(64).reshape(4, 16)
    assert np.array_equal(_load(copy).decode(ids), tokenizer.decode(ids))


def test_what_the_decoder_writes_is_a_picture(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(np.zeros((0, 16, 16, 3), np.uint8)).shape == (0, 16)
    assert tokenizer.decode(np.zeros((0, 16), np.uint16)).shape == (0, 16, 16, 3)
    for kind in (np.uint16, np.int64):
        assert tokenizer.decode(np.full((1, 16), 63, kind)).dtype == np.uint8


@pytest.mark.parametrize("ids", [np.full((1, 16), 64), np.full((1, 16), -1), np.zeros((1, 15), int), np.zeros((1, 16))])
def test_ids_that_are_no_codes_are_refused(tokenizer: Tokenizer, ids: np.ndarray) -> None:
    with pytest.raises(ValueError, match="tokens are"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (16, 16, 3), (1, 16, 16, 4)])
def test_pictures_of_another_shape_are_refused(tokenizer: Tokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pictures are"):
        tokenizer.encode(np.zeros(shape, np.uint8))


def test_a_folder_with_vqvae_inside_is_the_same_tokenizer(vqgan_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vqgan_folder, tmp_path / "amused" / "vqvae")
    assert _load(tmp_path / "amused").fingerprint == _load(vqgan_folder).fingerprint


def test_the_codebook_is_known_whatever_it_is_stored_as(vqgan_folder: Path, tmp_path: Path) -> None:
    half = VQModel.from_pretrained(vqgan_folder).half()
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "full")
    half.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert not (tmp_path / "sharded" / WEIGHTS).exists()
    loaded = [_load(tmp_path / name) for name in ("half", "full", "sharded")]
    assert len({tokenizer.codebook_fingerprint for tokenizer in loaded}) == 1
    assert len({tokenizer.fingerprint for tokenizer in loaded}) == 3
    assert _load(vqgan_folder).codebook_fingerprint != loaded[0].codebook_fingerprint  # rounded to half: other values


def test_a_change_of_one_code_changes_both_fingerprints(copy: Path, tokenizer: Tokenizer) -> None:
    weights = load_file(copy / WEIGHTS)
    weights["quantize.embedding.weight"][5, 1] += 1e-3
    save_file(weights, copy / WEIGHTS)
    other = _load(copy)
    assert other.codebook_fingerprint != tokenizer.codebook_fingerprint
    assert other.fingerprint != tokenizer.fingerprint


def test_codebooks_do_not_mix() -> None:
    require_same_codebook("a" * 64, "a" * 64, "chains")
    with pytest.raises(DatasetError, match="chains: its codebook is bbbbbbbbbbbb, not aaaaaaaaaaaa"):
        require_same_codebook("a" * 64, "b" * 64, "chains")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(WeightsError, match=f"{name}.* is missing"):
        _load(copy)


def test_weights_that_do_not_fit_their_configuration_are_refused(copy: Path) -> None:
    whole = load_file(copy / WEIGHTS)
    key = "encoder.conv_in.weight"
    for weights, what in [
        ({name: value for name, value in whole.items() if name != key}, "missing_keys: " + key),
        (whole | {"surplus": torch.zeros(1)}, "unexpected_keys: surplus"),
        (whole | {key: torch.zeros(3, 3)}, "is not a diffusers VQModel"),
        (whole | {key: whole[key] * float("nan")}, "not finite"),
        (whole | {key: (whole[key] * 100).to(torch.int8)}, f"{key} is stored as I8, .*before quantisation"),
    ]:
        save_file(weights, copy / WEIGHTS)
        with pytest.raises(WeightsError, match=what):
            _load(copy)
    save_file(whole, copy / WEIGHTS)
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(WeightsError, match="is not a diffusers VQModel"):
        _load(copy)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_vq_embeddings": 8193}, "8193 codes"),
        ({"in_channels": 1}, "3 channels"),
        ({"out_channels": 4}, "3 channels"),
    ],
)
def test_a_model_unfit_for_rgb_tokens_of_lvm_is_refused(tmp_path: Path, changes: dict[str, int], what: str) -> None:
    VQModel(**{"block_out_channels": (4,), "norm_num_groups": 4, "num_vq_embeddings": 8} | changes).save_pretrained(
        tmp_path
    )
    with pytest.raises(WeightsError, match=what):
        _load(tmp_path)


def test_the_size_is_the_users_or_the_models(copy: Path) -> None:
    larger = _load(copy, size_px=32)
    assert (larger.size_px, larger.tokens_per_image) == (32, 64)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sample_size": 18}))
    with pytest.raises(ConfigError, match=r"tokenizer\.size_px: 18 is not a multiple of 4"):
        _load(copy)
    (copy / "config.json").write_text(json.dumps(config | {"sample_size": 8}))
    with pytest.raises(ConfigError, match=r"tokenizer\.size_px: .*LVM has 256"):
        _load(copy)
    assert _load(copy, size_px=16).tokens_per_image == 16
