"""``covray think generate``: pictures and words to files of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from covray.config.think import ThinkGenerateConfig
from covray.errors import ConfigError, DatasetError, PairError
from covray.io import storage
from covray.io.images import decode, encode_png
from covray.io.storage import Folder
from covray.models.aligner.aligner import Aligner
from covray.models.vlm.prompts import Prompt, Prompter, require_proportions
from covray.thinking.episodes import word_texts
from covray.thinking.records import ThinkAnswer
from covray.thinking.thinker import AlignerFolder, Thinker, open_aligner, require_models
from covray.thinking.unet_painter import UnetPainter

_TEXT_FILE = "text.txt"


@dataclass(frozen=True)
class Question:
    """What is said beside the pictures."""

    words: tuple[str, ...]
    """A word for each picture and one more, which asks for the next picture; or none."""
    prompt: str
    """Text beside the pictures, in place of words."""
    instruction: str
    """What a vision-language model reads before the words."""
    is_bridge: bool = False
    """Whether the model's text is drawn, through the encoder of the language model, in place of its features."""


def generate(config: ThinkGenerateConfig) -> ThinkAnswer:
    """Let the model think, draw what it thought, and write both.

    Args:
        config: Models, pictures and words.

    Returns:
        What is written to ``answer.json``.

    Raises:
        CovrayError: A picture or a model cannot be used, or the folder holds other files; nothing has been computed.
    """
    aligner = open_aligner(config.run)
    pictures = read_pictures(config.images)
    question = Question(config.words, config.prompt, config.instruction, config.route == "text")
    _require_use(config, aligner)
    folder = Folder(config.out)
    _require_folder(folder)
    words = _needs_encoder(config, aligner)
    fingerprints = require_models(config, aligner, words=words)
    thinker = Thinker(config, aligner, words=words)
    text, frames = answer(thinker, aligner, thinker.load(aligner), question, pictures)
    files = write_frames(folder, frames)
    if text is not None:
        folder.write_bytes(_TEXT_FILE, f"{text}\n".encode())
        files.append(_TEXT_FILE)
    # Written last: a folder with a record has all the files that it names.
    record = ThinkAnswer(
        config=config.model_dump(mode="json"), fingerprints=fingerprints, text=text, files=tuple(files)
    )
    record.write(folder)
    return record


def answer(
    thinker: Thinker, folder: AlignerFolder, aligner: Aligner, question: Question,
    pictures: Sequence[NDArray[np.uint8]],
) -> tuple[str | None, NDArray[np.uint8]]:  # fmt: skip
    """Return the model's text, and what is drawn.

    Args:
        thinker: The models, loaded.
        folder: Of the aligner.
        aligner: The aligner, loaded.
        question: What is said beside the pictures.
        pictures: uint8 [h, w, 3] each.

    Returns:
        The text, None with a vision tower; and frames, uint8 [f, h, w, 3].
    """
    if folder.variant == "clip":
        features = thinker.align_pictures(aligner, pictures, folder.patches)
        if not question.prompt:
            return None, thinker.painter.paint([features])[0]
        if isinstance(thinker.painter, UnetPainter):  # it has no encoder of its own
            features = torch.cat((features, thinker.encode(question.prompt).to(features)))
            return None, thinker.painter.paint([features])[0]
        return None, thinker.painter.paint([features], [question.prompt])[0]
    assert thinker.vlm is not None
    thought = thinker.think(_prompt(thinker.vlm.prompter, question, pictures), folder.places)
    features = thinker.encode(thought.text) if question.is_bridge else thinker.align(aligner, thought.features)
    return thought.text, thinker.painter.paint([features])[0]


def read_pictures(files: Sequence[str]) -> list[NDArray[np.uint8]]:
    """Return pictures, uint8 [h, w, 3] each. Raises ConfigError for one that cannot be used."""
    pictures = []
    for file in files:
        try:
            pictures.append(decode(storage.read_bytes(file)))
            require_proportions(pictures[-1])
        except OSError as error:
            raise ConfigError(f"--image {file}: cannot be read; give a picture file") from error
        except PairError as error:
            raise ConfigError(f"--image {file}: {error}; give another picture") from error
    return pictures


def write_frames(folder: Folder, frames: NDArray[np.uint8]) -> list[str]:
    """Write a picture, or the frames of a video, as PNG; return the names of the files."""
    if len(frames) == 1:
        folder.write_bytes("answer.png", encode_png(frames[0]))
        return ["answer.png"]
    names = []
    for number, frame in enumerate(frames):
        names.append(f"frame-{number:03d}.png")
        folder.write_bytes(names[-1], encode_png(frame))
    return names


def _prompt(prompter: Prompter, question: Question, pictures: Sequence[NDArray[np.uint8]]) -> Prompt:
    """Return the prompt of a vision-language model."""
    if not question.words:
        return prompter.prompt(pictures, question.prompt)
    *before, last = word_texts(question.words, question.instruction)
    parts: list[str | NDArray[np.uint8]] = []
    for text, picture in zip(before, pictures, strict=True):
        parts += [text, picture]
    return prompter.turn([*parts, last], number_pictures=True)


def _needs_encoder(config: ThinkGenerateConfig, aligner: AlignerFolder) -> bool:
    if aligner.variant == "clip":
        return bool(config.prompt) and config.painter.kind == "unet"
    return config.route == "text"


def _require_use(config: ThinkGenerateConfig, aligner: AlignerFolder) -> None:
    """Refuse what a variant cannot do. Raises ConfigError."""
    if aligner.variant == "clip" and not config.images:
        raise ConfigError(f"{config.run}: aligns features of pictures; give at least one --image")
    if aligner.variant == "clip" and (config.words or config.route == "text"):
        raise ConfigError(f"{config.run}: has a vision tower, which writes no text; give --prompt alone")
    if aligner.variant == "lvlm" and not (config.words or config.prompt):
        raise ConfigError(f"{config.run}: asks a vision-language model; give --prompt, or a --word for each picture")


def _require_folder(folder: Folder) -> None:
    """Refuse a folder of other files. Raises DatasetError."""
    if folder.list_files() and not folder.exists(ThinkAnswer.FILE):
        raise DatasetError(f"{folder.path}: holds files that covray think generate did not write; give another --out")
    storage.require_writable(folder.path)
