"""Who is evaluated: adapters, their untuned backbone, and answers that need no training, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from covray.chains.compatibility import require_same_codes
from covray.chains.dataset import ChainDataset
from covray.config import BackboneConfig, EvaluateConfig, TrainConfig, named_run
from covray.errors import ConfigError, WeightsError
from covray.io import storage
from covray.models.lvm.adapter import WEIGHTS_FILE, read_run, read_run_adapter
from covray.models.lvm.backbone import BackboneFacts, backbone_facts
from covray.models.lvm.decoding.base import require_context
from covray.models.tokenizer.vqgan import require_same_codebook

Kind = Literal["baseline", "untuned", "focus", "adapter", "ceiling"]
SALIENCY = "saliency"
"""The method of Chain-of-Focus: one frame between image and label, where the picture is salient."""

_BASELINES: dict[str, tuple[str, Kind, str]] = {
    "copy": ("copy of the query", "baseline", "the query picture itself is the answer"),
    "mean": ("mean label", "baseline", "the mean of the examples' labels: of what they say, not of their colours"),
    "nearest": ("nearest label", "baseline", "the label of the example whose picture is most like the query"),
    "ceiling": ("VQGAN ceiling", "ceiling", "the label itself, written as tokens and read back: no answer of "
                "these tokens can be expected to be better"),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One row of the table."""

    name: str
    kind: Kind
    about: str
    method: str | None = None
    """How its chains' frames were made: ``none``, ``linear``, ``diffusion``, ``saliency``; None: it reads no chains."""
    length: int | None = None
    """Pictures of a chain, both ends counted."""
    pairs: int | None = None
    """Example pairs before the query."""
    adapter: str | None = None
    """Run folder."""
    backbone: dict[str, Any] | None = None
    """BackboneConfig, as JSON values."""
    fingerprint: str = ""
    """SHA-256 (hex) of the backbone's weights."""
    baseline: str | None = None
    """Which answer without a model, of ``EvaluateConfig.baselines``."""
    samples: int = 1
    """How many candidates a model writes for an answer."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON values; ``samples`` only where an answer takes several."""
        values = asdict(self)
        if self.samples == 1:
            del values["samples"]
        return values


def subjects_of(config: EvaluateConfig, dataset: ChainDataset) -> tuple[Subject, ...]:
    """Everyone that ``config`` asks for, in the order of the table; checks all that can be wrong with them.

    Raises CovrayError: a run that is none or unfinished, a backbone that is not the run's, chains of another tokenizer
    or without the frames a run needs, sentences that exceed the context, a name given twice.
    """
    adapters = [_adapter(config, dataset, entry) for entry in config.adapters]
    # Baselines alone ask for no backbone: there may be none that knows the dataset's codes.
    untuned = list(_untuned(config, dataset, adapters)) if config.untuned or "focus" in config.baselines else []
    focus = _focus(config, dataset, [*adapters, *untuned]) if "focus" in config.baselines else []
    simple = {key: Subject(*_BASELINES[key], baseline=key) for key in config.baselines if key in _BASELINES}
    ceiling = [simple.pop("ceiling")] if "ceiling" in simple else []
    found = (*simple.values(), *(untuned if config.untuned else ()), *focus, *adapters, *ceiling)
    if not found:
        raise ConfigError("nothing to evaluate: give --adapter RUN, or leave untuned and baselines as they are")
    samples = config.sampling.candidates
    found = tuple(subject if subject.method is None else replace(subject, samples=samples) for subject in found)
    names = [subject.name for subject in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--adapter: two are called {name}; give the run another name, as --adapter NAME=RUN")
    return found


def _adapter(config: EvaluateConfig, dataset: ChainDataset, entry: str) -> Subject:
    name, run = named_run(entry)
    about = read_run(run)
    try:
        trained = TrainConfig.model_validate(about["config"])
        fingerprints = {key: str(about["fingerprints"][key]) for key in ("backbone", "codebook")}
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"{run}/_run.json: is no description of a run; give the --out of a covray train") from error
    require_same_codebook(dataset.fingerprints["codebook"], fingerprints["codebook"], f"--adapter {run}")
    backbone = config.backbone or trained.backbone
    facts = backbone_facts(backbone)
    if facts.fingerprint != fingerprints["backbone"]:
        raise WeightsError(
            f"--adapter {run}: adapts backbone {fingerprints['backbone'][:12]}, {backbone.path or backbone.scale} is "
            f"{facts.fingerprint[:12]}; give --backbone the folder or revision it was trained on"
        )
    read_run_adapter(run)
    sentences = trained.sentences
    length = 2 if sentences.method == "none" else max(sentences.lengths)
    pairs = max(sentences.pairs) if config.pairs is None else config.pairs
    shown = sentences.method if length > 2 else "none"
    subject = Subject(
        name, "adapter", f"adapter of {run}", shown, length, pairs, run, backbone.model_dump(mode="json"),
        facts.fingerprint,
    )  # fmt: skip
    _require(subject, facts, dataset)
    return subject


