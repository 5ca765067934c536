"""Recipe of the nano language model: a T5 of 6 M parameters that learns captions of portraits.

    half        the beginning of a caption           -> the rest of it
    a quarter   a caption                            -> another caption of the same portrait
    a quarter   a caption with gaps                  -> what stood there (Raffel et al. 2020)

ThinkDiff trains its aligner against the decoder, and its painter reads the encoder. A caption states every fact twice,
so that the rest follows from the meaning of its beginning. Every step has new captions; nothing is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from covray.io.tensor_files import new_folder
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import Portrait, sample_portrait
from covray.recipes.nano.loop import Run, muon_and_adamw, new_part, train
from covray.recipes.nano.lvm import ADAMW_RATE, MUON_RATE
from covray.recipes.nano.portrait_data import numbers_of, unseen_captions
from covray.recipes.nano.vlm import new_tokenizer

STEPS = 1500
"""Few suffice with Muon: after 100 steps the loss was 0.58 nats a token, and 1.17 with AdamW."""
BATCH = 64
WIDTH, LAYERS, HEADS, INNER = 256, 4, 4, 512
PREFIXES, PARAPHRASES = 0.5, 0.25
"""Shares of the tasks; the rest has gaps."""
CORRUPTED, SPAN = 0.15, 3
"""Share of a caption's words that are cut out, and how many words a gap has."""
GAPS = 10
IGNORED = -100
"""Label of padding, PyTorch's own."""
_VALIDATED = 256
"""Captions with held-out cells that are measured at every save."""


def train_text(out: Path, steps: int | None, portraits: int, seed: int, device: torch.device) -> None:
    """Train the language model and save it, with its tokenizer, as ``out``/text; a killed training continues.

    Args:
        out: Folder of the family.
        steps: Steps; None: the recipe's.
        portraits: Not used: the model reads words only, new ones in every step.
        seed: Of captions and weights.
        device: Where the model is trained.

    Raises:
        ConfigError: ``out``/text exists.
    """
    result = new_part(out, "text")
    tokenizer = text_tokenizer(seed)
    torch.manual_seed(seed)

    def loss_of(model: Any, _: int, generator: torch.Generator) -> Tensor:
        read, written = lessons(BATCH, numbers_of(generator))
        return text_loss(model, tokenizer, read, written)

    def optimizers(model: Any) -> Sequence[torch.optim.Optimizer]:
        # Muon is for maps from features to features, which embeddings and the head are not.
        matrices = [
            module for module in model.modules() if isinstance(module, nn.Linear) and module is not model.lm_head
        ]
        return muon_and_adamw(model, nn.ModuleList(matrices), MUON_RATE, ADAMW_RATE)

    def measure(model: Any) -> str:
        return _measured(model, tokenizer, seed)

    untrained = T5ForConditionalGeneration(new_config(tokenizer))
    run = Run("text", out, steps or STEPS, seed, device, ADAMW_RATE)
    model = train(untrained, loss_of, run, measure=measure, optimizers=optimizers)
    with new_folder(result) as folder:
        model.half().save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)


def text_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return the vocabulary of the nano vision-language model, with T5's padding, gaps and end of every text.

    Tokens of both have the same ids. As with T5, a text begins like a word in a sentence, so that the rest of a caption
    begins with the same token as inside the caption.
    """
    shared = new_tokenizer(seed)
    inner = Tokenizer.from_str(shared.backend_tokenizer.to_str())
    end = str(shared.eos_token)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.add_special_tokens(["<pad>", *(f"<gap_{number}>" for number in range(GAPS))])
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, int(shared.eos_token_id))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def new_config(tokenizer: Any) -> T5Config:
    """Return the architecture: a T5-v1.1 without dropout, whose steps follow from the seed alone."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=INNER,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def lessons(count: int, numbers: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return texts to read and the texts to write for them; ``numbers`` draws portraits, words and tasks."""
    read, written = [], []
    for _ in range(count):
        portrait = sample_portrait(numbers)
        source, target = _lesson(portrait, numbers)
        read.append(source)
        written.append(target)
    return read, written


def text_loss(model: Any, tokenizer: Any, read: list[str], written: list[str]) -> Tensor:
    """Return the mean cross-entropy of the tokens of ``written``, including their end tokens."""
    device = next(model.parameters()).device
    source = tokenizer(read, padding=True, return_tensors="pt").to(device)
    target = tokenizer(written, padding=True, return_tensors="pt").to(device)
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
    logits = model(
        input_ids=source["input_ids"], attention_mask=source["attention_mask"],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
    ).logits  # fmt: skip
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _lesson(portrait: Portrait, numbers: np.random.Generator) -> tuple[str, str]:
    """Return a text to read and the text to write for it, of one of the three tasks of the module."""
    caption = portrait_words(portrait, numbers).caption
    task = numbers.random()  # in [0, 1): the shares of the tasks divide it
    words = caption.split(" ")
    if task < PREFIXES:
        # There is at least one word to read and one to write.
        cut = int(numbers.integers(1, len(words)))
        return " ".join(words[:cut]), " ".join(words[cut:])
    if task < PREFIXES + PARAPHRASES:
        # The same portrait in other words, which are drawn anew.
        return caption, portrait_words(portrait, numbers).caption
    return with_gaps(words, numbers)


def with_gaps(words: list[str], numbers: np.random.Generator) -> tuple[str, str]:
    """Return a text with gaps, and what stood in them.

    Args:
        words: The words of the text.
        numbers: Draws where the gaps are.
    """
    count = min(GAPS, max(1, round(CORRUPTED * len(words) / SPAN)))
    stretch = len(words) // count
    read, written = [], []
    for gap in range(count):
        # The last stretch takes the words that the division left over.
        own = words[gap * stretch :] if gap == count - 1 else words[gap * stretch : (gap + 1) * stretch]
        # A word stays on at least one side of a gap.
        length = min(SPAN, len(own) - 1)
        start = int(numbers.integers(0, len(own) - length + 1))
        mark = f"<gap_{gap}>"
        read += [*own[:start], mark, *own[start + length :]]
        written += [mark, *own[start : start + length]]
    return " ".join(read), " ".join(written)


@torch.inference_mode()
def _measured(model: Any, tokenizer: Any, seed: int) -> str:
    """Return the loss of the second halves of captions with held-out cells, in one line."""
    read, written = [], []
    for caption in unseen_captions(_VALIDATED, seed):
        words = caption.split(" ")
        half = len(words) // 2
        read.append(" ".join(words[:half]))
        written.append(" ".join(words[half:]))
    model.eval()
    return f"held-out second halves: {float(text_loss(model, tokenizer, read, written)):.3f} nats a token"
