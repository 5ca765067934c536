"""ThinkDiff's models, loaded once, that answer pictures and words. Knows no HTTP and no ray."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from covray.config import EngineConfig
from covray.config.serve import ThinkServeConfig
from covray.config.think import LanguageModelConfig, PainterConfig, ThinkModelsConfig
from covray.config.vlm import VlmModelConfig
from covray.errors import CovrayError, PairError
from covray.io.images import encode_png
from covray.io.pixels import Picture
from covray.serve.schemas import Refusal, ThoughtResponse
from covray.thinking.answering import Question, answer
from covray.thinking.thinker import AlignerFolder, Thinker, open_aligner, require_models


@dataclass(frozen=True, eq=False)
class ThoughtQuery:
    """Pictures and words, checked against the limits."""

    pictures: tuple[Picture, ...]
    words: tuple[str, ...] = ()
    prompt: str = ""
    is_bridge: bool = False
    """Whether the model's text is drawn in place of its features."""


@dataclass(frozen=True)
class ThinkParts:
    """The parts of a folder; no weights are loaded."""

    aligner: AlignerFolder
    models: ThinkModelsConfig
    instruction: str


def open_parts(config: ThinkServeConfig, engine: EngineConfig) -> ThinkParts:
    """Return the parts of ``config.folder``, which must fit each other.

    Args:
        config: Which folder, and how the painter draws.
        engine: Device and type of arithmetic.

    Raises:
        CovrayError: A part is missing, or is not the one that the aligner was trained with.
    """
    folder = str(config.folder).rstrip("/")
    aligner = open_aligner(f"{folder}/aligner")
    # The folder has the one model that its aligner's features are of.
    model = "clip" if aligner.variant == "clip" else "vlm"
    models = ThinkModelsConfig(
        vlm=VlmModelConfig(path=f"{folder}/{model}"),
        language_model=LanguageModelConfig(path=f"{folder}/text"),
        painter=PainterConfig(
            kind=config.kind, path=f"{folder}/painter", steps=config.steps, guidance=config.guidance, seed=config.seed
        ),
        engine=engine,
    )
    # With the encoder, which only some requests need: none of them may find it missing.
    require_models(models, aligner, words=True)
    return ThinkParts(aligner, models, config.instruction)


class ThoughtModels:
    """The models of a folder, loaded."""

    def __init__(self, parts: ThinkParts):
        """Load them. Raises CovrayError."""
        self._parts = parts
        self._thinker = Thinker(parts.models, parts.aligner, words=True)
        self._aligner = self._thinker.load(parts.aligner)

    def think(self, query: ThoughtQuery) -> ThoughtResponse | Refusal:
        """Return what is thought and drawn; it follows from the query alone."""
        question = Question(query.words, query.prompt, self._parts.instruction, query.is_bridge)
        try:
            text, frames = answer(self._thinker, self._parts.aligner, self._aligner, question, query.pictures)
        # A query can ask what only the models themselves refuse, such as more features than a video reads.
        except CovrayError as error:
            return Refusal(reason="refused", message=str(error))
        except PairError as error:
            return Refusal(reason=error.reason, message=str(error))
        pictures = tuple(base64.b64encode(encode_png(frame)).decode() for frame in frames)
        return ThoughtResponse(text=text, pictures=pictures)
