"""Features of a vision-language model that an aligner reads.

ThinkDiff-LVLM reads the states that the tokens of a generated text were sampled from, after the final norm. The text is
written first, by any means; one pass over prompt and text then gives all states at once:

    places   0 .. P-1 (prompt)   P .. P+N-1 (text)
    states                P-1 .. P+N-2           of the text's N tokens

ThinkDiff-CLIP reads the patches of a vision tower, pooled, after the class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from covray.config.think import ThoughtConfig
from covray.models.vlm.checkpoint import LoadedVlm
from covray.models.vlm.prompts import Prompt
from covray.seeds import seed_of

Places = Literal["text", "prompt"]
"""Whose states are features: the generated text's, or the prompt's (an ablation of the paper)."""
_VISION_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
"""Keys of a model's configuration with ids of placeholders."""


@dataclass(frozen=True)
class Thought:
    """A generated text and the states that its tokens were sampled from."""

    ids: NDArray[np.int64]
    """Its tokens, the end token among them where it was written, [N]."""
    text: str
    features: Tensor
    """[N, width]; with ``places="prompt"`` those of the prompt's P tokens, [P, width]."""


def think(vlm: LoadedVlm, prompts: Sequence[Prompt], config: ThoughtConfig, places: Places = "text") -> list[Thought]:
    """Let the model write a text for each prompt, and return the texts with their features.

    Args:
        vlm: The model.
        prompts: Pictures and words.
        config: How the texts are written.
        places: Whose states the features are.
    """
    # Written first, then read once more, all together: any engine may write the texts.
    answers = [write_text(vlm, prompt, config) for prompt in prompts]
    features = read_features(vlm, prompts, answers, places)
    thoughts = []
    for ids, states in zip(answers, features, strict=True):
        thoughts.append(Thought(ids, vlm.prompter.text(ids.tolist()), states))
    return thoughts


@torch.no_grad()
def write_text(vlm: LoadedVlm, prompt: Prompt, config: ThoughtConfig) -> NDArray[np.int64]:
    """Return the tokens that transformers' ``generate`` writes, int64 [N].

    One prompt at a time, with random numbers of its own: its text does not depend on others. Placeholders of pictures
    are never written: a later pass would look for pictures at them.

    Args:
        vlm: The model.
        prompt: Pictures and words.
        config: How the text is written.
    """
    model, device = vlm.model.model, vlm.model.device
    ids = torch.from_numpy(prompt.ids)[None].to(device)
    inputs: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in prompt.images.items()}
    if "image_grid_thw" in inputs:
        # From these, which the processor of transformers makes otherwise, come Qwen's positions.
        inputs["mm_token_type_ids"] = (ids == vlm.model.image_id).int()
    # What a checkpoint's generation_config.json may set otherwise is set here: Qwen2-VL's has top_k 1.
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    cuda = [device] if device.type == "cuda" else []
    # Seeded by the prompt: a text does not depend on those that were written before it.
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed_of("thought", config.seed, *prompt.ids.tolist()))
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.max_tokens,
            min_new_tokens=config.min_tokens,
            suppress_tokens=unwritten_ids(vlm),
            eos_token_id=sorted(vlm.stop_ids),
            pad_token_id=vlm.prompter.end_id,
            repetition_penalty=1.0,
            num_beams=1,
            **inputs,
            **sampling,
        )
    new: NDArray[np.int64] = written[0, len(prompt.ids) :].cpu().numpy()
    return new


@torch.no_grad()
def read_features(
    vlm: LoadedVlm, prompts: Sequence[Prompt], answers: Sequence[NDArray[np.int64]], places: Places = "text"
) -> list[Tensor]:
    """Return the states, after the final norm, of texts that stand after prompts: one pass over both.

    They equal the states of ``generate`` up to the rounding of sums.

    Args:
        vlm: The model.
        prompts: Pictures and words.
        answers: The tokens of each text, int64 [N].
        places: ``text``: the states that the text's tokens were sampled from, [N, width]. ``prompt``: those of the
            prompt's own tokens, [P, width].
    """
    model = vlm.model
    device = model.device
    # A row is a prompt and its answer.
    rows = [np.concatenate((prompt.ids, ids)) for prompt, ids in zip(prompts, answers, strict=True)]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = torch.full((len(rows), int(lengths.max())), vlm.prompter.end_id, dtype=torch.int64, device=device)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(row)
    images: dict[str, Tensor] = {}
    with_images = [prompt.images for prompt in prompts if prompt.images]
    for name in with_images[0] if with_images else ():
        images[name] = torch.cat([own[name] for own in with_images]).to(device)
    # Padding stands on the right, where no token sees it.
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
    mask = causal.expand(len(rows), 1, -1, -1)
    states = model.read(model.embed(ids, images), model.positions(ids, lengths, images), mask)
    features = []
    for number, prompt in enumerate(prompts):
        # A token was sampled from the state before it: those of a text begin at the prompt's last token.
        count = len(prompt.ids)
        if places == "prompt":
            features.append(states[number, :count])
        else:
            features.append(states[number, count - 1 : int(lengths[number]) - 1])
    return features


@torch.no_grad()
def patch_features(tower: Any, pixels: Tensor, factor: int = 2) -> Tensor:
    """Return the class token and the pooled patches of pictures, [B, 1 + n, width].

    The states are the last layer's after post-layernorm. The grid of patches is made smaller by bilinear interpolation;
    the class token is kept.

    Args:
        tower: transformers' ``CLIPVisionModel``, which norms its class token only, or ``Blip2VisionModel``, whose
            states are normed.
        pixels: As the tower's image processor returns them, [B, 3, S, S].
        factor: How many times smaller the grid's sides are.
    """
    states = tower(pixel_values=pixels).last_hidden_state
    if tower.config.model_type == "clip_vision_model":
        states = tower.post_layernorm(states)
    # Without the class token the patches are a square grid, [B, width, side, side].
    side = int((states.shape[1] - 1) ** 0.5)
    grid = states[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    pooled = F.interpolate(grid, size=(side // factor, side // factor), mode="bilinear", align_corners=False)
    return torch.cat((states[:, :1], pooled.flatten(2).transpose(1, 2)), 1)


def unwritten_ids(vlm: LoadedVlm) -> list[int]:
    """Return the ids that no text may hold: the mask's, and placeholders of pictures."""
    config = vlm.model.model.config
    ids = {vlm.model.mask_id}
    for key in _VISION_IDS:
        token = getattr(config, key, None)
        if token is not None:
            ids.add(int(token))
    return sorted(ids)
