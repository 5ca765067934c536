"""``covray experiments claims --budget``: build, train and evaluate the arms; resumed after any kill.

    scenes -> chains, by dataset -> every arm and seed: train, evaluate -> the best chains: decodings, votes -> page

It drives the steps that a user would: what is done lies in their folders, and an arm that is done is one file,
``arms/NAME-sSEED.json``. ``covray report`` writes the page from the arms that are done so far.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from covray.chains.dataset import ChainDataset
from covray.chains.records import Audit
from covray.config import BackboneConfig, BuildConfig, EngineConfig, EvaluateConfig, TokenizerConfig, TrainConfig
from covray.errors import ConfigError, one_line
from covray.evaluation.claims.records import ArmRun, ProgrammeRecord
from covray.evaluation.records import EvaluationResults
from covray.io.storage import Folder
from covray.models.lvm.backbone import backbone_facts
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs
from covray.progress import stage
from covray.recipes.claims_plan import (
    BUDGETS,
    Arm,
    Backbone,
    Budget,
    BudgetName,
    Dataset,
    Decoding,
    arms,
    datasets,
    decodings,
    train_options,
)
from covray.recipes.claims_scores import EvaluationFolder, best_chains
from covray.tasks import TASKS
from covray.training.records import TrainResult

PROBES = ("reference", "other", "copy", "dummy", "last_frame", "nats", "gain")
UNTUNED = "untuned"
_SCENE_SEED = 1
"""Other scenes than those of seed 0, which the nano models were pre-trained on."""
_QUIET = {"uri": "none"}


@dataclass(frozen=True)
class Steps:
    """The steps that a programme drives."""

    build: Callable[[BuildConfig], Audit]
    train: Callable[[TrainConfig], TrainResult]
    evaluate: Callable[[EvaluateConfig], EvaluationResults]
    hardware: Callable[[], str]


def real_steps() -> Steps:
    """Return the steps of the commands ``covray build``, ``train`` and ``evaluate``."""
    from covray.distributed.benchmark import hardware  # here: Ray takes seconds to import
    from covray.distributed.build import build
    from covray.distributed.evaluate import evaluate
    from covray.distributed.train import train

    return Steps(build, train, evaluate, hardware)


@dataclass(frozen=True)
class Programme:
    """A programme in its folder."""

    out: str
    record: ProgrammeRecord
    budget: Budget
    backbones: tuple[Backbone, ...]
    steps: Steps | None = None
    """None: to read only."""

    @property
    def folder(self) -> Folder:
        """Its folder."""
        return Folder(self.out)

    @property
    def arms(self) -> list[Arm]:
        """All arms; the best chains with every seed, once they are known."""
        best = self.best
        listed = []
        for arm in arms(self.budget, self.backbones):
            # The best chains decide most claims, and are trained with every seed like the main arms.
            if arm.name == best:
                arm = replace(arm, seeds=self.budget.seeds)
            listed.append(arm)
        return listed

    @property
    def best(self) -> str | None:
        """The arm of chains with the best answers on the validation split; None while some are not evaluated there."""
        validated = {}
        for arm in arms(self.budget, self.backbones):
            if arm.chosen_from:
                validated[arm.name] = self.evaluation(arm.name, self.budget.seeds[0], "val")
        return best_chains(validated, reference="none")

    def evaluation(self, arm: str, seed: int, split: str = "test") -> EvaluationFolder:
        """Return the evaluation of an arm and a seed."""
        ending = "" if split == "test" else f"-{split}"
        return EvaluationFolder(self.folder.join("evaluations", f"{arm}-s{seed}{ending}"), arm, seed)

    def run_folder(self, arm: str, seed: int) -> str:
        """Return the run folder of an arm and a seed."""
        return self.folder.join("runs", f"{arm}-s{seed}")

    def chains(self, dataset: str) -> str:
        """Return the folder of a dataset."""
        return self.folder.join("chains", dataset)

    def done(self, arm: str, seed: int) -> ArmRun | None:
        """Return how an arm went; None where it is not done."""
        return ArmRun.read_if_present(self.folder, f"arms/{arm}-s{seed}.json")

    def chosen(self, names: Sequence[str]) -> list[Arm]:
        """Return the arms of ``names``, or all for none. Raises ConfigError for a name that no arm has."""
        planned = arms(self.budget, self.backbones)
        known = [arm.name for arm in planned]
        for name in names:
            if name not in known:
                raise ConfigError(f"--arm {name}: is not an arm of this programme; give one of {', '.join(known)}")
        return [arm for arm in planned if not names or arm.name in names]

    def work(self, names: Sequence[str] = ()) -> None:
        """Do everything that is not done; with ``names`` only these arms, and what they need."""
        chosen = self.chosen(names)
        manifest = self._render()
        needed = {"main"}
        for arm in chosen:
            needed.add(arm.dataset)
        for dataset in datasets(self.budget):
            if dataset.name in needed:
                self._build(dataset, manifest)
        self._evaluate_untuned()
        for arm in chosen:
            for seed in arm.seeds:
                self._run(arm, seed)
        if names:
            return
        # Only now is it known which arm of chains is the best on the validation split.
        best = next(arm for arm in self.arms if arm.name == self.best)
        for seed in best.seeds:
            self._run(best, seed)
        self._decode(best)

    # --- data ---

    def _render(self) -> str:
        """Write the manifest of the scenes, unless it is there; return its path."""
        manifest = Path(self.out, "pairs.parquet")
        if manifest.exists():
            return str(manifest)
        try:
            with stage("rendering the scenes"), ManifestWriter(manifest) as writer:
                # Shares of scenes: scene_pairs takes them as parts of their sum.
                scenes = self.budget.scenes
                splits = {name: float(count) for name, count in scenes.items()}
                tasks = self.budget.tasks or tuple(TASKS)
                for pair in scene_pairs(sum(scenes.values()), tasks, seed=_SCENE_SEED, splits=splits):
                    writer.add(pair)
        except OSError as error:
            raise ConfigError(
                f"--out {self.out}: cannot be written ({one_line(error)}); give another folder"
            ) from error
        return str(manifest)

    def _build(self, dataset: Dataset, manifest: str) -> None:
        """Build a dataset; all but the first take the noise of the first."""
        assert self.steps is not None
        options = {
            "pairs": manifest, "out": self.chains(dataset.name), "check_endpoints": 0.0,
            "prior": {"steps": self.budget.prior_steps}, "tokenizer": {"path": self.record.tokenizer},
        }  # fmt: skip
        if dataset.name == "main":
            options["keep_noise"] = True
        else:
            # The batch, too, is the one that the noise was inverted in.
            main = ChainDataset(self.chains("main"))
            options |= {"noise_from": main.path, "engine": {"batch": main.config["engine"]["batch"]}}
        self.steps.build(BuildConfig.model_validate(options | dataset.build_options()))

    # --- arms ---

    def _run(self, arm: Arm, seed: int) -> None:
        """Train and evaluate an arm, and write down what it took."""
        assert self.steps is not None
        # An arm is done when its file is there, which is written last.
        if self.done(arm.name, seed) is not None:
            return
        data = ChainDataset(self.chains("main"))
        # Counted before any are dropped: an arm without the worst chains takes as many steps.
        pairs = len(data.table(["pair_id"], self.budget.tasks, "train"))
        options = train_options(arm, self.budget, pairs, data.tokens_per_image)
        config = TrainConfig.model_validate(
            {
                "data": self.chains(arm.dataset), "out": self.run_folder(arm.name, seed), "seed": seed,
                "backbone": (arm.backbone or self.backbones[0]).config(), "tracking": _QUIET, **options,
            }
        )  # fmt: skip
        trained = self.steps.train(config)
        seconds = self._evaluate(arm, seed, "test", self.budget.episodes)
        # Chosen on another split than claims are made on.
        if arm.chosen_from and seed == self.budget.seeds[0]:
            seconds += self._evaluate(arm, seed, "val", self.budget.validation_episodes)
        ArmRun(
            arm=arm.name,
            seed=seed,
            steps=trained.steps,
            tokens=trained.tokens,
            answers=trained.sentences,
            train_seconds=trained.seconds,
            evaluate_seconds=seconds,
            hardware=self.steps.hardware(),
        ).write(self.folder, f"arms/{arm.name}-s{seed}.json")

    def _evaluate(self, arm: Arm, seed: int, split: str, episodes: int) -> float:
        """Evaluate an arm on a split; return the seconds it took."""
        assert self.steps is not None
        folder = self.evaluation(arm.name, seed, split)
        options = {
            "data": self.chains(arm.dataset), "out": folder.path, "split": split, "episodes": episodes,
            "adapters": (f"{arm.name}={self.run_folder(arm.name, seed)}",), "untuned": False, "baselines": (),
            "probes": () if arm.method == "none" else PROBES, "tracking": _QUIET, "tasks": self.budget.tasks,
        }  # fmt: skip
        return self.steps.evaluate(EvaluateConfig.model_validate(options)).seconds

    def _evaluate_untuned(self) -> None:
        """Evaluate the backbones without training, and the answers without a model beside the first."""
        assert self.steps is not None
        for number, backbone in enumerate(self.backbones):
            options = {
                "data": self.chains("main"), "out": self.evaluation(f"{UNTUNED}-{backbone.name}", -1).path,
                "backbone": backbone.config(), "episodes": self.budget.episodes, "tracking": _QUIET,
                "baselines": ("copy", "mean", "nearest", "ceiling") if number == 0 else (),
                "forms": ({"method": "none", "length": 2, "pairs": 1},), "tasks": self.budget.tasks,
            }  # fmt: skip
            self.steps.evaluate(EvaluateConfig.model_validate(options))

    # --- ways to write answers ---

    def _decode(self, best: Arm) -> None:
        """Evaluate the ways to write answers, of the best chains and of plain pairs; votes of both together."""
        assert self.steps is not None
        for seed in best.seeds:
            for way in ways_of(self.budget):
                adapters = [f"best={self.run_folder(best.name, seed)}"]
                # Votes over chains and over plain answers are compared, so that they are evaluated together.
                if way.name == "votes":
                    adapters.append(f"none={self.run_folder('none', seed)}")
                options = {
                    "data": self.chains(best.dataset), "out": self.evaluation(f"decoding-{way.name}", seed).path,
                    "adapters": tuple(adapters), "untuned": False, "baselines": (), "tracking": _QUIET,
                    "episodes": self.budget.episodes, "tasks": self.budget.tasks, **way.options,
                }  # fmt: skip
                self.steps.evaluate(EvaluateConfig.model_validate(options))


def ways_of(budget: Budget) -> Iterator[Decoding]:
    """Yield the ways to write answers, votes last."""
    yield from decodings(budget)
    if budget.votes:
        yield Decoding("votes", "votes over chains and over plain answers", {"votes": {"samples": budget.votes}})


def open_programme(out: str, name: BudgetName, backbones: Sequence[str], tokenizer: str) -> Programme:
    """Return the programme of a budget in the folder ``out``; nothing is written.

    Args:
        out: The folder.
        name: Of the budget.
        backbones: ``NAME=PATH`` each.
        tokenizer: Of all backbones, as ``tokenizer.path`` takes it.

    Raises:
        ConfigError: A backbone cannot be used, or two have one name.
    """
    listed = tuple(map(_backbone, backbones))
    names = {backbone.name for backbone in listed}
    if len(names) < len(listed):
        raise ConfigError("--backbone: two have one name; give each its own, as NAME=PATH")
    record = ProgrammeRecord(
        budget_name=name,
        budget=json.loads(json.dumps(asdict(BUDGETS[name]))),  # as the file gives it back: lists for tuples
        backbones=[{"name": backbone.name, "path": backbone.path} for backbone in listed],
        tokenizer=tokenizer,
    )
    return Programme(out, record, BUDGETS[name], listed)


def _backbone(entry: str) -> Backbone:
    """Return the backbone of ``NAME=PATH``, once its folder is known to be one. Raises CovrayError."""
    name, separator, path = entry.partition("=")
    if not (separator and path) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ConfigError(f"--backbone {entry}: give NAME=PATH, a name of small letters, digits, dots and hyphens")
    backbone = Backbone(name, path)
    backbone_facts(BackboneConfig.model_validate(backbone.config()))
    return backbone


def read_programme(out: str) -> Programme:
    """Return the programme that was begun in the folder ``out``. Raises ConfigError for none."""
    record = ProgrammeRecord.read(out)
    budget = TypeAdapter(Budget).validate_python(record.budget)  # JSON has lists where the budget has tuples
    backbones = [Backbone(**each) for each in record.backbones]
    return Programme(out, record, budget, tuple(backbones))


@dataclass(frozen=True)
class PlannedArm:
    """What an arm would take."""

    arm: str
    about: str
    seeds: int
    steps: int
    """Of one seed."""
    tokens: int
    """Of all seeds."""


@dataclass(frozen=True)
class ProgrammePlan:
    """What a programme would take, but for the best chains, which are not known yet."""

    arms: tuple[PlannedArm, ...]
    tokens: int


def plan_programme(programme: Programme, names: Sequence[str] = ()) -> ProgrammePlan:
    """Return every arm, or those of ``names``, with its steps and its tokens over all seeds."""
    budget = programme.budget
    tasks = TASKS if budget.tasks is None else budget.tasks
    pairs = budget.scenes["train"] * len(tasks)
    tokenizer = load_tokenizer(TokenizerConfig(path=programme.record.tokenizer), EngineConfig())
    listed = []
    for arm in programme.chosen(names):
        options = train_options(arm, budget, pairs, tokenizer.tokens_per_image)["optimizer"]
        tokens = options["steps"] * options["batch_tokens"] * len(arm.seeds)
        listed.append(PlannedArm(arm.name, arm.about, len(arm.seeds), options["steps"], tokens))
    return ProgrammePlan(tuple(listed), sum(arm.tokens for arm in listed))
