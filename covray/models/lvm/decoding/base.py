"""What a decoder does, and what it returns: pictures as tokens, with their likelihoods.

A decoder is another way to compute the same answers, or, where its page says so, answers like them. All of them take
the same prompt, queries and sampling, so that callers need not know which one they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from covray.config import SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.cache import LayerCache
from covray.models.sampling import BatchNoise, choose_tokens, expected_tokens

GREEDY = SamplingConfig()


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One picture of one candidate of one query, as it is finished."""

    query: int
    candidate: int
    image: int
    """Number of the picture: the frames come first, the answer is the last."""
    ids: NDArray[np.uint16]
    """[tokens per image]."""
    token_log_p: NDArray[np.float32]
    """log p of each token given all before it, in nats, [tokens per image]; p is the model's at temperature 1 over the
    image codes, whatever the tokens were sampled with."""
    verdict: float | None = None
    """What the verifier says of an answer; None of a frame, and without a verifier."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a decoder wrote for B queries, with N candidates each."""

    candidate_ids: NDArray[np.uint16]
    """[B, N, images, tokens per image]."""
    candidate_log_likelihood: NDArray[np.float64]
    """The sum of ``DecodedImage.token_log_p`` of every picture, [B, N, images]; -inf where a candidate was given up
    before it (``sampling.keep``)."""
    candidate: NDArray[np.int64]
    """The best candidate of every query by ``sampling.choose_by``, [B]."""
    candidate_verdict: NDArray[np.float64] | None = None
    """What the verifier says of every answer, [B, N]; -inf where a candidate was given up. None: it was not asked."""

    @property
    def ids(self) -> NDArray[np.uint16]:
        """Of the best candidates, [B, images, tokens per image]."""
        chosen: NDArray[np.uint16] = self.candidate_ids[np.arange(len(self.candidate)), self.candidate]
        return chosen

    @property
    def image_log_likelihood(self) -> NDArray[np.float64]:
        """Of the best candidates, [B, images]."""
        chosen: NDArray[np.float64] = self.candidate_log_likelihood[np.arange(len(self.candidate)), self.candidate]
        return chosen

    @property
    def log_likelihood(self) -> NDArray[np.float64]:
        """Of all pictures of the best candidates, [B]."""
        total: NDArray[np.float64] = self.image_log_likelihood.sum(1)
        return total


@dataclass(frozen=True, eq=False)
class FinishedImage:
    """One picture of one row of a batch."""

    row: int
    image: int
    ids: NDArray[np.uint16]
    """[tokens per image]."""
    token_log_p: NDArray[np.float32]
    """As in ``DecodedImage``."""


