"""The LLaMA of an LVM, laid out for speed: no padding, fused projections, logits only where they count.

It computes the numbers of ``transformers.LlamaForCausalLM`` with ``peft.LoraModel`` on top; tests compare them. Three
things are computed differently:

- Sentences of any lengths lie one after another in a flat row of tokens, and only attention knows where one ends.
  Nothing is ever padded.
- Projections of the same input (q, k, v; gate, up) are one matrix, and so are their LoRA ``A``.
- The loss computes logits a chunk at a time, only at the positions that carry loss, and keeps none.

In all shapes here, T is the number of tokens of all sentences together, and P that of the positions that carry loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from covray.models.lvm.draft import MaskRows
from covray.models.lvm.functions import ChunkedLoss, FrozenRmsNorm, Rotate, rotated_pairs
from covray.models.lvm.lora import Lora, Projection
from covray.models.lvm.noisy import NoisyAttention, NoisyBlocks


@dataclass(frozen=True)
class Batch:
    """Sentences laid one after another, and the positions where loss is taken."""

    ids: Tensor
    """Token ids, int64 [T]."""
    lengths: tuple[int, ...]
    """Tokens of each sentence, in order; they sum to T."""
    positions: Tensor
    """Positions in ``ids`` whose successor is predicted, int64 [P]; never the last of a sentence."""
    noisy: NoisyBlocks | None = None
    """Noisy tokens beside the clean ones, for block diffusion."""
    target_ids: Tensor | None = None
    """What is predicted where ``ids`` are a noisy input, int64 [T]; None: ``ids`` themselves."""
    guessed: Tensor | None = None
    """Positions in ``ids`` that the objective fills with the model's own guesses before the pass, int64 [G]."""

    @property
    def targets(self) -> Tensor:
        """The token after each of ``positions``, int64 [P]."""
        ids = self.ids if self.target_ids is None else self.target_ids
        return ids[self.positions + 1]

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on ``device``."""
        return Batch(
            ids=self.ids.to(device),
            lengths=self.lengths,
            positions=self.positions.to(device),
            noisy=None if self.noisy is None else self.noisy.to(device),
            target_ids=None if self.target_ids is None else self.target_ids.to(device),
            guessed=None if self.guessed is None else self.guessed.to(device),
        )


class RmsNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich, arXiv:1910.07467), the mean square in float32 as in transformers."""

    def __init__(self, width: int, eps: float):
        """Allocate the weight [width]; ``eps`` is added to the mean square."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [T, width]; shape and type stay."""
        weight = self.weight.to(x.dtype)  # the fused kernel wants one type
        # FrozenRmsNorm is for a gradient of x alone; in all other cases PyTorch's own does no needless work.
        if weight.requires_grad or not x.requires_grad:
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        normed: Tensor = FrozenRmsNorm.apply(x, weight, self.eps)
        return normed


