"""What a programme of claims says so far, from the arms that are done."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from covray.chains.dataset import ChainDataset
from covray.chains.quality import chain_quality
from covray.config import BackboneConfig
from covray.evaluation.claims.arms import (
    ArmScores,
    Comparison,
    compare,
    compare_gains,
    joined,
    primary_metrics,
    rank_correlation,
)
from covray.evaluation.claims.records import (
    ArmEntry,
    ClaimResult,
    ClaimTask,
    ClaimVerdict,
    CurvePoint,
    Exposure,
    ProgrammeResults,
    QualityWorth,
)
from covray.evaluation.metrics import OWN, REFERENCE
from covray.evaluation.probes import GAIN_OWN, GAIN_REFERENCE
from covray.evaluation.records import EvaluationResults
from covray.models.lvm.backbone import backbone_facts
from covray.models.lvm.scales import parameters
from covray.recipes.claims_plan import ADAPTIVE, BEST, Arm, Backbone, ClaimSpec, claims
from covray.recipes.claims_run import UNTUNED, Programme, ways_of
from covray.recipes.claims_scores import best_by_task, scores_of

SMALL_EXPOSURE_NATS = 0.1
"""Below it the exposure to own frames counts as closed."""
NO_GAIN_PERCENT = 0.5
"""A gain whose interval lies below it counts as none."""


def summarize(programme: Programme) -> ProgrammeResults:
    """Return the results of a programme."""
    return _Summary(programme).results()


@dataclass(frozen=True, eq=False)
class _Summary:
    """The scores of a programme, read once."""

    programme: Programme

    def results(self) -> ProgrammeResults:
        """Return all results."""
        programme = self.programme
        arms = list(self._arms.values())
        claim_results = []
        for spec in claims(programme.budget, programme.backbones):
            claim_results.append(self._claim(spec))
        claim_results += self._size_claims()
        entries = tuple(map(self._entry, arms))
        exposure = tuple(self._exposures())
        hours = sum(entry.train_hours + entry.evaluate_hours for entry in entries)
        return ProgrammeResults(
            budget_name=programme.record.budget_name,
            budget=programme.record.budget,
            backbones=programme.record.backbones,
            arms_done=sum(len(entry.seeds) for entry in entries),
            arms_planned=sum(len(arm.seeds) for arm in arms),
            conclusion=conclusion(claim_results, exposure, self._best),
            best=self._best,
            lengths=self._lengths,
            claims=tuple(claim_results),
            arms=entries,
            curves=tuple(self._curves()),
            exposure=exposure,
            quality=tuple(self._quality()),
            hours=hours + self._other_hours(),
        )

    @functools.cached_property
    def _best(self) -> str | None:
        return self.programme.best

    @functools.cached_property
    def _arms(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.programme.arms}

    @functools.cache  # noqa: B019 - the summary lives for one report
    def _scores(self, name: str) -> ArmScores | None:
        """Return the scores of an arm by its name in a claim; None where it is not done."""
        programme = self.programme
        # A claim may also name the best arm, the best length of each task, or a way of decoding.
        if name == BEST:
            if self._best is None:
                return None
            return self._scores(self._best)
        if name == ADAPTIVE:
            return self._adaptive()
        whose, _, way = name.partition("/")
        if way:
            return self._decoded(whose, way)
        arm = self._arms[name]
        evaluations = []
        for seed in arm.seeds:
            if programme.done(name, seed) is not None:
                evaluations.append(programme.evaluation(name, seed))
        return scores_of(evaluations)

    @functools.cached_property
    def _untuned(self) -> ArmScores | None:
        """The first backbone without training and frames."""
        folder = self.programme.evaluation(f"{UNTUNED}-{self.programme.backbones[0].name}", -1)
        if not folder.finished:
            return None
        subjects = EvaluationResults.read(folder.path).subjects
        name = next(subject.name for subject in subjects if subject.kind == "untuned")
        return scores_of([folder], name)

    def _decoded(self, whose: str, way: str) -> ArmScores | None:
        """Return the scores of a way to write answers, such as ``frames-1`` or ``votes of as many tokens as 8``."""
        programme = self.programme
        if self._best is None:
            return None
        folder, subject = f"decoding-{way}", whose
        if way.startswith("votes of "):
            # A sample of chains writes as many pictures as a chain has after its query: so many plain samples cost
            # the same.
            count = int(way.rpartition(" ")[2])
            if "as many tokens" in way:
                count *= self._arms[self._best].pictures - 1
            folder, subject = "decoding-votes", f"{whose}, votes of {count}"
        evaluations = [programme.evaluation(folder, seed) for seed in self._arms[self._best].seeds]
        return scores_of(evaluations, subject)

    # --- lengths ---

    @functools.cached_property
    def _by_length(self) -> dict[str, int]:
        """The arms that differ in the length of their chains alone, with it."""
        lengths = {"none": 2, "diffusion": self._arms["diffusion"].length}
        for length in self.programme.budget.lengths:
            lengths[f"length-{length}"] = length
        return lengths

    @functools.cached_property
    def _best_arms(self) -> dict[str, str]:
        """The arm of the best length of each task, chosen on the validation split."""
        candidates = {}
        for name in self._by_length:
            scores = scores_of([self.programme.evaluation(name, self.programme.budget.seeds[0], "val")])
            if scores is None:
                # Nothing is chosen until all candidates are evaluated: a choice among some would be another one
                # later.
                return {}
            candidates[name] = scores
        return best_by_task(candidates)

    @property
    def _lengths(self) -> dict[str, int]:
        return {task: self._by_length[name] for task, name in self._best_arms.items()}

    def _adaptive(self) -> ArmScores | None:
        """Return the arm that has of every task the scores of its best length."""
        # Lengths other than the main one are trained with the first seed only.
        seed, arm_by_task = self.programme.budget.seeds[0], {}
        for task, name in self._best_arms.items():
            scores = self._scores(name)
            if scores is None:
                return None
            arm_by_task[task] = ArmScores({seed: scores.by_seed[seed]})
        return joined(arm_by_task) if arm_by_task else None

    # --- parts of the results ---

    def _claim(self, spec: ClaimSpec) -> ClaimResult:
        """Return what came of a claim."""
        metric = spec.metric if spec.metric != "primary" else None
        return self._result(spec, self._compare(spec.first, spec.second, metric))

    def _size_claims(self) -> Iterator[ClaimResult]:
        """Yield whether the smaller of two backbones gains more by chains."""
        first, *others = self.programme.backbones
        for other in others:
            smaller, larger = sorted((first, other), key=_parameters)
            # Of equal backbones neither is the smaller one.
            if _parameters(smaller) == _parameters(larger):
                continue
            for arm in ("diffusion", "own"):
                ours, theirs = self._prefix(smaller), self._prefix(larger)
                gains_over = (f"{ours}{arm}", f"{ours}none"), (f"{theirs}{arm}", f"{theirs}none")
                comparison = self._compare_gains(*gains_over)
                spec = ClaimSpec(
                    f"smaller_{other.name}_{arm}",
                    f"The smaller backbone, {smaller.name}, gains more by {arm} than {larger.name}",
                    f"{ours}{arm} over {ours}none",
                    f"{theirs}{arm} over {theirs}none",
                    "paper",
                    "gains",
                )
                yield self._result(spec, comparison)

    def _prefix(self, backbone: Backbone) -> str:
        """Return how the names of a backbone's arms begin: only the first backbone's have no prefix."""
        if backbone is self.programme.backbones[0]:
            return ""
        return f"{backbone.name}-"

    def _compare_gains(self, ours: tuple[str, str], theirs: tuple[str, str]) -> Comparison | None:
        """Compare the gains of two pairs: an arm, and the one that it gains over. None until all four are done."""
        first, first_base = self._scores(ours[0]), self._scores(ours[1])
        second, second_base = self._scores(theirs[0]), self._scores(theirs[1])
        if first is None or first_base is None or second is None or second_base is None:
            return None
        return compare_gains((first, first_base), (second, second_base), primary_metrics(first.tasks))

    def _result(self, spec: ClaimSpec, comparison: Comparison | None) -> ClaimResult:
        """Return a claim with what came of it."""
        # What stands here is shown as "not run" until both arms are done.
        result = ClaimResult(
            key=spec.key, claim=spec.claim, group=spec.group, view=spec.view, first=self._name(spec.first),
            second=self._name(spec.second), metric=spec.metric, gain_percent=None, low=None, high=None, seeds=0,
            queries=0, verdict="not run", tasks=(),
        )  # fmt: skip
        if comparison is None:
            return result
        tasks = []
        for row in comparison.rows:
            tasks.append(
                ClaimTask(
                    task=row.task, metric=row.metric, first=row.first, second=row.second,
                    difference=row.difference.value, low=row.difference.low, high=row.difference.high,
                    better=row.better,
                )
            )  # fmt: skip
        reached: dict[str, Any] = {
            "seeds": comparison.seeds, "queries": comparison.queries, "tasks": tuple(tasks),
            "verdict": _verdict(comparison),
        }  # fmt: skip
        gain = comparison.gain
        if gain is not None:
            reached |= {"gain_percent": gain.value, "low": gain.low, "high": gain.high}
        return result.model_copy(update=reached)

    def _name(self, name: str) -> str:
        """Return an arm's name for people: which arm the best one is."""
        best = self._best
        whose, separator, way = name.partition("/")
        if whose != BEST or best is None:
            return name
        return f"{best}{separator}{way}"

    def _compare(self, first: str, second: str, metric: str | None = None) -> Comparison | None:
        """Compare two arms by their tasks' first metrics, or by one ``metric`` of all tasks."""
        ours, theirs = self._scores(first), self._scores(second)
        if ours is None or theirs is None:
            return None
        return _compared(ours, theirs, metric)

    def _entry(self, arm: Arm) -> ArmEntry:
        """Return an arm with what it took."""
        runs = []
        for seed in arm.seeds:
            run = self.programme.done(arm.name, seed)
            if run is not None:
                runs.append(run)
        scores = None
        steps = tokens = answers = None
        if runs:
            # Every seed takes as many steps: the first run says it for all.
            scores = self._scores(arm.name)
            steps, tokens, answers = runs[0].steps, runs[0].tokens, runs[0].answers
        gain = self._gain(scores)
        means: dict[str, float | None] = {}
        if scores is not None:
            for task, metric in primary_metrics(scores.tasks).items():
                means[task] = scores.mean(task, metric)
        return ArmEntry(
            name=arm.name, about=arm.about, method=arm.method, length=arm.pictures,
            share=arm.share,
            seeds=tuple(run.seed for run in runs),
            steps=steps, tokens=tokens, answers=answers,
            train_hours=sum(run.train_seconds for run in runs) / 3600,
            evaluate_hours=sum(run.evaluate_seconds for run in runs) / 3600,
            hardware=tuple(dict.fromkeys(run.hardware for run in runs)),
            gain_percent=gain[0], low=gain[1], high=gain[2], perplexity_own=_perplexity(scores), scores=means,
        )  # fmt: skip

    def _gain(self, scores: ArmScores | None) -> tuple[float | None, float | None, float | None]:
        """Return the gain in percent over the untuned backbone, with its bounds."""
        if scores is None or self._untuned is None:
            return None, None, None
        comparison = _compared(scores, self._untuned, None)
        if comparison is None or comparison.gain is None:
            return None, None, None
        return comparison.gain.value, comparison.gain.low, comparison.gain.high

    def _curves(self) -> Iterator[CurvePoint]:
        """Yield the points of the learning curves, each ending in an arm with all queries."""
        seed = self.programme.budget.seeds[0]
        for whole in ("none", "linear", "diffusion", "own"):
            parts_of_queries = [f"{whole}-{share:g}" for share in sorted(self.programme.budget.shares)]
            for name in (*parts_of_queries, whole):
                run, scores = self.programme.done(name, seed), self._scores(name)
                if run is None or scores is None:
                    continue
                # A curve is of one seed: take that seed alone where the arm has several.
                only = ArmScores({seed: scores.by_seed[seed]})
                value, low, high = self._gain(only)
                if value is not None:
                    yield CurvePoint(
                        arm=whole, answers=run.answers, tokens=run.tokens, gain_percent=value, low=low, high=high,
                        perplexity_own=_perplexity(only),
                    )  # fmt: skip

    def _exposures(self) -> Iterator[Exposure]:
        """Yield where every arm of chains loses likelihood, over the arm without frames."""
        plain = self._scores("none")
        if plain is None:
            return
        for name, arm in self._arms.items():
            scores = self._scores(name)
            # Arms of other backbones or of a part of the queries have another arm without frames to be compared with.
            if scores is None or arm.method == "none" or arm.share != 1.0 or arm.backbone is not None:
                continue
            for task in scores.tasks:
                own, reference, none = scores.mean(task, OWN), scores.mean(task, REFERENCE), plain.mean(task, OWN)
                if own is not None and reference is not None and none is not None:
                    yield Exposure(arm=name, task=task, unlearnt=reference - none, exposure=own - reference)

    def _quality(self) -> Iterator[QualityWorth]:
        """Yield how the quality of the queries' chains goes with what their frames are worth to the diffused arm."""
        scores = self._scores("diffusion")
        if scores is None:
            return
        quality: dict[int, float] = {}
        for row in ChainDataset(self.programme.chains("main")).rows(["pair_id", "quality"], split="test"):
            value = chain_quality(row["quality"])
            if value is not None:
                quality[row["pair_id"]] = value
        values = scores.by_seed[min(scores.by_seed)]
        for task in scores.tasks:
            for worth in (GAIN_REFERENCE, GAIN_OWN):
                estimate = rank_correlation(quality, values.get((task, worth), {}))
                if estimate is not None:
                    yield QualityWorth(
                        task=task, worth=worth, correlation=estimate.value, low=estimate.low, high=estimate.high
                    )

    def _other_hours(self) -> float:
        """Return the hours of evaluations that are of no single arm."""
        # Without training, and by decoding: neither is in the hours of an arm.
        programme, seconds = self.programme, 0.0
        folders = []
        for backbone in programme.backbones:
            folders.append(programme.evaluation(f"{UNTUNED}-{backbone.name}", -1))
        for way in ways_of(programme.budget):
            for seed in programme.budget.seeds:
                folders.append(programme.evaluation(f"decoding-{way.name}", seed))
        for folder in folders:
            if folder.finished:
                seconds += EvaluationResults.read(folder.path).seconds
        return seconds / 3600


