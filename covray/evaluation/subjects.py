"""The subjects of an evaluation: adapters, their untuned backbones, and answers that need no training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pydantic import ValidationError

from covray.chains.compatibility import require_same_codes
from covray.chains.dataset import ChainDataset
from covray.chains.shard_rows import FrameColumn
from covray.config import BackboneConfig, EvaluateConfig, TrainConfig, named_run
from covray.errors import ConfigError, WeightsError
from covray.io import storage
from covray.methods import NO_FRAMES
from covray.models.lvm.adapter import WEIGHTS_FILE, read_run, read_run_adapter
from covray.models.lvm.backbone import BackboneFacts, backbone_facts
from covray.models.lvm.decoding.base import require_context
from covray.models.lvm.decoding.requirements import require_trained_parts
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
    """How the frames of its chains are made: ``none``, ``linear``, ``diffusion`` or ``saliency``; None: it reads no
    chains."""
    length: int | None = None
    """Pictures of a chain, both ends counted."""
    pairs: int | None = None
    """Example pairs before the query."""
    adapter: str | None = None
    """Run folder."""
    backbone: BackboneConfig | None = None
    fingerprint: str = ""
    """SHA-256 (hex) of the backbone's weights."""
    baseline: str | None = None
    """One of ``EvaluateConfig.baselines``, for an answer without a model."""
    samples: int = 1
    """How many candidates a model writes for an answer."""
    votes: int = 1
    """How many of ``EvaluateConfig.votes`` the answer is joined from; 1: it is made as ``sampling`` says."""


def subjects_of(config: EvaluateConfig, dataset: ChainDataset) -> tuple[Subject, ...]:
    """Return the subjects that ``config`` asks for, in the order of the table, after all checks.

    Raises:
        CovrayError: A run is none or unfinished, a backbone is not the run's, chains are of another tokenizer or lack
            the frames that a run needs, a sentence exceeds the context, or a name is given twice.
    """
    # The adapters are checked first: what is asked of them decides what is asked of the untuned backbone.
    adapters: list[Subject] = []
    for entry in config.adapters:
        adapters += _adapter(config, dataset, entry)
    untuned: list[Subject] = []
    focus: list[Subject] = []
    # Baselines alone ask for no backbone: there may be none that knows the dataset's codes.
    if config.untuned or "focus" in config.baselines:
        untuned = list(_untuned(config, dataset, adapters))
    if "focus" in config.baselines:
        focus.append(_focus(config, dataset, [*adapters, *untuned]))
    # The ceiling stands last: it has seen the label.
    simple: list[Subject] = []
    ceiling: list[Subject] = []
    for key in dict.fromkeys(config.baselines):
        if key in _BASELINES:
            baseline = Subject(*_BASELINES[key], baseline=key)
            if key == "ceiling":
                ceiling.append(baseline)
            else:
                simple.append(baseline)
    if not config.untuned:  # they were needed for Chain-of-Focus alone
        untuned = []
    voting = _voting(config, adapters or untuned)
    subjects = []
    for subject in (*simple, *untuned, *focus, *adapters, *voting, *ceiling):
        # What a vote joins are its samples; other models write as many candidates as the sampling says.
        if subject.votes > 1:
            subject = replace(subject, samples=subject.votes)
        elif subject.method is not None:
            subject = replace(subject, samples=config.sampling.candidates)
        subjects.append(subject)
    # With adapters each of them is checked with its own heads.
    if not config.adapters:
        require_trained_parts(config.sampling, None, None)
    if not subjects:
        raise ConfigError("nothing to evaluate: give --adapter RUN, or leave untuned and baselines as they are")
    _require_distinct_names(subjects)
    return tuple(subjects)


def _require_distinct_names(subjects: Sequence[Subject]) -> None:
    """Refuse two subjects of one name. Raises ConfigError."""
    names = set()
    for subject in subjects:
        if subject.name in names:
            raise ConfigError(
                f"--adapter: two are called {subject.name}; give the run another name, as --adapter NAME=RUN"
            )
        names.add(subject.name)


