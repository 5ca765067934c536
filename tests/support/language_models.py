"""T5 models of two layers with random weights, and a tokenizer of words."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = ["a", "red", "blue", "ball", "box", "on", "the", "left", "of", "and", "it", "is", "round", "flat"]
WIDTH = 16


def language_tokenizer() -> Any:
    """Return a tokenizer of ``WORDS`` that ends every text, as T5's does."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def language_model(seed: int = 0) -> Any:
    """Return a T5 with dropout, whose final norm is not 1, so that a copy can be told from a new one."""
    config = T5Config(
        vocab_size=len(WORDS) + 3, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.5,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        with torch.no_grad():
            model.encoder.final_layer_norm.weight.uniform_(0.1, 0.3)
    return model
