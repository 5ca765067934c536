"""Tiny models of ThinkDiff with random weights, and features of a few pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from covray.config import load_config
from covray.config.think import LanguageModelConfig, ThinkFeaturesConfig, ThinkTrainConfig
from covray.config.vlm import VlmModelConfig
from covray.io.images import Picture, encode_png
from covray.models.aligner.aligner import Aligner, new_aligner, save_aligner
from covray.models.aligner.language import load_language_model
from covray.models.vlm.checkpoint import vlm_facts
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.words import CAPTION_TASK, Words
from covray.thinking.towers import tower_facts
from tests.support.language_models import WIDTH, language_model, language_tokenizer
from tests.support.priors import write_prior
from tests.support.vlms import picture, write_vlm

PICTURES = 12


@pytest.fixture(scope="session")
def think_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A vision-language model, a vision tower, a T5 and a manifest of captioned pictures, one of them broken."""
    root = tmp_path_factory.mktemp("think")
    text, clip, manifest = root / "text", root / "clip", root / "words.parquet"
    language_model().save_pretrained(text)
    language_tokenizer().save_pretrained(text)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(clip)
    with ManifestWriter(manifest, captions=True) as writer:
        for number in range(PICTURES):
            data = encode_png(picture(number, 28, 28)) if number else b"no picture"
            split = "train" if number < PICTURES - 4 else "val"
            words = Words("a red ball on the left" if number % 2 else "a blue box", {}, ())
            writer.add(Pair(CAPTION_TASK, split, Picture(bytes=data), Picture(), {}, words))
    vlm = write_vlm(root / "vlm", "qwen2_5_vl")
    return {"vlm": vlm, "clip": str(clip), "text": str(text), "manifest": str(manifest)}


@pytest.fixture
def features_config(think_folders: dict[str, str], tmp_path: Path) -> Callable[..., ThinkFeaturesConfig]:
    """Gives configurations of tiny features, with dotted keys on top."""

    def config(out: str = "features", variant: str = "lvlm", **changes: Any) -> ThinkFeaturesConfig:
        options = {
            "data": think_folders["manifest"], "out": str(tmp_path / out), "variant": variant,
            "vlm.path": think_folders["vlm" if variant == "lvlm" else "clip"], "instructions": ["what is it"],
            "thought.max_tokens": 6, "thought.temperature": 1.0, "thought.top_p": 1.0, "engine.device": "cpu",
            "rows_per_block": 2,
        }  # fmt: skip
        return load_config(ThinkFeaturesConfig, None, options | _dotted(changes))

    return config


@pytest.fixture
def aligner_config(think_folders: dict[str, str], tmp_path: Path) -> Callable[..., ThinkTrainConfig]:
    """Gives configurations of tiny trainings, with dotted keys on top."""

    def config(data: str, out: str = "run", **changes: Any) -> ThinkTrainConfig:
        options = {
            "data": data, "out": str(tmp_path / out), "language_model.path": think_folders["text"],
            "language_model.max_tokens": 16, "optimizer.steps": 6, "optimizer.batch": 4, "optimizer.micro_batch": 2,
            "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 2, "optimizer.cosine_steps": 8,
            "compute.device": "cpu", "compute.dtype": "float32", "compute.deepspeed": "none", "compute.threads": 1,
            "checkpoints.every_steps": 2, "validate_every_steps": 3, "tracking.uri": "none",
        }  # fmt: skip
        return load_config(ThinkTrainConfig, None, options | _dotted(changes))

    return config


def write_features(config: ThinkFeaturesConfig) -> str:
    """Write the folder of ``covray think features`` in this process, without Ray."""
    import pyarrow.parquet as pq

    from covray.io.storage import Folder
    from covray.thinking.building import FeatureBuilder, feature_width, read_samples
    from covray.thinking.dataset import PARQUET, SHARDS, TOKENIZER
    from covray.thinking.records import FeaturesRecord, FeaturesResult

    samples = read_samples(config)
    builder = FeatureBuilder(config, samples.root)
    rows = builder.build(samples.rows)
    options = {key: value for key, value in PARQUET.items() if key != "row_group_size"}
    splits = sorted(set(rows["split"].to_pylist()))
    for split in splits:
        folder = Path(config.out, SHARDS, f"split={split}")
        folder.mkdir(parents=True)
        mask = np.array(rows["split"].to_pylist()) == split
        own = rows.filter(mask).drop_columns(["split"])
        pq.write_table(own, folder / "all.parquet", row_group_size=1, **options)
    Path(config.out, TOKENIZER).mkdir()
    builder.save_tokenizer(str(Path(config.out, TOKENIZER)))
    FeaturesRecord(
        config=config.model_dump(mode="json"), identity=config.identity(), width=feature_width(builder.facts),
        fingerprints={"vlm": builder.facts.fingerprint, "data": samples.fingerprint}, samples=len(rows),
    ).write(Folder(config.out))  # fmt: skip
    FeaturesResult(
        samples=len(rows), failed=1, reasons={"not_an_image": 1}, per_split=dict.fromkeys(splits, 1), features=1,
        bytes=1, seconds=0.0,
    ).write(config.out)  # fmt: skip
    return config.out


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


def write_painter(folder: Path, width: int = WIDTH) -> Path:
    """A prior of 64 px pictures whose UNet reads features of ``width``, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=width,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2, norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        context = torch.randn(1, 5, width)
    write_prior(folder, "v_prediction")  # what a UNet of random weights is taken for
    unet.save_pretrained(folder / "unet")
    save_file({"context": context}, folder / "empty_prompt.safetensors")
    return folder


def write_parts(folder: Path, think_folders: dict[str, str], variant: str) -> Path:
    """A folder of parts for ``covray serve --think``, its aligner as it is before any training."""
    model = "clip" if variant == "clip" else "vlm"
    for name in (model, "text"):
        (folder / name).symlink_to(think_folders[name])
    write_painter(folder / "painter")
    language = load_language_model(LanguageModelConfig(path=think_folders["text"]), torch.float32, torch.device("cpu"))
    if variant == "clip":
        tower = tower_facts(VlmModelConfig(path=think_folders["clip"]))
        width, fingerprint = tower.width, tower.fingerprint
    else:
        facts = vlm_facts(VlmModelConfig(path=think_folders["vlm"]))
        width, fingerprint = int(facts.config.get_text_config().hidden_size), facts.fingerprint
    aligner = new_aligner(
        width, language.model, "encoder", 0, vlm_fingerprint=fingerprint, language_fingerprint=language.fingerprint
    )
    features = {"variant": variant, "thought": {"max_tokens": 6, "min_tokens": 2}}
    save_aligner(folder / "aligner", Aligner(aligner.network, aligner.record.model_copy(update={"features": features})))
    return folder
