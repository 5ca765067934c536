from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from covray.models.lvm.scales import SCALES, llama_config, parameters


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_those_of_transformers(scale: str, bias: bool) -> None:
    config = llama_config(scale)
    config.attention_bias = config.mlp_bias = bias
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("scale", "published"), [("300m", 291e6), ("600m", 648e6), ("1b", 1.147e9), ("3b", 3.275e9), ("7b", 6.544e9)]
)
def test_parameters_are_the_published_ones(scale: str, published: float) -> None:
    assert parameters(llama_config(scale)) == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize("scale", SCALES)
def test_no_image_code_begins_or_ends_a_sequence(scale: str) -> None:
    config = llama_config(scale)
    assert config.bos_token_id is None
    assert config.eos_token_id is None
    assert config.pad_token_id == config.vocab_size - 100
