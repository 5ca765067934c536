"""The verifier: a small network that says how good the pictures of a candidate are, and its files beside an adapter.

It reads the states that the frozen model has of a picture and the likelihood that it gives it, and returns one number.
The larger number of two candidates of one query is the better one with probability 1 / (1 + exp(smaller - larger)), as
the verifier believes (Bradley and Terry, 1952); numbers of different queries say nothing of each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covray.errors import WeightsError
from covray.io.storage import Folder
from covray.models.lvm.adapter_parts import read_weights, record_bytes, tensor_bytes
from covray.models.lvm.records import VerifierRecord

VERIFIER_WEIGHTS = "verifier_model.safetensors"
LIKELIHOODS = 2
"""Features of a picture behind its states: mean log p of its tokens, and of all tokens written up to its end."""


class Verifier(nn.Module):
    """A layer norm of the states, one hidden layer, one number."""

    def __init__(self, facts: VerifierRecord, seed: int = 0):
        """Make a verifier that has learned nothing: it calls all candidates equally good.

        Args:
            facts: Its sizes, and what it judges.
            seed: Of the hidden layer's weights.
        """
        super().__init__()
        self.facts = facts
        inputs = facts.width + LIKELIHOODS
        self.first = nn.Linear(inputs, facts.hidden)
        self.last = nn.Linear(facts.hidden, 1, bias=False)
        bound = inputs**-0.5
        with torch.no_grad():
            # A generator of its own: PyTorch's global one depends on what ran before.
            self.first.weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
            self.first.bias.zero_()
            self.last.weight.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Return how good pictures are.

        Args:
            features: As ``decoding.judging.picture_features`` returns them, float32 [..., width + LIKELIHOODS].

        Returns:
            float32 [...].
        """
        states, likelihoods = features.split((self.facts.width, LIKELIHOODS), -1)
        states = F.layer_norm(states, (self.facts.width,))
        verdicts: Tensor = self.last(F.gelu(self.first(torch.cat((states, likelihoods), -1))))
        return verdicts[..., 0]


def verifier_files(verifier: Verifier, tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the files of a verifier by name; ``tensors`` are its weights, float32 on the CPU."""
    return {VerifierRecord.FILE: record_bytes(verifier.facts), VERIFIER_WEIGHTS: tensor_bytes(tensors)}


def read_verifier(folder: Folder, adapter: str) -> Verifier:
    """Return the verifier in ``folder``.

    Args:
        folder: That of the adapter.
        adapter: SHA-256 (hex) of the adapter's weights.

    Raises:
        WeightsError: A file is missing or damaged, or the verifier judges another adapter.
    """
    facts = VerifierRecord.read(folder)
    # Its numbers are of one adapter's states: beside another one they would rank candidates at random.
    if facts.adapter != adapter:
        raise WeightsError(
            f"{folder.join(VerifierRecord.FILE)}: judges the answers of adapter {facts.adapter[:12]}, beside it lies "
            f"{adapter[:12]}; train a verifier for this one"
        )
    tensors = read_weights(folder, VERIFIER_WEIGHTS)
    # Compared before the network is made: sizes that a damaged file invents would take terabytes.
    expected = {
        "first.weight": (facts.hidden, facts.width + LIKELIHOODS),
        "first.bias": (facts.hidden,),
        "last.weight": (1, facts.hidden),
    }
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise WeightsError(
            f"{folder.join(VERIFIER_WEIGHTS)}: has not the sizes of {VerifierRecord.FILE}; get the adapter again"
        )
    verifier = Verifier(facts)
    verifier.load_state_dict(tensors)
    return verifier.requires_grad_(False)
