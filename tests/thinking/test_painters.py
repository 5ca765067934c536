"""Tiny random pipelines of diffusers draw from features as they draw from a text whose T5 states the features are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from covray.config.think import PainterConfig
from covray.errors import ConfigError, WeightsError
from covray.thinking.painters import PipelinePainter, load_painter, painter_of
from tests.support.language_models import WIDTH, WORDS, language_model, language_tokenizer
from tests.support.priors import CPU

KINDS = ("flux", "sd3", "pixart", "cogvideox")
TEXT_TOKENS = 12
"""Of a text, in all pipelines here."""
SIZE_PX = {"flux": 8, "sd3": 8, "pixart": 8, "cogvideox": 16}


def clip_text(model_class: Any, width: int) -> Any:
    return model_class(
        CLIPTextConfig(
            vocab_size=len(WORDS) + 3, hidden_size=width, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=width, max_position_embeddings=10, bos_token_id=0, eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()  # fmt: skip


def vae(latents: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=latents, norm_num_groups=1, sample_size=32,
        shift_factor=0.06, scaling_factor=1.5,
    ).eval()  # fmt: skip


def make_pipeline(kind: str) -> Any:
    """Return a pipeline of ``kind`` with a T5 encoder of two layers."""
    torch.manual_seed(0)
    encoder = T5EncoderModel(language_model().config).eval()
    clip_tokenizer = language_tokenizer()
    clip_tokenizer.model_max_length = 10
    if kind == "flux":
        transformer = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        )  # fmt: skip
        return FluxPipeline(
            FlowMatchEulerDiscreteScheduler(), vae(1), clip_text(CLIPTextModel, 8), clip_tokenizer, encoder,
            language_tokenizer(), transformer,
        )  # fmt: skip
    if kind == "sd3":
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=WIDTH, pooled_projection_dim=16, out_channels=4,
        )  # fmt: skip
        encoders = [clip_text(CLIPTextModelWithProjection, 8), clip_text(CLIPTextModelWithProjection, 8)]
        return StableDiffusion3Pipeline(
            transformer, FlowMatchEulerDiscreteScheduler(), vae(4), encoders[0], clip_tokenizer, encoders[1],
            clip_tokenizer, encoder, language_tokenizer(),
        )  # fmt: skip
    if kind == "pixart":
        transformer = PixArtTransformer2DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            caption_channels=WIDTH, cross_attention_dim=16, out_channels=8,
        )  # fmt: skip
        return PixArtSigmaPipeline(language_tokenizer(), encoder, vae(4), transformer, DDIMScheduler())
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=WIDTH, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        max_text_seq_length=TEXT_TOKENS,
    )  # fmt: skip
    video_vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return CogVideoXPipeline(language_tokenizer(), encoder, video_vae, transformer, CogVideoXDDIMScheduler())


def config_of(kind: str, **more: Any) -> PainterConfig:
    values = {"path": "none", "steps": 2, "size_px": SIZE_PX[kind], "frames": 8, "words": TEXT_TOKENS, "seed": 7}
    return PainterConfig(kind=kind, **values | more)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(kind: str) -> Any:
    return make_pipeline(kind)


@pytest.fixture
def painter(kind: str, pipeline: Any) -> PipelinePainter:
    return painter_of(pipeline, config_of(kind))


def features_of(seed: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_a_picture_follows_from_its_features_alone(kind: str, painter: PipelinePainter) -> None:
    assert painter.width == WIDTH
    first, second = painter.paint([features_of(0), features_of(1, 3)])
    frames = 8 if kind == "cogvideox" else 1
    assert first.shape == (frames, SIZE_PX[kind], SIZE_PX[kind], 3)
    assert first.dtype == np.uint8
    assert np.array_equal(painter.paint([features_of(1, 3)])[0], second)
    assert not np.array_equal(first, second)


def test_states_of_a_text_draw_what_the_pipeline_draws_of_it(kind: str, pipeline: Any) -> None:
    words = "a red ball on the left of it"
    config = config_of(kind)
    drawn = painter_of(pipeline, config).paint([torch.zeros(0, WIDTH)], [words])[0]
    more = {"num_frames": 8} if kind == "cogvideox" else {}
    if kind == "pixart":
        more = {"use_resolution_binning": False, "clean_caption": False}
    output = pipeline(
        words, height=SIZE_PX[kind], width=SIZE_PX[kind], num_inference_steps=2, guidance_scale=config.guidance,
        generator=torch.Generator().manual_seed(7), max_sequence_length=TEXT_TOKENS, output_type="np",
        return_dict=False, **more,
    )[0]  # fmt: skip
    expected = np.rint(np.asarray(output).reshape(drawn.shape) * 255)
    assert np.abs(expected - drawn.astype(float)).max() <= 1


def test_words_stand_after_the_features(kind: str, painter: PipelinePainter) -> None:
    alone, with_red, with_blue = painter.paint([features_of(0)] * 3, ["", "a red ball", "a blue box"])
    assert np.array_equal(alone, painter.paint([features_of(0)])[0])
    assert not np.array_equal(alone, with_red)
    assert not np.array_equal(with_red, with_blue)


def test_features_of_another_width_are_refused(painter: PipelinePainter) -> None:
    with pytest.raises(WeightsError, match="features are 12 wide, the painter reads 16; give an aligner"):
        painter.paint([torch.zeros(3, 12)])


def test_pixart_draws_without_its_text_encoder_if_nothing_needs_it() -> None:
    whole = make_pipeline("pixart")
    pipeline = PixArtSigmaPipeline(whole.tokenizer, None, whole.vae, whole.transformer, whole.scheduler)
    free = painter_of(pipeline, config_of("pixart", guidance=1))
    expected = painter_of(whole, config_of("pixart", guidance=1)).paint([features_of(0)])
    assert np.array_equal(free.paint([features_of(0)])[0], expected[0])
    for painter, words in ((free, ["red"]), (painter_of(pipeline, config_of("pixart")), None)):
        with pytest.raises(ConfigError, match=r"has no T5 encoder, .*; give a folder with it, or no words and"):
            painter.paint([features_of(0)], words)


def test_more_features_than_a_video_reads_are_refused() -> None:
    painter = painter_of(make_pipeline("cogvideox"), config_of("cogvideox"))
    assert len(painter.paint([features_of(0, TEXT_TOKENS)])[0]) == 8
    with pytest.raises(ConfigError, match="13 features: CogVideoX reads 12 tokens; give fewer features"):
        painter.paint([features_of(0, TEXT_TOKENS + 1)])


def test_a_folder_loads_as_its_kind_and_as_no_other(tmp_path: Path) -> None:
    pipeline = make_pipeline("flux")
    pipeline.save_pretrained(tmp_path / "flux")
    loaded = load_painter(config_of("flux", path=str(tmp_path / "flux")), CPU)
    expected = painter_of(pipeline, config_of("flux")).paint([features_of(0)])
    assert np.array_equal(loaded.paint([features_of(0)])[0], expected[0])
    with pytest.raises(WeightsError, match=r"is a FluxPipeline, not a StableDiffusion3Pipeline; give another"):
        load_painter(config_of("sd3", path=str(tmp_path / "flux")), CPU)
    (tmp_path / "flux" / "model_index.json").write_text("{")
    with pytest.raises(WeightsError, match=r"model_index.json cannot be read .*; get the folder again"):
        load_painter(config_of("flux", path=str(tmp_path / "flux")), CPU)
    with pytest.raises(WeightsError, match="no such folder"):
        load_painter(config_of("flux", path=str(tmp_path / "none")), CPU)
    with pytest.raises(ConfigError, match="int: draws from no features of T5; give one of FluxPipeline, Stable"):
        painter_of(3, config_of("flux"))