class Layer(nn.Module):
    """A decoder layer: attention and gated MLP, each after a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, lora: Lora | None):
        """Allocate one layer of ``config``, with the projections that ``lora`` targets adapted."""
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.input_norm = RmsNorm(width, config.rms_norm_eps)
        self.qkv = Projection(width, dict.fromkeys(("q_proj", "k_proj", "v_proj"), width), config.attention_bias, lora)
        self.out = Projection(width, {"o_proj": width}, config.attention_bias, lora)
        self.mlp_norm = RmsNorm(width, config.rms_norm_eps)
        self.gate_up = Projection(width, dict.fromkeys(("gate_proj", "up_proj"), inner), config.mlp_bias, lora)
        self.down = Projection(inner, {"down_proj": width}, config.mlp_bias, lora)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        beside: NoisyAttention | None = None,
    ) -> Tensor:
        """Compute the layer's output from ``x`` [T, width], or [T + M, width] with noisy tokens; the shape stays.

        Args:
            x: The layer's input.
            rotation: Of all tokens; see ``rotary``.
            lengths: Clean tokens of each sentence; they sum to T.
            beside: The attention of noisy tokens behind the clean ones, if there are any.
        """
        if beside is not None and beside.drafts:
            return self._forward_drafts(x, rotation, lengths, beside)
        parts = self.project(x, rotation)
        # Without noisy tokens, sentences lie flat and attend causally within their lengths.
        if beside is None:
            return self.finish(x, attend(*parts, lengths))
        # Clean tokens attend to clean ones alone; what noisy ones see, `beside` says.
        query, key, value = (part[: sum(lengths)] for part in parts)
        return self.finish(x, torch.cat((attend(query, key, value, lengths), beside.attend(*parts))))

    def _forward_drafts(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], lengths: tuple[int, ...], beside: NoisyAttention
    ) -> Tensor:
        """Compute what ``forward`` does for masks of a draft, of which alone anything is learned.

        Clean tokens know nothing of the draft adapter, so they are read without a gradient.
        """
        clean = sum(lengths)
        cosine, sine = rotation
        # Known tokens pass without gradients: a draft changes nothing of what the model itself computes.
        with torch.no_grad():
            known = self.project(x[:clean], (cosine[:clean], sine[:clean]))
            read = self.finish(x[:clean], attend(*known, lengths))
        drafts, masks = x[clean:], MaskRows(1, 0)
        own = self.project(drafts, (cosine[clean:], sine[clean:]), masks)
        query, key, value = (torch.cat(both) for both in zip(known, own, strict=True))
        return torch.cat((read, self.finish(drafts, beside.attend(query, key, value), masks)))

    def project(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], masks: MaskRows | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, both rotated, and values, each [T, heads, d].

        Args:
            x: [T, width].
            rotation: Of the tokens; see ``rotary``.
            masks: Which of the tokens are masks of a draft.
        """
        normed = self.input_norm(x)
        if masks is None and not normed.requires_grad and not self.qkv.adapted:
            # Queries and keys lie side by side: turned at once, which takes half as many operations.
            whole = self.qkv.whole(normed).view(len(x), 3, self.heads, -1)
            turned = rotated_pairs(whole[:, :2], rotation[0][:, None], rotation[1][:, None])
            return turned[:, 0], turned[:, 1], whole[:, 2]
        query, key, value = (part.view(len(x), self.heads, -1) for part in self.qkv(normed, masks))
        return rotate(query, rotation), rotate(key, rotation), value

    def finish(self, x: Tensor, mixed: Tensor, masks: MaskRows | None = None) -> Tensor:
        """Return the layer's output [T, width].

        Args:
            x: The layer's input, [T, width].
            mixed: Of the attention, [T, heads * d].
            masks: Which of the tokens are masks of a draft.
        """
        x = x + self.out(mixed, masks)[0]
        gate, up = self.gate_up(self.mlp_norm(x), masks)
        return x + self.down(F.silu(gate) * up, masks)[0]


class Head(nn.Module):
    """The map from hidden states to the vocabulary, and the loss over it."""

    def __init__(self, config: LlamaConfig):
        """Allocate the weight [vocabulary, width]."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the negative log likelihood in nats of ``targets`` [P] after ``hidden`` [P, width], in float32.

        Two values: the sum, which can be differentiated, and each position's [P], which cannot. With ``weights`` [P]
        the sum is weighed; each position's value is not.
        """
        total, each = ChunkedLoss.apply(hidden, self.weight, targets, weights)
        return total, each


def is_adapter(name: str) -> bool:
    """Return whether a parameter of an ``Lvm`` belongs to an adapter, by its name."""
    return ".lora_" in name or ".draft." in name or name == "mask_row"


