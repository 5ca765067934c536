"""The recipes end to end with tiny networks: what they write is what the engine reads, and kills change nothing."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from covray.config import EngineConfig, PriorConfig, TokenizerConfig
from covray.errors import ConfigError, WeightsError
from covray.models.diffusion.prior import load_prior
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.pairs.scenes.portraits import portrait_pairs
from covray.recipes.nano import autoencoders, loop, recipe
from covray.recipes.nano import prior as nano_prior
from covray.recipes.nano.data import Pictures
from covray.recipes.nano.patches import VALUES, patch_tokens

CPU = torch.device("cpu")
ENGINE = EngineConfig(device="cpu")
MAX_BYTES = 40e6


def _pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of thin networks, each trained for a few steps."""
    out = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(autoencoders, "VAE_CHANNELS", (8, 8, 8))
        patched.setattr(autoencoders, "VQGAN_CHANNELS", (16, 48, 112))
        patched.setattr(autoencoders, "CROPS", 0)
        patched.setattr(autoencoders, "CODES", 64)
        patched.setattr(nano_prior, "CHANNELS", (16, 16))
        pictures, held_out = _pictures(40), _pictures(4)
        autoencoders.train_vae(pictures, held_out, out, 3, 0, CPU)
        autoencoders.train_vqgan(pictures, held_out, out, 3, 0, CPU)
        nano_prior.train_prior(pictures, held_out, out, 3, 0, CPU)
    return out


def test_the_engine_reads_the_prior_that_was_trained(family: Path) -> None:
    prior = load_prior(PriorConfig(path=str(family / "prior"), steps=4), ENGINE, verify=False)
    assert prior.size_px == 64
    assert prior.latent_shape == (4, 16, 16)
    assert prior.prediction_type == "epsilon"
    assert prior.context.shape == (1, *nano_prior.CONTEXT)
    latents = prior.encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert prior.predict(latents, torch.tensor([1])).isfinite().all()


def test_latents_have_unit_variance(family: Path) -> None:
    prior = load_prior(PriorConfig(path=str(family / "prior"), steps=4), ENGINE, verify=False)
    assert float(prior.encode(_pictures(4)).std()) == pytest.approx(1, abs=0.01)


def test_the_tokenizer_reads_the_vqgan_that_was_trained(family: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(path=str(family / "vqgan")), ENGINE)
    assert (tokenizer.size_px, tokenizer.tokens_per_image, tokenizer.codes) == (64, 256, 64)
    pictures = _pictures(3, 64).numpy()
    ids = tokenizer.encode(pictures)
    # The recipe measures with its own lookup: it must be the tokenizer's.
    model = tokenizer._model
    with torch.inference_mode():
        batch = next(iter(autoencoders.batches(torch.from_numpy(pictures), CPU)))
        _, expected = autoencoders.nearest(model, model.encode(batch).latents)
    assert np.mean(ids == expected.numpy()) > 0.98  # another batch shape: a tie may fall otherwise
    assert np.mean(ids == patch_tokens(pictures, tokenizer.codebook)) > 0.98
    found, used = autoencoders.reconstruct_vqgan(model, torch.from_numpy(pictures))
    assert used.sum() == ids.size
    errors = (tokenizer.decode(ids).astype(float) - pictures) / 255
    assert found.numpy() == pytest.approx(-10 * np.log10((errors**2).mean(axis=(1, 2, 3))), abs=0.1)


