"""What a verifier reads of a candidate: the states and the likelihood of each picture that the model has written.

    before (examples, query) | frame | frame | answer
                               one read of the pictures written so far, after keys and values of what stands before

A candidate is read alone, so that what is said of it does not depend on the others.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from covray.models.lvm.decoding.reader import KeysValues, Reader


class CandidateReader:
    """Reads candidates after what stands before them, which is read once for all candidates of a query."""

    def __init__(self, reader: Reader, tokens_per_image: int):
        """Take the model; the reader's cache is not touched."""
        self._reader, self._tokens_per_image = reader, tokens_per_image
        self._before = functools.lru_cache(maxsize=1)(self._read_before)

    def picture_features(self, before: np.ndarray, written: np.ndarray) -> Tensor:
        """Return the features of every picture of a candidate.

        Args:
            before: Ids of examples and query, [n].
            written: Ids of the pictures written so far, one after another, [pictures * tokens per image].

        Returns:
            Float32 [pictures, width + LIKELIHOODS]: the mean of the states of a picture's tokens, and its likelihoods.
        """
        reader = self._reader
        # As bytes, because candidates of one query share what stands before them, and bytes can be the key of a cache.
        last, shared = self._before(before.astype(np.int64).tobytes())
        states = reader.read_states(written, len(before), shared)
        # A token is predicted by the state before its own: the first one by the last state of what stands before.
        predicting = torch.cat((last[None], states[:-1]))
        ids = torch.from_numpy(written.astype(np.int64)).to(states.device)
        logits = reader.logits(predicting)
        log_p = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
        # Means of log p over each picture, and over all tokens up to its end, [pictures] each.
        of_pictures = log_p.view(-1, self._tokens_per_image).mean(1)
        so_far = of_pictures.cumsum(0) / torch.arange(1, len(of_pictures) + 1, device=states.device)
        pooled = states.float().view(len(of_pictures), self._tokens_per_image, -1).mean(1)
        return torch.cat((pooled, of_pictures[:, None], so_far[:, None]), 1)

    def _read_before(self, ids: bytes) -> tuple[Tensor, list[KeysValues]]:
        return self._reader.read_alone(np.frombuffer(ids, np.int64), 0, None)
