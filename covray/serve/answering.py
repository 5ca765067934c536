"""Requests of several clients answered together by one loaded generator. Knows no HTTP."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from covray.config import SamplingConfig
from covray.errors import CovrayError
from covray.generation.generator import Generator
from covray.generation.request import Answer, Example, Request
from covray.io.images import encode_png
from covray.io.pixels import Picture
from covray.serve.schemas import AnswerResponse, Candidate, Frame, Refusal


@dataclass(frozen=True, eq=False)
class Query:
    """One query with all that decides its answer, checked against the limits."""

    adapter: str
    picture: Picture
    examples: tuple[Example, ...]
    task: str | None
    classes: int
    sampling: SamplingConfig
    seed: int

    def shared(self) -> tuple[object, ...]:
        """Return what queries must have in common to be answered in one batch: all but the picture."""
        return (
            self.adapter, self.examples, self.task, self.classes, self.sampling.model_dump_json(), self.seed,
        )  # fmt: skip

    def request(self, pictures: Sequence[Picture]) -> Request:
        """Return the request for ``pictures`` with this query's examples and settings."""
        return Request(tuple(pictures), self.examples, self.task, self.classes, self.sampling, self.seed)


class AbandonedError(Exception):
    """Nobody waits for the answer any longer."""


class Waiting:
    """A query whose client waits until the end of the block."""

    def __init__(self, query: Query):
        """Begin to wait."""
        self.query = query
        # Set by the event loop and read by the thread that computes: a flag needs no lock.
        self.is_over = False

    def __enter__(self) -> Waiting:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """End, however the block ended: nobody waits any longer."""
        self.is_over = True


def require_waiting(clients: Sequence[Waiting]) -> None:
    """Raise AbandonedError where none of ``clients`` waits any longer."""
    if all(client.is_over for client in clients):
        raise AbandonedError


def group(queries: Sequence[Query]) -> list[list[int]]:
    """Return the numbers of the queries that can be answered in one batch, in the order of their first."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, query in enumerate(queries):
        groups.setdefault(query.shared(), []).append(number)
    return list(groups.values())


def answer_together(generator: Generator, clients: Sequence[Waiting]) -> list[AnswerResponse | Refusal]:
    """Answer queries that share everything but the picture; each answer has the bits that it has alone.

    Raises:
        AbandonedError: No client waits any longer. It is noticed before each pass of the model.
    """
    first = clients[0].query
    check = functools.partial(require_waiting, clients)
    # Before the first pass, too: making the chains of examples takes seconds, which nobody may be waiting for.
    check()
    try:
        with generator.checked(check):
            answers = generator.answer(first.request([client.query.picture for client in clients]))
    except CovrayError as error:
        # One for all: what can be refused is what they share.
        return [Refusal(reason="refused", message=str(error))] * len(clients)
    responses: list[AnswerResponse | Refusal] = []
    for answer in answers:
        response = AnswerResponse(
            adapter=first.adapter,
            task=first.task or generator.resolved.task,
            seed=answer.seed,
            query=_png(answer.query),
            frames=tuple(_png(frame) for frame in answer.frames),
            picture=_png(answer.picture),
            spread=None if answer.spread is None else _png(answer.spread),
            data=_encoded(answer.data),
            samples=answer.samples,
            candidate=answer.candidate,
            log_likelihood=answer.log_likelihood,
            candidates=_candidates(generator, answer),
        )
        responses.append(response)
    return responses


def _candidates(generator: Generator, answer: Answer) -> tuple[Candidate, ...]:
    """Return all candidates of an answer, where there are several."""
    if answer.samples < 2:
        return ()
    candidates = []
    for tokens, nats in zip(answer.candidate_tokens, answer.candidate_log_likelihood.tolist(), strict=True):
        # Given up before its answer (sampling.keep): there are no tokens to show.
        if math.isinf(nats):
            candidates.append(Candidate(picture=None, log_likelihood=None))
        else:
            picture = generator.tokenizer.decode(tokens[None])[0]
            candidates.append(Candidate(picture=_png(picture), log_likelihood=nats))
    return tuple(candidates)


def stream_answer(generator: Generator, client: Waiting) -> Iterator[Frame | AnswerResponse | Refusal]:
    """Yield each picture of one answer as soon as it is written, and at last the answer without its frames.

    Raises:
        AbandonedError: The client does not wait any longer. It is noticed before each pass of the model.
    """
    query = client.query
    request = query.request([query.picture])
    try:
        with generator.checked(functools.partial(require_waiting, [client])):
            for written in generator.stream(request):
                yield Frame(number=written.number, is_answer=written.is_answer, picture=_png(written.picture))
                if written.is_answer:
                    yield _last_event(generator, query, request, written.picture)
    except CovrayError as error:
        yield Refusal(reason="refused", message=str(error))


def _last_event(generator: Generator, query: Query, request: Request, small: Picture) -> AnswerResponse:
    """Return the answer that ends a stream.

    Args:
        generator: Who wrote it.
        query: Whose answer it is.
        request: The request of the query alone.
        small: The answer at the tokenizer's size.
    """
    read = generator.read_answer(request, 0, small)
    return AnswerResponse(
        adapter=query.adapter,
        task=query.task or generator.resolved.task,
        seed=None,
        query=_png(generator.as_seen(query.picture)),
        frames=(),
        picture=_png(read.picture),
        spread=None,
        data=_encoded(read.data),
        samples=query.sampling.candidates,
        candidate=None,
        log_likelihood=None,
    )


def _png(picture: Picture) -> str:
    return base64.b64encode(encode_png(picture)).decode()


def _encoded(files: dict[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(content).decode() for name, content in files.items()}
