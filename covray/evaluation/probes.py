"""What tells why frames help or hurt: the answer after other frames than the model's own, and the last frame as answer.

Frames that a model writes carry nothing that the query lacks. An answer that is as good after copies of the query, or
after dummies, gains from computation at most, not from what the frames show.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covray.chains.loading import Chains
from covray.evaluation.answers import EpisodeResult
from covray.generation.models import LoadedModel
from covray.seeds import seed_of
from covray.tasks.base import Metric

Tokens = NDArray[np.uint16]

FRAMES = ("reference", "other", "copy", "dummy")
"""Probes that write an answer after frames of their own."""
LAST_FRAME, NATS, GAIN = "last_frame", "nats", "gain"
NATS_FRAMES, NATS_ANSWER = "nats_frames", "nats_answer"
GAIN_OWN, GAIN_REFERENCE, AGREEMENT = "frame_gain", "frame_gain_reference", "frame_agreement"
_OVER_COPIES = "over copies of the query in their place, in nats a token."
_PRIMARY = "The task's first metric of the answer that is written after "
PROBE_METRICS = (
    Metric("after_reference", "After reference frames", f"{_PRIMARY}the dataset's frames, which leak the label.", None),
    Metric("after_other", "After another pair's frames", f"{_PRIMARY}the dataset's frames of another pair.", None),
    Metric("after_copy", "After copies of the query", f"{_PRIMARY}copies of the query in place of frames.", None),
    Metric("after_dummy", "After dummies", f"{_PRIMARY}frames of one code, the same for all queries.", None),
    Metric(LAST_FRAME, "Last frame", "The task's first metric of the last frame, read as the answer.", None),
    Metric(
        NATS_FRAMES,
        "Frames, nats",
        "Negative log likelihood of all reference frames of a chain, each after all before it.",
        "lower",
        "nats",
    ),
    Metric(
        NATS_ANSWER,
        "Answer, nats",
        "Negative log likelihood of the whole reference answer after the reference frames, which leak it.",
        "lower",
        "nats",
    ),
    Metric(
        GAIN_OWN,
        "Gain by own frames",
        f"How much likelier the model's own frames make the reference answer, {_OVER_COPIES}",
        "higher",
        "nats",
    ),
    Metric(
        GAIN_REFERENCE,
        "Gain by reference frames (leak the label)",
        f"How much likelier the dataset's frames make the reference answer, {_OVER_COPIES}",
        None,
        "nats",
    ),
    Metric(
        AGREEMENT,
        "Agreement with the frames",
        f"How much likelier the model's own frames make the answer that it wrote, {_OVER_COPIES} 0: the answer would "
        "be as likely without them.",
        None,
        "nats",
    ),
)


def probe_frames(probe: str, chain: Tokens, chains: Chains, row: int, seed: int) -> Tokens | None:
    """Return the frames after which an answer is written, uint16 [frames, tokens].

    Args:
        probe: One of ``FRAMES``.
        chain: The query's own chain, [length, tokens].
        chains: The queries, with frames.
        row: Which of ``chains`` is the query.
        seed: Decides which is another pair.

    Returns:
        The frames; None where the task has no other pair.
    """
    # Each probe has as many frames as the chain, so that only what they show differs.
    if probe == "reference":
        return chain[1:-1]
    if probe == "copy":
        return np.repeat(chain[:1], len(chain) - 2, axis=0)
    if probe == "dummy":
        return np.zeros_like(chain[1:-1])
    # Another pair of the same task, other than the query: a step of 1 to others, around the task's rows.
    task = int(np.searchsorted(chains.starts, row, side="right")) - 1
    first, last = int(chains.starts[task]), int(chains.starts[task + 1])
    others = last - first - 1
    if not others:
        return None
    step = 1 + seed_of(seed, "other frames", int(chains.pair_ids[row])) % others
    frames: Tokens = chains.tokens[first + (row - first + step) % (last - first), 1:-1]
    return frames


def picture_nats(model: LoadedModel, result: EpisodeResult, answer_nats: float) -> dict[str, float]:
    """Return the nats of all reference frames together, and of the reference answer after them.

    Args:
        model: Which reads them.
        result: With its chain and prompt.
        answer_nats: Of the answer, a token, after the reference frames.
    """
    assert result.chain is not None
    assert result.prompt is not None
    frames, label = result.chain[1:-1].reshape(-1), result.chain[-1]
    # ``answer_nats`` are a mean over tokens, these are sums: they add up over a chain.
    return {
        NATS_FRAMES: model.answer_nats(result.prompt, frames) * len(frames),
        NATS_ANSWER: answer_nats * len(label),
    }


def frame_gains(
    model: LoadedModel, result: EpisodeResult, candidate: Tokens, reference_nats: float
) -> dict[str, float]:
    """Return what frames change in the likelihood of an answer, over copies of the query in their place.

    Args:
        model: Which wrote the candidate.
        result: With its chain and prompt.
        candidate: Its frames and its answer, [images, tokens]; of a vote the likeliest one's.
        reference_nats: Of the reference answer, a token, after the reference frames.
    """
    assert result.chain is not None
    assert result.prompt is not None
    label, answer = result.chain[-1], candidate[-1]
    # The baseline costs as many tokens as the frames: it has the computation, but nothing that the query lacks.
    copies = np.repeat(result.chain[:1], len(candidate) - 1, axis=0)
    after_copies = np.concatenate([result.prompt, copies.reshape(-1)])
    after_own = np.concatenate([result.prompt, candidate[:-1].reshape(-1)])
    label_nats = model.answer_nats(after_copies, label)
    return {
        GAIN_OWN: label_nats - model.answer_nats(after_own, label),
        GAIN_REFERENCE: label_nats - reference_nats,
        AGREEMENT: model.answer_nats(after_copies, answer) - model.answer_nats(after_own, answer),
    }