def _voting(config: EvaluateConfig, models: Sequence[Subject]) -> Iterator[Subject]:
    """Yield the votes of every model: of as many samples as is asked for, then of plain answers of as many tokens."""
    written = {model.name: (model.length or 2) - 1 for model in models}  # pictures of one sample
    for model in models:
        counts = dict.fromkeys(config.votes.samples, "")
        # A sample of a long chain costs as many tokens as several plain answers, which are its fair comparison.
        if config.votes.equal_tokens and written[model.name] == 1:
            for samples in config.votes.samples:
                counts.setdefault(samples * max(written.values()), f", the tokens of {samples} of the longest chains")
        for samples, why in sorted(counts.items()):
            name = f"{model.name}, votes of {samples}"
            yield replace(model, name=name, about=f"{model.about}; votes of {samples} samples{why}", votes=samples)


def _adapter(config: EvaluateConfig, dataset: ChainDataset, entry: str) -> Iterator[Subject]:
    """Yield the subjects of ``entry``, ``RUN`` or ``NAME=RUN``: one for each length. Raises CovrayError."""
    name, run = named_run(entry)
    about = read_run(run)
    try:
        trained = TrainConfig.model_validate(about.config)
        recorded = about.fingerprints
        fingerprints = {"backbone": str(recorded["backbone"]), "codebook": str(recorded["codebook"])}
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"{run}/_run.json: does not describe a run; give the --out of a covray train") from error
    require_same_codebook(dataset.fingerprints["codebook"], fingerprints["codebook"], f"--adapter {run}")
    backbone = config.backbone or trained.backbone
    # Weights count, not paths: a backbone may have moved since the training.
    facts = backbone_facts(backbone)
    if facts.fingerprint != fingerprints["backbone"]:
        raise WeightsError(
            f"--adapter {run}: adapts backbone {fingerprints['backbone'][:12]}, {backbone.path or backbone.scale} is "
            f"{facts.fingerprint[:12]}; give --backbone the folder or revision it was trained on"
        )
    lora = read_run_adapter(run)[0]
    require_trained_parts(config.sampling, lora, run)
    sentences = trained.sentences
    # By default an adapter is asked for the longest chains, and the most examples, that it was trained on.
    lengths = config.lengths or (max(sentences.lengths),)
    # Two lengths may be one form: without frames every chain has two pictures.
    asked_forms = [_form(sentences.method, length) for length in lengths]
    forms = list(dict.fromkeys(asked_forms))
    pairs = config.pairs
    if pairs is None:
        pairs = max(sentences.pairs)
    for form in forms:
        # The name says its length only where one adapter has several rows.
        of_form = name
        if len(forms) > 1:
            of_form = f"{name} L={form.length}"
        subject = Subject(
            name=of_form,
            kind="adapter",
            about=f"adapter of {run}",
            method=form.method,
            length=form.length,
            pairs=pairs,
            adapter=run,
            backbone=backbone,
            fingerprint=facts.fingerprint,
        )
        _require(subject, facts, dataset)
        yield subject


class _Form(NamedTuple):
    """The form of a chain."""

    method: str
    length: int


def _form(method: str, length: int) -> _Form:
    """Return the form of chains of ``length`` pictures; one of two pictures has no frames, whatever made them."""
    if method == "none" or length == 2:
        return _Form("none", 2)
    return _Form(method, length)


