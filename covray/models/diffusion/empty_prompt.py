"""The empty prompt, which every picture has for a context: where it is kept, how it is encoded, how a UNet reads it.

The encoder also reads captions, for the ablation ``prior.context: caption``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from covray.errors import WeightsError, one_line
from covray.io.model_folders import require_whole
from covray.io.tensor_files import require_stored_floats, weight_files

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

CONTEXT_FILE = "empty_prompt.safetensors"
"""The encoded prompt, where a prior's folder has it in place of a text encoder."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
"""A tokenizer's folder has one of these."""


def load_context(folder: Path) -> torch.Tensor:
    """Return the context of a prior folder, float32 [1, n, d]. Raises WeightsError."""
    file = folder / CONTEXT_FILE
    if not file.is_file():
        return ClipTextEncoder(folder).encode("")
    try:
        context = load_file(file).get("context")
    except SafetensorError as error:
        raise WeightsError(f"{file}: is not a readable safetensors file ({one_line(error)}); get it again") from error
    if context is None or context.ndim != 3 or len(context) != 1:
        raise WeightsError(f"{file}: has no tensor named context of shape [1, n, d]; get the folder again")
    return context.float()


class ClipTextEncoder:
    """The CLIP text encoder in a prior's folder, in float32 on the CPU."""

    def __init__(self, folder: Path):
        """Load it. Raises WeightsError."""
        # Imported here: a folder with the embedding in it, like nano's, needs no text encoder.
        from transformers import CLIPTextModel

        try:
            encoder, report = CLIPTextModel.from_pretrained(
                folder / "text_encoder",
                use_safetensors=True,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            raise WeightsError(f"{folder}: the text encoder cannot be loaded: {one_line(error)}") from error
        require_whole(folder / "text_encoder", report)
        text_weights = ("model.safetensors", "model.safetensors.index.json")  # as transformers chooses
        require_stored_floats(weight_files(folder / "text_encoder", text_weights))
        self._encoder, self._tokenizer = encoder.eval(), folder / "tokenizer"

    @property
    def positions(self) -> int:
        """Tokens of a text, at most."""
        return int(self._encoder.config.max_position_embeddings)

    @torch.inference_mode()
    def encode(self, text: str) -> torch.Tensor:
        """Return the last hidden state of a text, float32 [1, n, d], padded as the tokenizer does."""
        ids = prompt_ids(self._tokenizer, self.positions, self._encoder.config.vocab_size, text)
        context: torch.Tensor = self._encoder(ids).last_hidden_state
        return context


def prompt_ids(tokenizer: Path, positions: int, words: int, text: str = "") -> torch.Tensor:
    """Return the ids of a prompt, int64 [1, n], as the CLIP tokenizer in a folder pads them.

    Args:
        tokenizer: Folder of the tokenizer.
        positions: Positions that the text encoder has; n is at most that, and what is longer is cut.
        words: Size of the text encoder's vocabulary.
        text: The prompt.

    Raises:
        WeightsError: The tokenizer cannot be loaded, or has more words than the text encoder.
    """
    from transformers import CLIPTokenizer

    try:
        loaded = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise WeightsError(f"{tokenizer}: the tokenizer cannot be loaded: {one_line(error)}") from error
    length = min(loaded.model_max_length, positions)
    ids = loaded(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    if int(ids.max()) >= words:
        raise WeightsError(
            f"{tokenizer}: pads with id {int(ids.max())}, the text encoder has {words} words; use the tokenizer that "
            "belongs to it"
        )
    return ids


class ConstantContextProcessor:
    """Cross-attention to a context that never changes: its keys and values are computed once.

    They are the same for every sample, so the queries of all samples form one long sequence, and nothing is expanded
    over the batch. This saves 1 to 2% of a step with 4 context tokens on a CPU; Stable Diffusion has 77.

    Measured and left out, because they save less than 3%: fused query, key and value projections of the self-attention
    (nothing), and tables of the time embeddings (2.8% at most).
    """

    def __init__(self, attention: Attention, context: torch.Tensor):
        """Compute the keys and values of ``attention`` for ``context`` [1, n, d]."""
        heads = attention.heads
        with torch.inference_mode():
            key, value = attention.to_k(context), attention.to_v(context)  # [1, n, heads * d]
        self.key = key.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()  # [1, heads, n, d]
        self.value = value.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention of ``hidden_states`` [B, l, c] to the constant context, [B, l, c].

        The other arguments are those that diffusers passes to every processor; they are not used.
        """
        query = attn.to_q(hidden_states).flatten(0, 1).unflatten(-1, (attn.heads, -1))  # [B * l, heads, d]
        mixed = F.scaled_dot_product_attention(query.transpose(0, 1)[None], self.key, self.value)
        mixed = mixed[0].transpose(0, 1).flatten(1).unflatten(0, hidden_states.shape[:2])
        return attn.to_out[0](mixed)


def cache_context(unet: UNet2DConditionModel, context: torch.Tensor) -> None:
    """Give every cross-attention of ``unet`` the keys and values of ``context`` [1, n, d], once and for all."""
    processors = unet.attn_processors
    for name in processors:
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = ConstantContextProcessor(attention, context)
    unet.set_attn_processor(processors)