@dataclass(frozen=True, eq=False)
class PendingRows:
    """A batch of rows that are read and wait to be written: what a strategy works on."""

    caches: list[LayerCache]
    """Of all layers, with prompt and queries read."""
    hidden: torch.Tensor
    """States after the last token of each query, [batch, width]."""
    rows: int
    """Rows that count; those behind them are padding."""
    before: int
    """Tokens of prompt and query: the position of the first place to write."""
    steps: int
    """Places to write."""
    tokens_per_image: int
    sampling: SamplingConfig
    noise: BatchNoise | None
    """Of the rows; None: greedy."""
    codebook: torch.Tensor | None = None
    """Of the tokenizer, float32 [codes, width]; for ``sampling.expected``."""

    @property
    def own(self) -> int:
        """Tokens of a row's own part that are read, those of its query."""
        return self.before - self.caches[0].shared_keys.shape[1]

    @cached_property
    def _by_picture(self) -> tuple[SamplingConfig, SamplingConfig]:
        """How tokens of frames and those of the answer are chosen; made once, as every token asks."""
        return self.sampling.for_frames, self.sampling.for_answer

    def sampling_at(self, place: int) -> SamplingConfig:
        """Return how the token of a place is chosen; the last picture is the answer."""
        frames, answer = self._by_picture
        return answer if place >= self.steps - self.tokens_per_image else frames

    def choose(self, logits: torch.Tensor, places: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Choose tokens at places that may be of frames or of the answer.

        Args:
            logits: Float32 [batch, n, codes].
            places: int64 [batch, n].
            noise: Gumbel noise of the places, float32 [batch, n, codes]; None: greedy.

        Returns:
            int64 [batch, n].
        """
        frames, answer = self._by_picture
        chosen = self.choose_by(answer, logits, noise)
        if frames == answer:
            return chosen
        of_frames = self.choose_by(frames, logits, noise)
        return torch.where(places < self.steps - self.tokens_per_image, of_frames, chosen)

    def choose_by(self, sampling: SamplingConfig, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Choose tokens, int64 [batch, n], at places that are all of frames or all of the answer; see ``choose``."""
        if sampling.expected is None:
            return choose_tokens(logits, sampling, noise)
        assert self.codebook is not None
        return expected_tokens(logits / sampling.expected, self.codebook)

    def finish(
        self, image: int, rows: Iterable[int], ids: torch.Tensor, log_p: torch.Tensor
    ) -> Iterator[FinishedImage]:
        """Yield picture ``image`` of ``rows``.

        Args:
            image: Its number.
            rows: Which rows have finished it.
            ids: int64 [batch, steps].
            log_p: Of the tokens, float32 [batch, steps].
        """
        places = slice(image * self.tokens_per_image, (image + 1) * self.tokens_per_image)
        image_ids = ids[:, places].cpu().numpy().astype(np.uint16)
        # A copy: on a CPU this is the memory that the decoder goes on writing to.
        image_log_p = log_p[:, places].cpu().numpy().copy()
        for row in rows:
            yield FinishedImage(row, image, image_ids[row], image_log_p[row])


class Decoder(Protocol):
    """Writes pictures after a prompt and queries."""

    codes: int
    """Image codes of the vocabulary; ids from there on are never written."""
    tokens_per_image: int
    context_tokens: int

    def decode(
        self,
        prompt: np.ndarray,
        queries: np.ndarray,
        images: int,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Decoded:
        """Write ``images`` pictures after each of ``queries``.

        Args:
            prompt: Ids [P] that precede every query, P >= 0.
            queries: Ids [B, Q], Q >= 1.
            images: Pictures to write after each query, the answer last.
            sampling: How tokens are chosen, and how many candidates a query has.
            seeds: One a query: all its randomness follows from it and the candidate's number. By default 0 for all.

        Raises:
            ConfigError: Prompt, query and pictures exceed the context.
        """

    def stream(
        self,
        prompt: np.ndarray,
        queries: np.ndarray,
        images: int,
        sampling: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[DecodedImage]:
        """Write the same pictures as ``decode``, and yield each once it is finished; those of one row in order."""

    def checked(self, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Call ``check`` before each pass within the block; what it raises ends the writing."""


def collect(decoded: Iterable[DecodedImage], shape: tuple[int, int, int, int], sampling: SamplingConfig) -> Decoded:
    """Put the pictures of a stream together and find the best candidates.

    Args:
        decoded: All pictures of a stream.
        shape: Queries, candidates, images and tokens per image.
        sampling: Whose ``choose_by`` says what counts.
    """
    ids = np.zeros(shape, np.uint16)
    token_log_p = torch.full(shape, -torch.inf)  # of pictures that nobody writes
    verdicts = np.full(shape[:2], -np.inf)
    for each in decoded:
        if each.verdict is not None:
            verdicts[each.query, each.candidate] = each.verdict
        ids[each.query, each.candidate, each.image] = each.ids
        token_log_p[each.query, each.candidate, each.image] = torch.from_numpy(each.token_log_p)
    # In float64: candidates differ by little beside a sum of thousands of terms.
    by_image = token_log_p.double().sum(-1).numpy()
    if not shape[2]:
        return Decoded(ids, by_image, np.zeros(shape[0], np.int64))
    if sampling.choose_by == "verifier":
        return Decoded(ids, by_image, verdicts.argmax(1), verdicts)
    # Sums can be compared, as all candidates of a query have equally many tokens.
    scored = by_image[..., -1:] if sampling.choose_by == "answer" else by_image
    return Decoded(ids, by_image, scored.sum(-1).argmax(1))


def require_context(tokens: int, tokens_per_image: int, context_tokens: int) -> None:
    """Raise ConfigError, with the arithmetic, when a sentence of ``tokens`` exceeds the model's context.

    Args:
        tokens: Of the whole sentence.
        tokens_per_image: Tokens of one picture.
        context_tokens: Tokens that the model can read.
    """
    if tokens > context_tokens:
        raise ConfigError(
            f"{tokens // tokens_per_image} pictures x {tokens_per_image} tokens = {tokens} tokens exceed the context "
            f"of {context_tokens} ({context_tokens // tokens_per_image} pictures); "
            "give fewer examples or shorter chains"
        )