def conclusion(results: Sequence[ClaimResult], exposure: Sequence[Exposure], best: str | None) -> str:
    """Return in one sentence whether chains pay.

    They do where the best chains beat no frames and copies of the query; they do not where the gain over no frames lies
    below ``NO_GAIN_PERCENT`` although the exposure to own frames is closed. All else is not decided.
    """
    by_key = {result.key: result for result in results}
    none, tokens, copy = by_key["best_none"], by_key["best_tokens"], by_key["best_copy"]
    if none.gain_percent is None:
        return "Not decided: the arms that decide are not done."
    gain = f"the best chains ({best}) against no frames: {_figures(none)}"
    if none.verdict == "holds" and copy.verdict == "holds":
        at_tokens = "also" if tokens.verdict == "holds" else "not"
        return f"Chains pay here: {gain}; against copies of the query {_figures(copy)}; {at_tokens} at equal tokens."
    if none.verdict == "holds":
        return f"Computation pays here, frames are not shown to: {gain}; against copies of the query {_figures(copy)}."
    # Closed: the answers lose next to no likelihood by the model's own frames, so that frames had their chance.
    of_best = [entry.exposure for entry in exposure if entry.arm == best]
    closed = bool(of_best) and sum(of_best) / len(of_best) < SMALL_EXPOSURE_NATS
    if closed and none.high is not None and none.high < NO_GAIN_PERCENT:
        return f"Chains do not pay here, although own frames cost no likelihood any more: {gain}."
    if none.verdict == "does not hold":
        return f"Chains make answers worse here: {gain}; own frames still cost likelihood."
    return f"Not decided: {gain}."


