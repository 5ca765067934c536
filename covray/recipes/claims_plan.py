"""The arms of ``covray experiments claims --budget``: what is built, trained and evaluated, and which claims follow.

All arms take the same steps over the same queries in the same order: a step has ``Budget.sentences`` queries, whatever
their chains are, with one learning rate, its decay to the end, and no early stopping. Chains cost more tokens so. The
arm ``none-tokens`` spends the tokens of the longest of the main arms on plain pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from covray.config import JsonObject

BudgetName = Literal["small", "full"]
ClaimGroup = Literal["paper", "pays", "training", "form", "decoding"]
MAIN_LENGTH = 4
OWN_NOISE: JsonObject = {"kind": "own", "share": 0.75}
NOISES: dict[str, JsonObject] = {
    "own": OWN_NOISE,
    "scheduled": {"kind": "scheduled", "share": 0.5},
    "random": {"kind": "random", "share": 0.25},
    "neighbour": {"kind": "neighbour", "share": 0.5},
}
"""Noise in the query's frames; own frames in three of four queries, as in the trial that the programme rests on."""


@dataclass(frozen=True)
class Budget:
    """How much is spent."""

    scenes: Mapping[str, int]
    """Rendered scenes by split, seven pairs each."""
    epochs: float
    """How often every training pair is the query of an arm."""
    sentences: int
    """Queries of a step."""
    refreshes: int
    """How often a training with own frames writes them."""
    seeds: tuple[int, ...]
    """Of the arms that decide; the others take the first."""
    shares: tuple[float, ...]
    """Points of a learning curve, as shares of the queries; each is a training of its own, decayed to its end."""
    lengths: tuple[int, ...]
    """Further lengths of chains."""
    spacings: Mapping[str, tuple[float, ...] | str]
    """Further places of frames, by name."""
    votes: tuple[int, ...]
    """Samples of votes."""
    episodes: int
    """Queries a task of an evaluation."""
    validation_episodes: int
    """The same on the split that choices are made on."""
    learning_rate: float = 5e-4
    prior_steps: int = 20
    tasks: tuple[str, ...] | None = None
    """All by default."""


BUDGETS: dict[BudgetName, Budget] = {
    "small": Budget(
        scenes={"train": 170, "val": 20, "test": 50},
        epochs=4,
        sentences=16,
        refreshes=3,
        seeds=(0, 1),
        shares=(0.25, 0.5),
        lengths=(3, 6),
        spacings={"path": "path", "two-thirds": (2 / 3,)},
        votes=(8,),
        episodes=50,
        validation_episodes=20,
    ),
    "full": Budget(
        scenes={"train": 1430, "val": 100, "test": 400},
        epochs=10,
        sentences=32,
        refreshes=8,
        seeds=(0, 1, 2),
        shares=(0.125, 0.25, 0.5),
        lengths=(3, 6, 8),
        spacings={"path": "path", "two-thirds": (2 / 3,), "late": (0.6, 0.9)},
        votes=(8, 16),
        episodes=400,
        validation_episodes=100,
    ),
}
"""``full``: 10,010 training pairs, about 100,000 queries an arm, some days on two cores."""


@dataclass(frozen=True)
class Backbone:
    """A model that all arms start from."""

    name: str
    path: str

    def config(self) -> JsonObject:
        """Return it as a ``BackboneConfig``."""
        # Shipped models are "nano", "nano-2" and so on; all else is a folder with an architecture of its own.
        shipped = re.fullmatch(r"nano(-\d+)?", self.path)
        return {"scale": "nano" if shipped else "custom", "path": self.path}


@dataclass(frozen=True)
class Dataset:
    """Chains to build."""

    name: str
    methods: tuple[str, ...]
    lengths: tuple[int, ...]
    spacing: tuple[float, ...] | str = "even"

    def build_options(self) -> dict[str, Any]:
        """Return its part of a ``BuildConfig``."""
        return {"methods": self.methods, "lengths": self.lengths, "spacing": self.spacing}


