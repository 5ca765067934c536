"""The published sizes of the LVM family, and the nano that ships with the package."""

from __future__ import annotations

from transformers import LlamaConfig

SPECIAL_IDS = 100
"""Ids after the image codes that no picture produces (LVM: 8192..8291)."""
_SHAPES = {  # hidden, intermediate, layers, heads, codes, context (ytongbai/LVM; nano: ours)
    "nano": (256, 704, 6, 4, 2048, 1024),
    "300m": (1024, 2688, 22, 8, 8192, 4096),
    "600m": (1536, 4096, 22, 16, 8192, 4096),
    "1b": (2048, 5504, 22, 16, 8192, 4096),
    "3b": (3200, 8640, 26, 32, 8192, 4096),
    "7b": (4096, 11008, 32, 32, 8192, 4096),
}
SCALES = tuple(_SHAPES)


def llama_config(scale: str) -> LlamaConfig:
    """Return the architecture of ``scale``: LLaMA with SiLU, an untied head and no grouped queries.

    Ids below the number of codes are the tokenizer's, without an offset. None of them can end a sequence, so no id
    does.
    """
    hidden, intermediate, layers, heads, codes, context = _SHAPES[scale]
    return LlamaConfig(
        vocab_size=codes + SPECIAL_IDS,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=codes,
    )


def parameters(config: LlamaConfig) -> int:
    """Return the number of parameters of the architecture ``config``, embedding and head included."""
    width, inner = config.hidden_size, config.intermediate_size
    layer = 4 * width * width + 3 * width * inner + 2 * width  # attention, MLP, norms
    if config.attention_bias:
        layer += 4 * width
    if config.mlp_bias:
        layer += 2 * inner + width
    return config.num_hidden_layers * layer + 2 * config.vocab_size * width + width
