"""From pictures and text to tokens: prompts by the model's chat template, answers that end with its end token.

The processors of transformers expand the placeholder of a picture, but that of Qwen2.5-VL needs torchvision for videos.
Here placeholders are expanded by ids; pictures go through the image processor on Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from covray.errors import ConfigError, PairError

LLAVA_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision towers of LLaVA, and their tokens that are no patch of the picture."""


_LONGEST = 200
"""How many times as long as wide a picture may be; Qwen's image processor refuses more."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens."""

    ids: NDArray[np.int64]
    images: dict[str, Tensor] = field(default_factory=dict)
    """What the image processor returns; empty without pictures."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer as tokens."""

    ids: NDArray[np.int64]
    """Prompt, answer, its end, and further end tokens up to the end of a block."""
    prompt: int
    """Tokens of the prompt."""
    end: int
    """Tokens up to the answer's first end token, which is counted."""
    end_id: int
    images: dict[str, Tensor] = field(default_factory=dict)


class Prompter:
    """Turns pictures and texts into tokens for one model."""

    def __init__(self, config: Any, tokenizer: Any, image_processor: Any, chat_template: str | None):
        """Take the parts of a model's folder.

        Args:
            config: The configuration of transformers.
            tokenizer: The tokenizer; it must know an end token.
            image_processor: The image processor.
            chat_template: The Jinja template of the model's chats; None: pictures, then the text, as they are.
        """
        self.tokenizer = tokenizer
        self.end_id = int(tokenizer.eos_token_id)
        self._config, self._image_processor, self._template = config, image_processor, chat_template
        self._image_id = int(config.image_token_id)

    def prompt(self, pictures: Sequence[NDArray[np.uint8]], text: str) -> Prompt:
        """Return the tokens of a user's turn, up to where the answer begins.

        Args:
            pictures: uint8 [h, w, 3] each; they stand before the text.
            text: What is asked.

        Raises:
            ConfigError: The text holds a placeholder of a picture, or nothing is asked.
            PairError: See ``require_proportions``.
        """
        return self.turn([*pictures, text])

    def turn(self, parts: Sequence[str | NDArray[np.uint8]], *, number_pictures: bool = False) -> Prompt:
        """Return the tokens of a user's turn whose pictures and texts stand in any order.

        Args:
            parts: Texts, and pictures, uint8 [h, w, 3] each.
            number_pictures: Write "Picture 1: " and so on before pictures, if the model's template can.

        Raises:
            ConfigError: A text holds a placeholder of a picture, or there is not one token.
            PairError: See ``require_proportions``.
        """
        pictures = [part for part in parts if not isinstance(part, str)]
        text = " ".join(part for part in parts if isinstance(part, str))
        words = self._chat(parts, number_pictures)
        # Some templates write the start token themselves; a second one would be another prompt.
        bos = self.tokenizer.bos_token
        begins = bos is not None and words.startswith(bos)
        ids = self.tokenizer(words, add_special_tokens=not begins)["input_ids"]
        # A placeholder in the text itself would be given the features of a picture.
        if ids.count(self._image_id) != len(pictures):
            raise ConfigError(
                f"prompt {text[:60]!r}: has a placeholder of a picture in it; leave it out, pictures are put before "
                "the text"
            )
        # The first token of an answer is predicted by the last one of its prompt.
        if not ids:
            raise ConfigError("prompt: is empty, and the model has no chat template to put around it; write a prompt")
        images: dict[str, Tensor] = {}
        counts: list[int] = []
        for picture in pictures:
            require_proportions(picture)
        if pictures:
            images = dict(self._image_processor([Image.fromarray(one) for one in pictures], return_tensors="pt"))
            counts = self._picture_tokens(images)
        # Embeddings of placeholders are replaced one by one: each picture needs as many as it has features.
        expanded: list[int] = []
        remaining = iter(counts)
        for token in ids:
            expanded += [token] * (next(remaining) if token == self._image_id else 1)
        return Prompt(np.array(expanded, np.int64), images)

    def sample(self, prompt: Prompt, answer: str) -> Sample:
        """Return ``prompt`` with its ``answer`` and the end token.

        Raises:
            ConfigError: The answer holds a placeholder of a picture.
        """
        # An answer goes on where the prompt ends, so it has no start token of its own.
        tokens = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        # It would take the features of the next picture, which is another one or none.
        if self._image_id in tokens:
            raise ConfigError(f"answer {answer[:60]!r}: has a placeholder of a picture in it; remove it from the data")
        ids = np.concatenate((prompt.ids, np.array([*tokens, self.end_id], np.int64)))
        return Sample(ids, len(prompt.ids), len(ids), self.end_id, prompt.images)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, without its end."""
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded.strip()

    def _chat(self, parts: Sequence[str | NDArray[np.uint8]], number_pictures: bool) -> str:
        """Return the text of a user's turn with a placeholder for each picture."""
        if self._template is None:
            placeholder = self.tokenizer.convert_ids_to_tokens(self._image_id)
            return "".join(part if isinstance(part, str) else placeholder for part in parts)
        content: list[dict[str, str]] = []
        for part in parts:
            content.append({"type": "text", "text": part} if isinstance(part, str) else {"type": "image"})
        words: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
            add_vision_id=number_pictures,
        )
        return words

    def _picture_tokens(self, images: dict[str, Tensor]) -> list[int]:
        """Return how many tokens each picture takes."""
        if "image_grid_thw" in images:
            # Qwen's tower makes one token of each square of patches.
            merged = self._image_processor.merge_size**2
            return [int(grid.prod()) // merged for grid in images["image_grid_thw"]]
        vision = self._config.vision_config
        count, _, height, width = images["pixel_values"].shape
        tokens = (height // vision.patch_size) * (width // vision.patch_size) + LLAVA_TOWERS[vision.model_type]
        # LLaVA drops the tower's first token by default, CLIP's class token.
        if self._config.vision_feature_select_strategy == "default":
            tokens -= 1
        return [tokens] * count


def require_proportions(picture: NDArray[np.uint8]) -> None:
    """Refuse a picture that is far longer than wide. Raises PairError (``unsupported``).

    Image processors scale its shorter side up to that of a tower: a small file of 2 x 8,000,000 pixels would take
    hundreds of gigabytes.
    """
    height, width = picture.shape[:2]
    if max(height, width) > _LONGEST * min(height, width):
        raise PairError(
            "unsupported", f"{width}x{height} px; vision models read pictures up to {_LONGEST} times as long as wide"
        )


def pad_to_block(sample: Sample, padding: int) -> Sample:
    """Return ``sample`` with ``padding`` further end tokens."""
    ids = np.concatenate((sample.ids, np.full(padding, sample.end_id, np.int64)))
    return Sample(ids, sample.prompt, sample.end, sample.end_id, sample.images)