@dataclass(frozen=True)
class Arm:
    """A way to train, and what is asked of what it makes."""

    name: str
    about: str
    method: str
    length: int = MAIN_LENGTH
    dataset: str = "main"
    noise: JsonObject | None = None
    share: float = 1.0
    """Of the queries."""
    steps_factor: float = 1.0
    """Steps over those of the other arms: above 1 to spend as many tokens."""
    drop_worst: float = 0.0
    backbone: Backbone | None = None
    """None: the first."""
    seeds: tuple[int, ...] = (0,)
    chosen_from: bool = False
    """Whether it may be the best form of chain, or the best length of a task; then it is evaluated on ``val``, too."""

    @property
    def pictures(self) -> int:
        """Pictures of a chain."""
        return 2 if self.method == "none" else self.length


@dataclass(frozen=True)
class Decoding:
    """A way to write the answers of trained arms."""

    name: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of ``EvaluateConfig``."""


@dataclass(frozen=True)
class ClaimSpec:
    """A claim: which arm is said to be better than which."""

    key: str
    claim: str
    first: str
    second: str
    group: ClaimGroup
    view: str = "equal answers"
    metric: Literal["primary", "perplexity_own"] = "primary"


BEST = "best"
"""Stands for the arm of chains with the best answers on ``val``."""
ADAPTIVE = "adaptive-length"
"""The arm that has of every task the length that was best on ``val``."""


def datasets(budget: Budget) -> list[Dataset]:
    """Return what has to be built; the first has the noise of all inversions."""
    first = Dataset("main", ("diffusion", "linear", "copy", "coarse"), (MAIN_LENGTH,))
    # The further lengths are trained on diffused frames alone.
    others = [Dataset(f"length-{length}", ("diffusion",), (length,)) for length in budget.lengths]
    for name, spacing in budget.spacings.items():
        # Spacings by name keep the main length; those given as alphas have as many frames as alphas.
        length = MAIN_LENGTH if isinstance(spacing, str) else len(spacing) + 2
        others.append(Dataset(name, ("diffusion",), (length,), spacing))
    return [first, *others]


def arms(budget: Budget, backbones: tuple[Backbone, ...]) -> list[Arm]:
    """Return all arms, those that decide first."""
    return [
        *_main_arms(budget),
        *_form_arms(budget),
        *_curve_arms(budget),
        *_backbone_arms(budget, backbones[1:]),
    ]


def _main_arms(budget: Budget) -> Iterator[Arm]:
    seeds = budget.seeds
    yield Arm("none", "plain pairs", "none", seeds=seeds, chosen_from=True)
    # Plain pairs have two pictures: half of a chain's tokens.
    tokens = MAIN_LENGTH / 2
    yield Arm("none-tokens", "plain pairs, the tokens of chains", "none", steps_factor=tokens, seeds=seeds)
    yield Arm("linear", "pixels mixed", "linear", seeds=seeds)
    yield Arm("diffusion", "diffused frames", "diffusion", seeds=seeds, chosen_from=True)
    for name, noise in NOISES.items():
        own = seeds if name == "own" else seeds[:1]
        about = "the model's own frames in the context" if name == "own" else f"noise in the frames: {name}"
        yield Arm(name, f"diffused frames, {about}", "diffusion", noise=noise, seeds=own, chosen_from=True)
    yield Arm("copy", "copies of the query in place of frames", "copy", seeds=seeds)
    cells = "the label in cells in place of frames"
    yield Arm("coarse", cells, "coarse", seeds=seeds)
    # Coarse to fine, as scale by scale (VAR, arXiv 2404.02905): the whole picture is planned before its details.
    about = f"{cells}, the model's own in the context"
    yield Arm("coarse-own", about, "coarse", noise=OWN_NOISE, seeds=seeds[:1], chosen_from=True)


def _form_arms(budget: Budget) -> Iterator[Arm]:
    for length in budget.lengths:
        yield Arm(
            f"length-{length}", f"diffused chains of {length}", "diffusion", length, f"length-{length}",
            seeds=budget.seeds[:1], chosen_from=True,
        )  # fmt: skip
    for name, spacing in budget.spacings.items():
        even = isinstance(spacing, str)
        about = "frames in even steps of the chain's own path" if even else f"frames at {_alphas(spacing)}"
        length = MAIN_LENGTH if even else len(spacing) + 2
        yield Arm(name, about, "diffusion", length, name, seeds=budget.seeds[:1], chosen_from=True)
    yield Arm(
        "best-chains", "diffused frames, without the worst fifth of the chains", "diffusion", drop_worst=0.2,
        seeds=budget.seeds[:1],
    )  # fmt: skip


def _alphas(spacing: tuple[float, ...] | str) -> str:
    # A spacing by name is a text, whose characters are no alphas.
    return ", ".join(f"{alpha:.2g}" for alpha in spacing if isinstance(alpha, float))


def _curve_arms(budget: Budget) -> Iterator[Arm]:
    for share in budget.shares:
        for name, method in (("none", "none"), ("linear", "linear"), ("diffusion", "diffusion"), ("own", "diffusion")):
            yield Arm(
                f"{name}-{share:g}", f"{name}, {share:g} of the queries", method, share=share,
                noise=NOISES.get(name), seeds=budget.seeds[:1],
            )  # fmt: skip


def _backbone_arms(budget: Budget, backbones: tuple[Backbone, ...]) -> Iterator[Arm]:
    for backbone in backbones:
        for name, method in (("none", "none"), ("diffusion", "diffusion"), ("own", "diffusion")):
            yield Arm(
                f"{backbone.name}-{name}", f"{name} on the backbone {backbone.name}", method,
                noise=NOISES.get(name), backbone=backbone, seeds=budget.seeds,
            )  # fmt: skip


def decodings(budget: Budget) -> list[Decoding]:
    """Return the ways to write answers that are compared, on ``none`` and on the best chains."""
    sampled = {"sampling": {"temperature": 1.0}}
    ways = [
        Decoding("frames-0.5", "frames at temperature 0.5, the answer greedy", _frames(0.5)),
        Decoding("frames-1", "frames at temperature 1, the answer greedy", _frames(1.0)),
        Decoding("sampled", "all at temperature 1", sampled),
    ]
    most = max(budget.votes, default=0)
    if most:
        ways.append(Decoding("best-of", f"best of {most} at temperature 1", {"sampling": sampled["sampling"] | {
            "best_of": most,
        }}))  # fmt: skip
    return ways


def _frames(temperature: float) -> Mapping[str, Any]:
    # Only frames are sampled; the answer stays greedy.
    return {"sampling": {"frames": {"temperature": temperature}}}


def steps_of(arm: Arm, budget: Budget, pairs: int) -> int:
    """Return the steps of an arm that trains on ``pairs`` pairs; as many whatever it drops."""
    return max(1, math.ceil(pairs * budget.epochs * arm.share * arm.steps_factor / budget.sentences))


def train_options(arm: Arm, budget: Budget, pairs: int, tokens_per_image: int) -> dict[str, Any]:
    """Return an arm's part of a ``TrainConfig``.

    Args:
        arm: The arm.
        budget: The budget.
        pairs: Training pairs, before any is dropped.
        tokens_per_image: Tokens of a picture.
    """
    steps = steps_of(arm, budget, pairs)
    # In tokens: the query with one example.
    sentence = 2 * arm.pictures * tokens_per_image  # an example chain, and the query's
    noise: JsonObject = dict(arm.noise or {})
    if noise.get("kind") == "own":
        # As many refreshes as the budget says, evenly over the training.
        noise["refresh_tokens"] = max(1, steps * budget.sentences * sentence // (budget.refreshes + 1))
    sentences: dict[str, Any] = {
        "method": arm.method, "lengths": (arm.length,), "pairs": (1,), "validation_split": None,
        "drop_worst": arm.drop_worst, "tasks": budget.tasks,
    }  # fmt: skip
    if noise:
        sentences["frame_noise"] = noise
    return {
        "sentences": sentences,
        "optimizer": {
            "learning_rate": budget.learning_rate, "steps": steps, "batch_tokens": budget.sentences * sentence,
            # A micro-batch holds at least one sentence.
            "micro_batch_tokens": max(4096, sentence),
        },
        "compute": {"deepspeed": "none"},
    }  # fmt: skip


def claims(budget: Budget, backbones: tuple[Backbone, ...]) -> list[ClaimSpec]:
    """Return all claims, group by group."""
    return [*_paper_claims(budget), *_paying_claims(backbones), *_training_claims(), *_form_claims(budget),
            *_decoding_claims(budget)]  # fmt: skip


def _paper_claims(budget: Budget) -> Iterator[ClaimSpec]:
    frames, linear = "Diffused frames beat no frames", "Linear frames beat no frames"
    yield ClaimSpec("diffusion_none", frames, "diffusion", "none", "paper")
    yield ClaimSpec("diffusion_tokens", frames, "diffusion", "none-tokens", "paper", "equal tokens")
    yield ClaimSpec("linear_none", linear, "linear", "none", "paper")
    yield ClaimSpec("linear_tokens", linear, "linear", "none-tokens", "paper", "equal tokens")
    yield ClaimSpec("diffusion_linear", "Diffused frames beat linear ones", "diffusion", "linear", "paper")
    if budget.lengths:
        longest, shortest = max(budget.lengths), min(budget.lengths)
        text = f"Longer chains are better ({longest} against {shortest})"
        yield ClaimSpec("longer", text, f"length-{longest}", f"length-{shortest}", "paper")
    text = "Perplexity falls with diffused frames"
    yield ClaimSpec("perplexity", text, "diffusion", "none", "paper", metric="perplexity_own")


def _paying_claims(backbones: tuple[Backbone, ...]) -> Iterator[ClaimSpec]:
    yield ClaimSpec("best_none", "The best chains beat no frames", BEST, "none", "pays")
    yield ClaimSpec("best_tokens", "The best chains beat no frames", BEST, "none-tokens", "pays", "equal tokens")
    yield ClaimSpec("best_copy", "The best chains beat copies of the query", BEST, "copy", "pays")
    yield ClaimSpec("best_coarse", "The best chains beat coarse labels", BEST, "coarse", "pays")
    text = "Coarse labels, own ones in the context, beat no frames"
    yield ClaimSpec("coarse_own", text, "coarse-own", "none", "pays")
    for backbone in backbones[1:]:
        name = backbone.name
        for arm, what in (("diffusion", "diffused frames"), ("own", "own frames in the context")):
            text = f"On {name}: {what} beat no frames"
            yield ClaimSpec(f"{name}_{arm}", text, f"{name}-{arm}", f"{name}-none", "pays")


def _training_claims() -> Iterator[ClaimSpec]:
    yield ClaimSpec("own_clean", "Own frames in the context beat the dataset's", "own", "diffusion", "training")
    text = "Own frames in the context lower the perplexity"
    yield ClaimSpec("own_clean_perplexity", text, "own", "diffusion", "training", metric="perplexity_own")
    for name in NOISES:
        if name != "own":
            text = f"Frames with noise of the kind {name} beat clean ones"
            yield ClaimSpec(f"noise_{name}", text, name, "diffusion", "training")
    text = "Without the worst fifth of the chains answers are better"
    yield ClaimSpec("dropped", text, "best-chains", "diffusion", "training")


def _form_claims(budget: Budget) -> Iterator[ClaimSpec]:
    for name, spacing in budget.spacings.items():
        where = "in even steps of the path" if isinstance(spacing, str) else f"at {_alphas(spacing)}"
        text = f"Frames {where} beat those at 1/3 and 2/3"
        yield ClaimSpec(f"spacing_{name}", text, name, "diffusion", "form")
    text = "A length for every task beats one for all"
    yield ClaimSpec("adaptive", text, ADAPTIVE, "diffusion", "form")


def _decoding_claims(budget: Budget) -> Iterator[ClaimSpec]:
    """Yield the claims on ways to decode. An arm's name is that of its training, a slash and how it is decoded."""
    for way in decodings(budget):
        text = f"Of the best chains: {way.about} beats greedy"
        yield ClaimSpec(f"decoding_{way.name}", text, f"{BEST}/{way.name}", BEST, "decoding", "one training")
    for votes in budget.votes:
        chains = f"{BEST}/votes of {votes}"
        text = f"Votes of {votes} chains beat votes of {votes} plain answers"
        yield ClaimSpec(f"votes_{votes}", text, chains, f"none/votes of {votes}", "decoding", "equal samples")
        text = f"Votes of {votes} chains beat plain votes of as many tokens"
        plain = f"none/votes of as many tokens as {votes}"
        yield ClaimSpec(f"votes_{votes}_tokens", text, chains, plain, "decoding", "equal tokens")
        text = f"Votes of {votes} chains beat one greedy plain answer"
        yield ClaimSpec(f"votes_{votes}_greedy", text, chains, "none", "decoding")
