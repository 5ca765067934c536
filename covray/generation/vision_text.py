"""Answers of vision-language models: load once, answer many."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from covray.config.vlm import (
    VlmDecodingConfig,
    VlmGenerateConfig,
    VlmLoraConfig,
    VlmModelConfig,
    VlmSourceConfig,
    VlmTrainConfig,
)
from covray.errors import ConfigError, PairError, WeightsError, one_line
from covray.io.device import resolve_device
from covray.io.images import decode as decode_picture
from covray.io.model_folders import local_path
from covray.io.storage import Folder
from covray.models.vlm.adapter import WEIGHTS_FILE, adapter_blocks, load_adapter
from covray.models.vlm.batch import Blocks
from covray.models.vlm.checkpoint import LoadedVlm, VlmFacts, load_vlm, vlm_facts
from covray.models.vlm.decoding import Answer, decode, decoding_blocks, stream
from covray.models.vlm.prompts import Prompt, require_proportions
from covray.training.checkpoints import EXPORT
from covray.training.records import RunRecord, TrainResult

RESULT_OF_TRAINING = "give the --out of a finished covray vlm train"


@dataclass(frozen=True)
class Answerer:
    """A model that answers."""

    vlm: LoadedVlm
    trained: Blocks | None
    """The blocks that it was trained for; None: next tokens only."""
    fingerprint: str
    """SHA-256 (hex) of the checkpoint; with an adapter also that of its weights, behind a plus."""

    def prompt(self, pictures: Sequence[NDArray[np.uint8]], text: str) -> Prompt:
        """Return the tokens of a prompt; see ``Prompter.prompt``."""
        return self.vlm.prompter.prompt(pictures, text)

    def answer(self, prompts: Sequence[Prompt], decoding: VlmDecodingConfig) -> list[Answer]:
        """Return the answers to a batch of prompts."""
        return decode(self.vlm, prompts, decoding, self.trained)

    def text(self, answer: Answer) -> str:
        """Return an answer's text."""
        return self.vlm.prompter.text(answer.ids)


@dataclass(frozen=True)
class AnswererFacts:
    """What is known of a model that answers before its weights are loaded."""

    facts: VlmFacts
    """Of the checkpoint."""
    adapter: str | None
    """Folder of the adapter; None: the checkpoint answers as it is."""
    lora: VlmLoraConfig | None
    """Of the training that made the adapter."""
    trained: Blocks | None
    """The blocks that the model was trained for; None: next tokens only."""
    fingerprint: str
    """See ``Answerer``."""


def answerer_facts(config: VlmSourceConfig) -> AnswererFacts:
    """Find a checkpoint, or what a run made of it, and check everything but the values of its weights.

    Raises:
        ConfigError: The run is not one of ``covray vlm train``, or is unfinished.
        WeightsError: A model cannot be used, or is another one than the run adapted.
    """
    if config.run is None:
        checkpoint = config.checkpoint()
        assert checkpoint is not None
        facts = vlm_facts(checkpoint)
        return AnswererFacts(facts, None, None, facts.blocks, facts.fingerprint)
    trained, fingerprint = _read_run(config.run)
    # A run of whole weights is a checkpoint of its own; an adapter needs the one that it was trained on.
    if trained.train != "lora":
        facts = vlm_facts(VlmModelConfig(path=str(Path(config.run) / EXPORT)))
        return AnswererFacts(facts, None, None, facts.blocks, facts.fingerprint)
    facts = vlm_facts(config.checkpoint() or trained.checkpoint())
    if facts.fingerprint != fingerprint:
        raise WeightsError(
            f"{facts.folder}: is model {facts.fingerprint[:12]}, the run adapted {fingerprint[:12]}; give the folder "
            "or revision it was trained on (--model)"
        )
    folder = Folder(config.run) / EXPORT
    try:
        weights = hashlib.sha256(folder.read_bytes(WEIGHTS_FILE)).hexdigest()
    except OSError as error:
        raise WeightsError(f"{folder.path}: cannot be read ({one_line(error)}); restore it") from error
    blocks = adapter_blocks(folder.path)
    return AnswererFacts(facts, folder.path, trained.lora, blocks, f"{facts.fingerprint}+{weights}")


def load_answerer(config: VlmSourceConfig) -> Answerer:
    """Load a checkpoint, or what a run made of it.

    Raises:
        ConfigError: The run is not one of ``covray vlm train``, or is unfinished.
        WeightsError: A model cannot be loaded, or is another one than the run adapted.
    """
    device, dtype = resolve_device(config)
    known = answerer_facts(config)
    vlm = load_vlm(known.facts, dtype, device)
    if known.adapter is not None:
        assert known.lora is not None
        load_adapter(vlm.model, known.adapter, known.lora.rank, known.lora.alpha, known.lora.targets)
    return Answerer(vlm, known.trained, known.fingerprint)


def stream_answer(config: VlmGenerateConfig) -> Iterator[str]:
    """Yield the answer of ``covray vlm generate``, text that follows text.

    Raises:
        CovrayError: A picture or the model cannot be used.
    """
    pictures = [_read_picture(path) for path in config.images]
    answerer = load_answerer(config)
    decoding_blocks(config.decoding, answerer.trained)  # refuses what the model was not trained for
    prompt = answerer.prompt(pictures, config.prompt)
    ids: list[int] = []
    text = shown = ""
    for piece in stream(answerer.vlm, [prompt], config.decoding, answerer.trained):
        ids += piece.ids
        text = answerer.vlm.prompter.text(ids)
        # A character of several tokens is whole only with the last of them.
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    # An answer that is cut within a character has no later token to wait for.
    if len(text) > len(shown) and text.startswith(shown):
        yield text[len(shown) :]


def _read_run(run: str) -> tuple[VlmTrainConfig, str]:
    """Return the configuration of a finished run, and the fingerprint of its model."""
    folder = Folder(run)
    record = RunRecord.read_if_present(folder)
    if record is None or not folder.exists(TrainResult.FILE):
        raise ConfigError(f"{run}: is not a finished run; {RESULT_OF_TRAINING}")
    try:
        return VlmTrainConfig.model_validate(record.config), str(record.fingerprints["backbone"])
    except (ValidationError, KeyError) as error:
        raise ConfigError(f"{run}: is a run of another command; {RESULT_OF_TRAINING}") from error


def _read_picture(path: str) -> NDArray[np.uint8]:
    try:
        picture = decode_picture(local_path(path).read_bytes())
        require_proportions(picture)
        return picture
    except OSError as error:
        raise ConfigError(f"--image {path}: cannot be read ({one_line(error)})") from error
    except PairError as error:
        raise ConfigError(f"--image {path}: {error}") from error
