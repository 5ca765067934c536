"""A vision-language model of transformers with what blocks of masked tokens need of it.

transformers computes everything: pictures, positions, attention and caches. Here its parts are called one by one, since
noisy tokens stand beside the clean ones, which no ``forward`` of transformers knows:

    ids, pictures -> embeddings -> (with positions and a 4-D mask) hidden states -> logits
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covray.models.vlm.batch import Noise, VlmBatch, training_mask

M_ROPE_TYPES = ("qwen2_vl", "qwen2_5_vl")
"""Model types with positions of time, height and width (M-RoPE)."""


class Vlm(nn.Module):
    """A ``LlavaForConditionalGeneration``, ``Qwen2VLFor...`` or ``Qwen2_5_VLForConditionalGeneration``."""

    def __init__(self, model: Any, mask_id: int):
        """Wrap ``model``; its parameters stay where they are.

        Args:
            model: The model of transformers, which may have layers of PEFT in it.
            mask_id: The id of the mask token, which is never predicted.
        """
        super().__init__()
        self.model = model
        self.mask_id = mask_id
        self.image_id = int(model.config.image_token_id)
        self.width = int(model.config.get_text_config().hidden_size)
        self._has_m_rope = model.config.model_type in M_ROPE_TYPES

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def embed(self, ids: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings of tokens, with the features of pictures at their placeholders.

        Args:
            ids: int64 [B, L]; placeholders of all pictures in the order of ``images``.
            images: What the image processor returned for the pictures of the batch; empty where there are none.

        Returns:
            [B, L, width].
        """
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        if not images:
            return embeddings
        output = self.model.get_image_features(**images, return_dict=True)
        features = torch.cat(list(output.pooler_output)).to(embeddings.dtype)
        at_image = (ids == self.image_id)[..., None]
        return embeddings.masked_scatter(at_image, features)

    def positions(self, ids: Tensor, lengths: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """Return the positions of tokens as the model makes them: int64 [3, B, L] with M-RoPE, else [B, L].

        Args:
            ids: int64 [B, L], padded on the right.
            lengths: Tokens of each row, int64 [B].
            images: As for ``embed``.
        """
        places = torch.arange(ids.shape[1], device=ids.device)
        if not self._has_m_rope:
            return places.expand_as(ids)
        is_token = places < lengths[:, None]
        kinds = (ids == self.image_id).int()  # as transformers numbers them: 0 text, 1 pictures
        grid = images.get("image_grid_thw")
        positions: Tensor
        positions, _ = self.model.model.get_rope_index(ids, kinds, image_grid_thw=grid, attention_mask=is_token)
        return positions

    def read(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Return the hidden states of tokens, [B, n, width].

        Args:
            embeddings: [B, n, width].
            positions: int64 [3, B, n] or [B, n].
            mask: Which keys a token sees, those of the cache first, bool [B, 1, n, cached + n].
            cache: A ``DynamicCache`` of transformers, to which the tokens' keys and values are added.
        """
        output = self.model.model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            cache=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [..., width] in float32, [..., vocabulary]; -inf for the mask."""
        logits = self.model.get_output_embeddings()(hidden).float()
        at_mask = torch.tensor([self.mask_id], device=logits.device)
        return logits.index_fill(-1, at_mask, -torch.inf)

    def forward(self, batch: VlmBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch in nats.

        Returns:
            The weighed sum, a scalar, and the cross-entropy of every token that carries loss, float32 [P]: first the
            clean tokens, row by row, then the masked ones.
        """
        embeddings = self.embed(batch.ids, batch.images)
        positions = self.positions(batch.ids, batch.lengths, batch.images)
        if batch.noise is not None:
            noise = batch.noise
            rows = torch.arange(len(noise.places), device=self.device)[:, None]
            # Looked up like a token: PEFT trains this row in a layer around the embedding, not in its weight.
            mask_row = self.model.get_input_embeddings()(torch.tensor([self.mask_id], device=self.device))
            noisy = torch.where(noise.masked[..., None], mask_row, embeddings[rows, noise.places])
            embeddings = torch.cat((embeddings, noisy), 1)
            # A noisy token stands for a clean one, at the same position.
            noisy_positions = positions.gather(-1, noise.places.expand(*positions.shape[:-1], -1))
            positions = torch.cat((positions, noisy_positions), -1)
        hidden = self.read(embeddings, positions, training_mask(batch))
        clean_tokens = batch.ids.shape[1]
        # A clean token is predicted at the place before it, a masked one at its own or before it.
        has_loss = batch.next_weights > 0
        predicted = [hidden[:, : clean_tokens - 1][has_loss]]
        targets = [batch.ids[:, 1:][has_loss]]
        weights = [batch.next_weights[has_loss]]
        if batch.noise is not None:
            noise = batch.noise
            predicted.append(self._predicting_noisy(hidden, batch, noise)[noise.masked])
            targets.append(batch.ids.gather(1, noise.places)[noise.masked])
            weights.append(noise.weights[noise.masked])
        # Only what carries loss meets the head: logits of every place would be the largest tensor by far.
        each = F.cross_entropy(self.logits(torch.cat(predicted)), torch.cat(targets), reduction="none")
        return (each * torch.cat(weights)).sum(), each.detach()

    def _predicting_noisy(self, hidden: Tensor, batch: VlmBatch, noise: Noise) -> Tensor:
        """Return the hidden states that predict the noisy tokens of a batch, [B, M, width].

        Args:
            hidden: Of clean and noisy tokens, [B, L + M, width].
            batch: The batch.
            noise: Its noise.
        """
        clean_tokens = batch.ids.shape[1]
        own = hidden[:, clean_tokens:]
        if not batch.blocks.shift:
            return own
        rows = torch.arange(len(own), device=own.device)[:, None]
        # Of the first token of a sequence there is none before it, and it is never masked.
        before_block = hidden[rows, (noise.places - 1).clamp(min=0)]
        is_first = (noise.places - batch.starts[:, None]) % batch.blocks.size == 0
        return torch.where(is_first[..., None], before_block, own.roll(1, dims=1))