def _untuned(config: EvaluateConfig, dataset: ChainDataset, adapters: list[Subject]) -> Iterator[Subject]:
    """Yield the backbones without their adapters, each once for every form of chain that is asked of an adapter.

    Without adapters it is one backbone, which is asked for plain pairs.
    """
    backbone = config.backbone or BackboneConfig()
    # The backbone of the first adapter is the one to compare with, unless one is given.
    if config.backbone is None and adapters:
        backbone = adapters[0].backbone or backbone
    asked = []
    for adapter in adapters:
        form = _form(str(adapter.method), adapter.length or 2)
        asked.append((adapter.backbone or backbone, form, adapter.pairs or 0))
    for wanted in config.forms:
        asked.append((backbone, _form(wanted.method, wanted.length), wanted.pairs))
    if not asked:
        pairs = 1
        if config.pairs is not None:
            pairs = config.pairs
        asked.append((backbone, _form("none", 2), pairs))
    distinct: dict[tuple[str, _Form, int], tuple[BackboneConfig, BackboneFacts]] = {}
    # Two folders of the same weights are one subject.
    for entry, form, pairs in asked:
        facts = backbone_facts(entry)
        distinct.setdefault((facts.fingerprint, form, pairs), (entry, facts))
    names = _shortest_names(list(distinct))
    for name, (key, (entry, facts)) in zip(names, distinct.items(), strict=True):
        fingerprint, form, pairs = key
        subject = Subject(
            name=name,
            kind="untuned",
            about=f"the backbone without an adapter, after examples with frames by {form.method}",
            method=form.method,
            length=form.length,
            pairs=pairs,
            backbone=entry,
            fingerprint=fingerprint,
        )
        _require(subject, facts, dataset)
        yield subject


def _shortest_names(keys: Sequence[tuple[str, _Form, int]]) -> list[str]:
    """Return a name for each untuned backbone of a fingerprint, a form and a number of pairs.

    A name says no more than what tells it from the others: nothing, the method, the length, and so on.
    """
    descriptions = []
    for fingerprint, form, pairs in keys:
        descriptions.append((form.method, f"L={form.length}", f"{pairs} pairs", fingerprint[:6]))
    most = len(descriptions[0])
    # Once more words of each description, until no two names are equal.
    for count in range(most + 1):
        names = [" ".join(("untuned", *words[:count])) for words in descriptions]
        if len(set(names)) == len(names):
            break
    return names


def _focus(config: EvaluateConfig, dataset: ChainDataset, others: list[Subject]) -> Subject:
    """Return Chain-of-Focus on the first backbone of ``others``: it prompts a model as it is."""
    first = others[0]
    assert first.backbone is not None
    facts = backbone_facts(first.backbone)
    # Its chains have three pictures, and may be longer than those of the others: as many pairs as the context takes.
    length = 3
    fitting = facts.llama.max_position_embeddings // dataset.tokens_per_image // length - 1
    most = max(each.pairs or 0 for each in others)
    focus = Subject(
        name="Chain-of-Focus",
        kind="focus",
        about=(
            "Chain-of-Focus (Zheng et al., ICLR 2025): the untuned backbone after examples chosen by similarity and "
            "rich labels, with a saliency map between image and label"
        ),
        method=SALIENCY,
        length=length,
        pairs=max(0, min(most, fitting)),
        backbone=first.backbone,
        fingerprint=first.fingerprint,
    )
    _require(focus, facts, dataset)
    return focus


def _require(subject: Subject, facts: BackboneFacts, dataset: ChainDataset) -> None:
    """Refuse a model that cannot read the chains of ``dataset``. Raises CovrayError."""
    require_same_codes(facts, dataset)
    length, size = subject.length or 2, dataset.tokens_per_image
    # The longest sentence: all examples and the query, each a whole chain.
    pictures = ((subject.pairs or 0) + 1) * length
    require_context(pictures * size, size, facts.llama.max_position_embeddings)
    if subject.method is not None and subject.method not in (NO_FRAMES, SALIENCY):
        # The chain of a made-up row with all that was built: the dataset refuses frames that were not.
        frames: list[FrameColumn] = []
        for method in dataset.methods:
            for alpha in dataset.alphas:
                frames.append({"method": method, "alpha": alpha, "tokens": [0]})
        dataset.chain({"source": [0], "frames": frames, "label": [0]}, length, subject.method)


def adapter_weights(subject: Subject) -> str:
    """Return the path of the adapter's weights."""
    assert subject.adapter is not None
    return storage.join(subject.adapter, "adapter", WEIGHTS_FILE)
