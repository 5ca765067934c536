"""What a client sends and gets; pictures are base64 of encoded files, PNG in answers."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from covray.config import SamplingConfig, Section
from covray.config.fields import TaskName


def _from_base64(value: object) -> object:
    """Return the bytes of standard base64; anything else in it is a mistake, which pydantic's own type would skip."""
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("is not base64") from error


PictureFile = Annotated[bytes, BeforeValidator(_from_base64), Field(json_schema_extra={"format": "base64"})]
"""The bytes of an encoded picture; base64 in JSON."""


class ExampleFiles(Section):
    """An example pair, as picture files."""

    image: PictureFile
    label: PictureFile


class Settings(Section):
    """A request without its pictures: the part ``settings`` of a multipart request."""

    adapter: str | None = None
    """Name of an adapter; by default the first."""
    task: TaskName | None = None
    """How labels are resized and the answer is read; by default the run's task, if it has one."""
    classes: int = Field(default=21, ge=1, le=256)
    """Classes of a segmentation."""
    sampling: SamplingConfig = SamplingConfig()
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it and from the query."""


class AnswerRequest(Settings):
    """A query and its examples."""

    query: PictureFile
    examples: tuple[ExampleFiles, ...] = ()


class Frame(Section):
    """One picture of a streamed answer, as soon as it is written: the event ``frame``."""

    number: int
    """The frames come first, the answer is the last."""
    is_answer: bool
    picture: str
    """At the tokenizer's size."""


class Candidate(Section):
    """One of several answers that were written for a query."""

    picture: str | None
    """At the tokenizer's size; null where it was given up before (``sampling.keep``)."""
    log_likelihood: float | None
    """Of all its pictures, in nats; null where it was given up."""


class AnswerResponse(Section):
    """An answer; in a stream the last event, ``answer``."""

    adapter: str
    task: str | None
    seed: int | None
    """Of the query's random numbers; null in a stream."""
    query: str
    """The query as the model saw it."""
    frames: tuple[str, ...]
    """At the tokenizer's size; in a stream they were sent before, and this is empty."""
    picture: str
    """The answer at the query's size."""
    spread: str | None
    """Where the candidates of a vote disagree; null without a vote and in a stream."""
    data: dict[str, str]
    """The answer as its task reads it, file name to content in base64, as ``depth_m.npy``."""
    samples: int
    """Candidates that were written."""
    candidate: int | None
    """Number of the candidate that is the answer; null in a stream."""
    log_likelihood: tuple[float, ...] | None
    """Of each picture, the answer last, in nats; null in a stream."""
    candidates: tuple[Candidate, ...] = ()
    """All candidates by their number, where there are several; empty in a stream."""


# Texts are bounded here: the limits of a server count the body's bytes, and every word is tokens to compute.
class ThoughtSettings(Section):
    """What is said beside the pictures of a thought: the part ``settings`` of a multipart request."""

    words: tuple[Annotated[str, Field(max_length=200)], ...] = ()
    """A word for each picture and one more, which asks for the next picture; for a vision-language model."""
    prompt: str = Field(default="", max_length=2000)
    """In place of words: what a vision-language model is asked about the pictures, or, with a vision tower, what the
    painter reads after their features."""
    route: Literal["aligned", "text"] = "aligned"
    """What is drawn: the model's aligned features, or its text, through the encoder of the language model."""


class ThoughtRequest(ThoughtSettings):
    """Pictures and words to think about."""

    pictures: tuple[PictureFile, ...] = ()


class ThoughtResponse(Section):
    """What a vision-language model wrote, and what was drawn of it."""

    text: str | None
    """Null with a vision tower, which writes none."""
    pictures: tuple[str, ...]
    """The drawn picture, or the frames of a video."""


class ThinkInfo(Section):
    """The models that think."""

    variant: str
    """``lvlm``: a vision-language model; ``clip``: a vision tower."""
    pictures: int
    """Pictures that a request may show."""


class Refusal(Section):
    """Why a request was not answered."""

    reason: str
    """One word, the same for the same mistake."""
    message: str
    """What is wrong, and what to do."""


class AdapterInfo(Section):
    """An adapter that answers."""

    name: str
    task: str | None
    """Task that it was trained on, if it was one."""
    pictures: int
    """Pictures of a chain, both ends counted."""
    classes: tuple[str, ...] | None
    """Names of the classes of segmentation that it was trained on."""
    examples: int | None = None
    """Example pairs that fit its context, at most; null where that is not known before its models are loaded."""
    gallery: tuple[str, ...] = ()
    """Tasks of which ``/v1/gallery`` has example pairs."""


class GalleryPair(Section):
    """A training pair to show as an example; pictures are base64 of PNG files, which a request may send as they are."""

    id: str
    """The pair's number in its manifest."""
    image: str
    label: str

    @classmethod
    def of(cls, name: str, image: bytes, label: bytes) -> GalleryPair:
        """Return the pair of two PNG files."""
        return cls(id=name, image=base64.b64encode(image).decode(), label=base64.b64encode(label).decode())


class GalleryPairs(Section):
    """The gallery of one adapter and task."""

    pairs: tuple[GalleryPair, ...]
    """None where the run's training pairs are not there any more."""


class Adapters(Section):
    """All adapters; the first answers where a request names none."""

    adapters: tuple[AdapterInfo, ...]
    tasks: tuple[str, ...]
    """Every task that a request may name."""