def _untuned(config: EvaluateConfig, dataset: ChainDataset, adapters: list[Subject]) -> Iterator[Subject]:
    """The backbones without their adapters, each for every form of chain; without adapters one, of plain pairs."""
    backbone = (config.backbone or BackboneConfig()).model_dump(mode="json")
    if config.backbone is None and adapters:
        backbone = adapters[0].backbone or backbone
    forms = [(one.backbone, str(one.method), one.length or 2, one.pairs or 0) for one in adapters]
    forms += [(backbone, form.method, form.length, form.pairs) for form in config.forms]
    forms = forms or [(backbone, "none", 2, 1 if config.pairs is None else config.pairs)]
    distinct: dict[tuple[str, str, int, int], tuple[Any, BackboneFacts]] = {}
    for entry, method, length, pairs in forms:
        facts = backbone_facts(BackboneConfig.model_validate(entry))
        form = ("none", 2) if method == "none" or length == 2 else (method, length)
        key = (facts.fingerprint, *form, pairs)
        distinct.setdefault(key, (entry, facts))
    # A name says what tells it from the others, and no more.
    parts = [(key[1], f"L={key[2]}", f"{key[3]} pairs", key[0][:6]) for key in distinct]
    told = next((count for count in range(5) if len({part[:count] for part in parts}) == len(parts)), 4)
    for part, (key, (entry, facts)) in zip(parts, distinct.items(), strict=True):
        fingerprint, method, length, pairs = key
        name = " ".join(["untuned", *part[:told]])
        about = f"the backbone without an adapter, after examples with frames by {method}"
        subject = Subject(name, "untuned", about, method, length, pairs, None, entry, fingerprint)
        _require(subject, facts, dataset)
        yield subject


def _focus(config: EvaluateConfig, dataset: ChainDataset, others: list[Subject]) -> list[Subject]:
    """Chain-of-Focus on the first backbone: it prompts a model as it is."""
    first = others[0]
    facts = backbone_facts(BackboneConfig.model_validate(first.backbone))
    about = (
        "Chain-of-Focus (Zheng et al., ICLR 2025): the untuned backbone after examples chosen by similarity and rich "
        "labels, with a saliency map between image and label"
    )
    room = facts.llama.max_position_embeddings // dataset.tokens_per_image // 3 - 1
    pairs = max(0, min(max(one.pairs or 0 for one in others), room))  # a chain of its three pictures may be longer
    focus = Subject("Chain-of-Focus", "focus", about, SALIENCY, 3, pairs, None, first.backbone, first.fingerprint)
    _require(focus, facts, dataset)
    return [focus]


def _require(subject: Subject, facts: BackboneFacts, dataset: ChainDataset) -> None:
    """All that can be wrong with a model and chains together."""
    require_same_codes(facts, dataset)
    length, size = subject.length or 2, dataset.tokens_per_image
    pictures = ((subject.pairs or 0) + 1) * length
    require_context(pictures * size, size, facts.llama.max_position_embeddings)
    if subject.method in ("linear", "diffusion"):  # the dataset refuses what was not built
        frames = [
            {"method": method, "alpha": alpha, "tokens": [0]} for method in dataset.methods for alpha in dataset.alphas
        ]
        dataset.chain({"source": [0], "frames": frames, "label": [0]}, length, subject.method)


def adapter_weights(subject: Subject) -> str:
    """Path of the adapter's weights."""
    assert subject.adapter is not None
    return storage.join(subject.adapter, "adapter", WEIGHTS_FILE)