def _parameters(backbone: Backbone) -> int:
    return parameters(backbone_facts(BackboneConfig.model_validate(backbone.config())).llama)


def _figures(result: ClaimResult) -> str:
    if result.gain_percent is None:
        return "not run"
    if result.low is None or result.high is None:
        return f"{result.gain_percent:+.1f}%"
    return f"{result.gain_percent:+.1f}% [{result.low:+.1f}, {result.high:+.1f}]"


def _compared(first: ArmScores, second: ArmScores, metric: str | None) -> Comparison | None:
    # Arms of a part of the tasks are compared on the tasks that both have.
    tasks = [task for task in first.tasks if task in second.tasks]
    metrics = primary_metrics(tasks) if metric is None else dict.fromkeys(tasks, metric)
    return compare(first, second, metrics)


def _verdict(comparison: Comparison) -> ClaimVerdict:
    if comparison.gain is None:
        return "not run"
    gain = comparison.gain
    # An interval that holds zero decides nothing, whatever its middle.
    if gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
        return "open"
    return "holds" if gain.low > 0 else "does not hold"


def _perplexity(scores: ArmScores | None) -> float | None:
    """Return the geometric mean over tasks of the perplexity after own frames."""
    if scores is None:
        return None
    known = []
    for task in scores.tasks:
        nats = scores.mean(task, OWN)
        if nats is not None:
            known.append(nats)
    if not known:
        return None
    return math.exp(sum(known) / len(known))


def to_markdown(results: ProgrammeResults) -> str:
    """Return the claims as the table of docs/results.md."""
    lines = ["| | what is equal | gain, 95% | seeds, queries | |", "|---|---|---|---|---|"]
    for result in results.claims:
        if result.verdict != "not run":
            lines.append(
                f"| {result.claim} | {result.view} | {_figures(result)} | {result.seeds}, {result.queries} | "
                f"{result.verdict} |"
            )
    return "\n".join([*lines, "", results.conclusion, ""])