class Lvm(nn.Module):
    """An LVM backbone, with a LoRA adapter when ``lora`` is given.

    Parameters are uninitialised: ``covray.models.lvm.backbone`` fills them.
    """

    def __init__(self, config: LlamaConfig, lora: Lora | None = None, recompute: bool = False):
        """Allocate a model.

        Args:
            config: The architecture.
            lora: The adapter, or None.
            recompute: Drop the activations inside layers, and compute them again in the backward pass.
        """
        super().__init__()
        self.config, self.lora, self.recompute = config, lora, recompute
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mask_row: nn.Parameter | None = None
        if lora is not None and lora.mask_id is not None:
            self.mask_row = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, lora) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ``ids`` [...], with the adapter's row for the mask, [..., width]."""
        x: Tensor = self.embed(ids)
        if self.mask_row is None or self.lora is None or self.lora.mask_id is None:
            return x
        return torch.where((ids == self.lora.mask_id)[..., None], self.mask_row.to(x.dtype), x)

    def hidden(self, ids: Tensor, lengths: tuple[int, ...], noisy: NoisyBlocks | None = None) -> Tensor:
        """Return the hidden states after the last norm of sentences laid flat (see ``Batch``).

        Args:
            ids: The clean tokens, int64 [T].
            lengths: Of the sentences.
            noisy: M noisy tokens beside them.

        Returns:
            [T, width], or [T + M, width], the clean tokens first.
        """
        x = self.embed_ids(ids if noisy is None else torch.cat((ids, noisy.ids)))
        # Autocast leaves what the embedding returns as it is, and with it the residual stream.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotation = rotary(self.config, lengths, x.device, x.dtype)
        # Noisy copies stand at the positions of the tokens that they are copies of.
        beside = None
        if noisy is not None:
            cosine, sine = rotation
            rotation = torch.cat((cosine, cosine[noisy.places])), torch.cat((sine, sine[noisy.places]))
            beside = NoisyAttention.of(noisy, lengths)
        for layer in self.layers:
            # Activations are computed again in the backward pass: memory for time.
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, lengths, beside, use_reentrant=False)
            else:
                x = layer(x, rotation, lengths, beside)
        return self.norm(x)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the negative log likelihood in nats at the batch's positions: the sum, and each position's [P].

        With noisy tokens the sum is weighed as they say, and the K masked ones follow the positions: [P + K].
        """
        hidden = self.hidden(batch.ids, batch.lengths, batch.noisy)
        if batch.noisy is None:
            return self.head(hidden[batch.positions], batch.targets)
        noisy = batch.noisy
        # Clean positions and masked places go through the head together, each with its weight.
        rows = torch.cat((batch.positions, len(batch.ids) + noisy.masked))
        targets = torch.cat((batch.targets, batch.ids[noisy.predicted]))
        clean_weights = noisy.weights.new_full(batch.positions.shape, noisy.clean_weight)
        return self.head(hidden[rows], targets, torch.cat((clean_weights, noisy.weights)))

    def logits(self, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return the logits after every token, [T, vocabulary]; to look at and compare, not to train with."""
        return F.linear(self.hidden(ids, lengths), self.head.weight.to(self.embed.weight.dtype))

    def allocate(self, device: torch.device, shared: Mapping[str, Tensor]) -> None:
        """Give a model of the meta device memory; parameters named in ``shared`` use the tensors there."""
        for name, parameter in list(self.named_parameters()):
            owner, _, own_name = name.rpartition(".")
            tensor = shared[name] if name in shared else torch.empty_like(parameter, device=device)
            # A tensor of the meta device has no data to move: another parameter takes its place.
            placed = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(self.get_submodule(owner), own_name, placed)

    def frozen_parameters(self) -> dict[str, Tensor]:
        """Return the parameters of the backbone by their names here, without those of adapters."""
        frozen = {}
        for name, parameter in self.named_parameters():
            if not is_adapter(name):
                frozen[name] = parameter.detach()
        return frozen

    def backbone_tensors(self) -> dict[str, Tensor]:
        """Return the weights under the names and in the shapes of ``transformers.LlamaForCausalLM``.

        They are detached views: writing into one changes the model.
        """
        tensors = {"model.embed_tokens.weight": self.embed.weight.detach()}
        layer: Any  # nn.ModuleList forgets what it holds
        for index, layer in enumerate(self.layers):
            tensors[f"model.layers.{index}.input_layernorm.weight"] = layer.input_norm.weight.detach()
            tensors[f"model.layers.{index}.post_attention_layernorm.weight"] = layer.mlp_norm.weight.detach()
        for block, projection in self._projections():
            sizes = list(projection.sizes.values())
            for kind, fused in (("weight", projection.weight), ("bias", projection.bias)):
                if fused is not None:
                    pieces = zip(projection.sizes, fused.detach().split(sizes), strict=True)
                    tensors |= {f"{block}.{name}.{kind}": piece for name, piece in pieces}
        tensors["model.norm.weight"] = self.norm.weight.detach()
        tensors["lm_head.weight"] = self.head.weight.detach()
        return tensors

    def lora_tensors(self) -> dict[str, Tensor]:
        """Return the LoRA matrices as ``<name of the projection in transformers>.lora_A`` and ``.lora_B``.

        A is [rank, inputs], B is [outputs, rank]. They are detached views, as in ``backbone_tensors``; without an
        adapter there are none.
        """
        tensors = {}
        for block, projection in self._projections():
            if projection.adapted:
                rows = projection.lora_A.detach().split(projection.rank)
                for name, low in zip(projection.adapted, rows, strict=True):
                    tensors[f"{block}.{name}.lora_A"] = low
                    tensors[f"{block}.{name}.lora_B"] = projection.lora_B[name].detach()
        return tensors

    def draft_tensors(self) -> dict[str, Tensor]:
        """Return the draft adapter's matrices by names like ``lora_tensors``'; without a draft adapter there are none.

        They are detached views, as in ``backbone_tensors``.
        """
        tensors: dict[str, Tensor] = {}
        for block, projection in self._projections():
            if projection.draft is not None:
                tensors |= {f"{block}.{name}": view for name, view in projection.draft.views().items()}
        return tensors

    def _projections(self) -> Iterator[tuple[str, Projection]]:
        """Yield every projection after the name of its block in transformers."""
        layer: Any
        for index, layer in enumerate(self.layers):
            for projection in (layer.qkv, layer.out):
                yield f"model.layers.{index}.self_attn", projection
            for projection in (layer.gate_up, layer.down):
                yield f"model.layers.{index}.mlp", projection


