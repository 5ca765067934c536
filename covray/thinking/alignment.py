"""The loss of the aligner: a frozen T5 decoder writes text from aligned features instead of its encoder's outputs.

    ThinkDiff-LVLM   aligner(features of the first part)                           -> decoder -> the second part's text
    ThinkDiff-CLIP   [aligner(features of the picture), encoder(first words)]      -> decoder -> the words after them

Only the aligner has gradients. The frozen language model stays in evaluation mode: dropout would make its text harder
to read than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

IGNORED = -100
"""Label of a place that carries no loss, transformers' own."""


@dataclass(frozen=True)
class AlignmentBatch:
    """Captions to learn from."""

    features: Tensor
    """What the aligner reads, float [B, F, input_width], padded on the right."""
    mask: Tensor
    """Which of them are features, bool [B, F]."""
    labels: Tensor
    """The text to write, int64 [B, T]; ``IGNORED`` for padding."""
    words: Tensor | None = None
    """Ids of the text that the encoder reads, int64 [B, W], padded on the right; None: no text."""
    words_mask: Tensor | None = None
    """Which of them are tokens, bool [B, W]."""

    def to(self, device: torch.device) -> AlignmentBatch:
        """Return the same on ``device``."""
        return AlignmentBatch(
            features=self.features.to(device),
            mask=self.mask.to(device),
            labels=self.labels.to(device),
            words=None if self.words is None else self.words.to(device),
            words_mask=None if self.words_mask is None else self.words_mask.to(device),
        )


class Alignment(nn.Module):
    """An aligner before a frozen language model."""

    def __init__(self, aligner: nn.Module, language_model: Any):
        """Freeze the language model.

        Args:
            aligner: [B, F, input_width] to [B, F, width].
            language_model: A ``T5ForConditionalGeneration``. Its encoder is used for words only.
        """
        super().__init__()
        self.aligner = aligner
        self.language_model = language_model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Alignment:
        """Set the mode of the aligner; the language model stays in evaluation mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    def read(self, batch: AlignmentBatch) -> tuple[Tensor, Tensor]:
        """Return what the decoder, or a diffusion model, reads.

        Returns:
            Aligned features, and after them the encoded words, [B, F + W, width]; and which of them are read, bool
            [B, F + W].
        """
        aligned = self.aligner(batch.features)
        if batch.words is None or batch.words_mask is None:
            return aligned, batch.mask
        # Encoded words depend on no trained weight: without a graph they cost no memory for the backward pass.
        with torch.no_grad():
            encoded = self.language_model.encoder(input_ids=batch.words, attention_mask=batch.words_mask)
        states = encoded.last_hidden_state.to(aligned.dtype)
        return torch.cat((aligned, states), 1), torch.cat((batch.mask, batch.words_mask), 1)

    def forward(self, batch: AlignmentBatch) -> Tensor:
        """Return the cross-entropy of every label that carries loss in nats, float32 [P], row by row."""
        states, mask = self.read(batch)
        # The labels one place later, as the decoder was pretrained, with padding in place of what is ignored.
        decoder_ids = self.language_model.prepare_decoder_input_ids_from_labels(batch.labels)
        output = self.language_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states.to(self.language_model.dtype)),
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
        )
        # Selected, then in float32: logits over a whole vocabulary are rounded too coarsely in bfloat16.
        carries = batch.labels != IGNORED
        return F.cross_entropy(output.logits[carries].float(), batch.labels[carries], reduction="none")

    @torch.no_grad()
    def write(self, batch: AlignmentBatch, longest: int) -> Tensor:
        """Return the ids that the decoder writes greedily for the features, int64 [B, at most ``longest`` + 1]."""
        states, mask = self.read(batch)
        ids: Tensor = self.language_model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states.to(self.language_model.dtype)),
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
        )
        return ids


def collate(
    features: Sequence[Tensor], targets: Sequence[str], tokenizer: Any, longest: int, words: Sequence[str] | None = None
) -> AlignmentBatch:
    """Return a batch; texts are tokenized by the language model's tokenizer, each with its end token.

    Args:
        features: Those of each caption's part that is read, [n, input_width] each.
        targets: The texts to write.
        tokenizer: The language model's.
        longest: Tokens of a text to write, at most, the end token among them.
        words: The texts that the encoder reads; None: none.
    """
    rows = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    lengths = torch.tensor([len(own) for own in features])
    text = tokenizer(list(targets), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, IGNORED)
    mask = torch.arange(rows.shape[1]) < lengths[:, None]
    if words is None:
        return AlignmentBatch(rows, mask, labels)
    read = tokenizer(list(words), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return AlignmentBatch(rows, mask, labels, read["input_ids"], read["attention_mask"].bool())