def test_a_killed_vqgan_ends_where_it_would_have(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the codebook was set: k-means is not done again, and every weight is the same to the bit."""
    monkeypatch.setattr(autoencoders, "VQGAN_CHANNELS", (16, 48, 112))
    monkeypatch.setattr(autoencoders, "CROPS", 0)
    monkeypatch.setattr(autoencoders, "CODES", 64)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1)
    batch, calls = Pictures.batch, [0]
    codebook, clustered = autoencoders.patch_codes, [0]

    def counting(*arguments):  # type: ignore[no-untyped-def]
        clustered[0] += 1
        return codebook(*arguments)

    monkeypatch.setattr(autoencoders, "patch_codes", counting)

    def killing(*arguments):  # type: ignore[no-untyped-def]
        calls[0] += 1
        if calls[0] == 3:  # two steps, and the one that is killed
            raise KeyboardInterrupt
        return batch(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Pictures, "batch", killing)
        with pytest.raises(KeyboardInterrupt):
            autoencoders.train_vqgan(_pictures(40), _pictures(4), tmp_path, 3, 0, CPU)
    autoencoders.train_vqgan(_pictures(40), _pictures(4), tmp_path, 3, 0, CPU)
    assert clustered == [1]
    name = "vqgan/diffusion_pytorch_model.safetensors"
    whole, continued = load_file(family / name), load_file(tmp_path / name)
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[key], continued[key]) for key in whole)


@pytest.mark.parametrize("name", ["vae", "vqgan", "prior", "lvm"])
def test_a_trained_model_is_refused_before_anything_is_rendered(
    family: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (family / "lvm").mkdir(exist_ok=True)
    monkeypatch.setattr(recipe, "pictures", lambda *_: pytest.fail("pictures were rendered"))
    with pytest.raises(ConfigError, match=f"{name}: already exists"):
        recipe.train_model(name, family, 3, 1, torch.get_num_threads(), "cpu", 0)


def test_a_kill_while_a_model_is_written_leaves_no_folder(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoders, "VAE_CHANNELS", (8, 8, 8))
    save = AutoencoderKL.save_pretrained

    def killed(model: AutoencoderKL, folder: Path, **options: bool) -> None:
        save(model, folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AutoencoderKL, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            autoencoders.train_vae(_pictures(40), _pictures(4), tmp_path, 3, 0, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["vae.state.pt"]
    autoencoders.train_vae(_pictures(40), _pictures(4), tmp_path, 3, 0, CPU)
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (family / weights).read_bytes()


def test_the_shipped_networks_have_their_shapes_and_fit_in_the_package() -> None:
    with torch.device("meta"):
        vae, vqgan, unet = autoencoders.new_vae(), autoencoders.new_vqgan(), nano_prior.new_unet()
        pictures = torch.zeros(1, 3, 64, 64)
        assert vae.encode(pictures).latent_dist.mean.shape == (1, 4, 16, 16)
        assert vqgan.encode(pictures).latents.shape == (1, VALUES, 16, 16)
        context = torch.zeros(1, *nano_prior.CONTEXT)
        answer = unet(torch.zeros(1, 4, 16, 16), 0, encoder_hidden_states=context).sample
        assert answer.shape == (1, 4, 16, 16)
    parameters = sum(weight.numel() for model in (vae, vqgan, unet) for weight in model.parameters())
    assert 2 * parameters < MAX_BYTES
    assert vqgan.config.num_vq_embeddings <= 8192


def test_an_untrained_vae_does_not_drown_its_means_in_noise() -> None:
    vae = autoencoders.new_vae()
    with torch.inference_mode():
        posterior = vae.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))).latent_dist
    assert float(posterior.std.max()) < 0.06


def test_nearest_codes_are_the_nearest() -> None:
    model = autoencoders.new_vqgan()
    latents = torch.randn(2, VALUES, 4, 4, generator=torch.Generator().manual_seed(0))
    quantised, ids = autoencoders.nearest(model, latents)
    codes = model.quantize.embedding.weight
    rows = latents.permute(0, 2, 3, 1).reshape(-1, VALUES)
    distance = torch.cdist(rows.double(), codes.double())
    assert torch.allclose(distance.gather(1, ids.reshape(-1, 1))[:, 0], distance.min(1).values, atol=1e-5)
    assert torch.equal(quantised.permute(0, 2, 3, 1).reshape(-1, VALUES), codes[ids.flatten()])


def test_batches_are_all_pictures_in_order() -> None:
    pictures = _pictures(10, 8)
    parts = list(autoencoders.batches(pictures, CPU, size=4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat(parts).permute(0, 2, 3, 1).mul(255).round().to(torch.uint8), pictures)


def test_the_family_is_measured(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "load_prior", functools.partial(load_prior, verify=False))
    monkeypatch.setattr(recipe, "PriorConfig", functools.partial(PriorConfig, steps=4))
    (family / "lvm").mkdir(exist_ok=True)
    (family / "lvm" / "config.json").touch()
    monkeypatch.setattr(recipe, "measure_lvm", lambda root, held_out, training: {"lvm": {"depth": 1.25}})
    found = recipe.measure(family, scenes=2, round_trips=1)
    assert found.answer_perplexity == {"lvm": {"depth": 1.2}}
    assert found.pictures == 16
    for psnr_db in (found.vae_psnr_db, found.vqgan_psnr_db, found.inversion_psnr_db):
        assert set(psnr_db) == {"all", *recipe.KINDS}
        assert psnr_db["all"] == pytest.approx(np.mean([psnr_db[kind] for kind in recipe.KINDS]), abs=0.01)
    assert 0 < found.codebook_in_use <= 1


@pytest.mark.parametrize("name", ["prior/vae", "vqgan"])
def test_a_damaged_family_is_refused_before_it_is_measured(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(recipe, "load_prior", functools.partial(load_prior, verify=False))
    monkeypatch.setattr(recipe, "scene_pictures", lambda *_: pytest.fail("scenes were rendered"))
    shutil.copytree(family, tmp_path / "family")
    (tmp_path / "family" / "lvm").mkdir(exist_ok=True)
    (tmp_path / "family" / "lvm" / "config.json").touch()
    weights = tmp_path / "family" / name / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=name):
        recipe.measure(tmp_path / "family", scenes=1)


@pytest.mark.parametrize(
    ("model", "device", "said"),
    [
        ("unet", "cpu", "unet: no such nano model; give one of vae, vqgan, prior, lvm, vlm"),
        ("prior", "cpu", "vae: not there"),
        ("lvm", "cpu", "vqgan: not there"),
        ("vae", "tpu", "--device tpu"),
    ],
)
def test_a_training_that_cannot_start_says_why(tmp_path: Path, model: str, device: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe.train_model(model, tmp_path, 1, 1, 1, device, 0)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())  # nothing was rendered before


@pytest.mark.parametrize("name", ["vlm", "judge"])
def test_fewer_portraits_than_have_all_splits_are_refused(tmp_path: Path, name: str) -> None:
    for count in range(recipe.MIN_PORTRAITS, 16):
        assert {pair.split for pair in portrait_pairs(count, 8)} == {"train", "val", "test"}
    with pytest.raises(ConfigError, match=f"--scenes 9: the {name} is trained on 10 portraits or more"):
        recipe.train_model(name, tmp_path, 1, 9, 1, "cpu", 0)
    assert not list(tmp_path.iterdir())


def test_a_seed_that_k_means_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seed 4294967296: is too large"):
        recipe.train_model("vqgan", tmp_path, 1, 1, 1, "cpu", 2**32)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        recipe.train_model("vae", tmp_path, 1, 1, 1, "cuda", 0)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        recipe.train_model("vae", tmp_path / "file" / "out", 1, 1, 1, "cpu", 0)


def test_a_family_that_is_not_there_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is missing"):
        recipe.measure(tmp_path)


def test_training_gets_the_recipes_pictures_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(recipe, "train_vae", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(recipe, "CROPS", 1)
    monkeypatch.setattr(recipe, "HELD_OUT_SCENES", 1)
    threads = torch.get_num_threads()
    for steps in (None, 7):
        recipe.train_model("vae", tmp_path, steps, 1, threads, "cpu", 5)
    assert [call[3] for call in calls] == [recipe.STEPS["vae"], 7]
    training, held_out, out, _, seed, device = calls[0]
    assert training.shape == (8 + 3, 64, 64, 3)
    assert held_out.shape == (8, 64, 64, 3)
    assert (out, seed, device) == (tmp_path, 5, CPU)
