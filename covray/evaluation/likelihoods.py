"""How likely a model finds the label that it should have written."""

from __future__ import annotations

import numpy as np

from covray.evaluation.answers import EpisodeResult, Tokens
from covray.evaluation.metrics import OWN, REFERENCE
from covray.generation.models import LoadedModel


def label_nats(model: LoadedModel, result: EpisodeResult, candidates: Tokens) -> dict[str, float]:
    """Return the label's negative log likelihood in nats a token, after the model's own and the reference's frames.

    Args:
        model: Which wrote the candidates.
        result: With its chain and prompt.
        candidates: [n, images, tokens]; over those of a vote the mean is taken.
    """
    assert result.chain is not None
    assert result.prompt is not None
    # After everything that stands before it: the examples, the query's image, and the frames.
    label = result.chain[-1]
    by_reference = model.answer_nats(np.concatenate([result.prompt, result.chain[1:-1].reshape(-1)]), label)
    if candidates.shape[1] == 1:  # without frames there is one
        return {OWN: by_reference, REFERENCE: by_reference}

    by_own = []
    for candidate in candidates:
        by_own.append(model.answer_nats(np.concatenate([result.prompt, candidate[:-1].reshape(-1)]), label))
    return {OWN: sum(by_own) / len(by_own), REFERENCE: by_reference}
