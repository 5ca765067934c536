"""Tiny random models of every class that labels photographs, in the folders that transformers and diffusers write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, MarigoldDepthPipeline, MarigoldNormalsPipeline, UNet2DConditionModel

CARD = "---\nlicense: apache-2.0\ntags: [depth]\n---\n# A model\n"


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def write_glpn(folder: Path) -> Path:
    """Depth that is metric by its making, 0 to 10 m."""
    config = transformers.GLPNConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, max_depth=10,
    )  # fmt: skip
    return _save(folder, transformers.GLPNForDepthEstimation(config), transformers.GLPNImageProcessor())


def write_dpt(folder: Path) -> Path:
    """Depth that is relative: DPT's inverse depth."""
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    processor = transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    return _save(folder, transformers.DPTForDepthEstimation(config), processor)


def write_segformer(folder: Path, classes: int = 5) -> Path:
    names = {number: f"class {number}" for number in range(classes)}
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, id2label=names,
    )  # fmt: skip
    processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
    return _save(folder, transformers.SegformerForSemanticSegmentation(config), processor)


def write_maskformer(folder: Path) -> Path:
    """A universal segmentation, which answers masks."""
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    detr = transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=16, backbone_config=swin, decoder_config=detr,
        id2label={number: f"class {number}" for number in range(4)},
    )  # fmt: skip
    processor = transformers.MaskFormerImageProcessor(size={"height": 64, "width": 64})
    return _save(folder, transformers.MaskFormerForInstanceSegmentation(config), processor)


def write_vitpose(folder: Path, keypoints: int = 17) -> Path:
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[32, 24], patch_size=[8, 8], hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        out_features=["stage1"],
    )  # fmt: skip
    config = transformers.VitPoseConfig(
        backbone_config=backbone, use_simple_decoder=True, num_labels=keypoints,
    )  # fmt: skip
    processor = transformers.VitPoseImageProcessor(size={"height": 32, "width": 24})
    return _save(folder, transformers.VitPoseForPoseEstimation(config), processor)


def write_yolos(folder: Path, names: tuple[str, ...]) -> Path:
    """A detector; ``names`` are its classes."""
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=16, num_detection_tokens=4, id2label=dict(enumerate(names)),
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config)
    with torch.no_grad():  # always sure of its first class
        model.class_labels_classifier.layers[-1].bias[0] = 50
    return _save(folder, model, transformers.YolosImageProcessor(size={"height": 32, "width": 32}))


def write_tips(folder: Path) -> Path:
    """Normals by transformers' own class for them."""
    backbone = transformers.AutoConfig.for_model(
        "tipsv2_vision_model", hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "tipsv2_dpt", backbone_config=backbone, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8
    )
    model = transformers.AutoModelForNormalEstimation.from_config(config)
    return _save(folder, model, transformers.DPTImageProcessor(size={"height": 28, "width": 28}))


def write_marigold(folder: Path, task: str) -> Path:
    tokenizer_folder = folder.with_name("clip")
    tokenizer_folder.mkdir(parents=True, exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", "ab", *"abc", *(f"{letter}</w>" for letter in "abc")]
    (tokenizer_folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tokenizer_folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tokenizer_folder / "vocab.json"), str(tokenizer_folder / "merges.txt"), model_max_length=8
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "unet": unet, "vae": vae, "text_encoder": text, "tokenizer": tokenizer, "default_denoising_steps": 1,
        "default_processing_resolution": 32, "scheduler": DDIMScheduler(prediction_type="v_prediction"),
    }  # fmt: skip
    if task == "depth":
        MarigoldDepthPipeline(**shared, prediction_type="depth").save_pretrained(folder)
    else:
        MarigoldNormalsPipeline(**shared, prediction_type="normals").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def seeded(write: Callable[..., Path], *arguments: Any) -> Path:
    """Write a model of fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return write(*arguments)


def scribble(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    """Change a model's configuration."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def photo_of(seed: int, height_px: int = 36, width_px: int = 48) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