def rotary(
    config: LlamaConfig, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every token's angles, each [T, 1, d] with d the size of a head.

    Rotary position embedding (Su et al., RoFormer, arXiv:2104.09864); every sentence of ``lengths`` counts from 0.
    """
    size = config.hidden_size // config.num_attention_heads
    theta = float(config.rope_parameters["rope_theta"])
    # In float32 whatever the model's type: bfloat16 cannot tell neighbouring positions apart from 256 on.
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    positions = torch.cat([torch.arange(length, device=device, dtype=torch.float32) for length in lengths])
    angles = positions[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x`` [T, heads, d] by ``rotation`` (see ``rotary``), pairing a head's halves as transformers does."""
    if not x.requires_grad:  # a call through autograd would take a twentieth of a decoding step
        return rotated_pairs(x, *rotation)
    rotated: Tensor = Rotate.apply(x, *rotation)
    return rotated


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Compute causal attention inside every sentence, [T, heads * d].

    Neighbours of equal length are one batch of the attention kernel; sentences never see each other.

    Args:
        query: [T, heads, d], rotated.
        key: [T, heads, d], rotated.
        value: [T, heads, d].
        lengths: Tokens of each sentence, in order; they sum to T.
    """
    mixed, start = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        stop = start + count * length
        shape = (count, length, *query.shape[1:])
        q, k, v = (part[start:stop].view(shape).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [count, heads, length, d]
        mixed.append(out.transpose(1, 2).reshape(stop - start, -1))
        start = stop
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
