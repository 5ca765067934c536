"""The programme of block diffusion: what is trained and asked, and the tables that it makes of the answers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from covray.config.vlm import VlmEvaluateConfig, VlmTrainConfig
from covray.errors import ConfigError
from covray.evaluation.records import VlmEvaluationResults
from covray.evaluation.vision_text import Row, row_lines, summarize_rows
from covray.models.vlm.decoding import decoding_blocks
from covray.recipes import diffusionvl, diffusionvl_tables
from covray.training.objectives.vision_text import blocks_of

BUDGET = replace(diffusionvl.BUDGETS["full"], seeds=(0, 1), prompts=4)


class Commands:
    """``covray vlm train`` and ``evaluate`` in a moment: answers of blocks are right where a pass writes a token."""

    def __init__(self) -> None:
        self.trained: dict[str, VlmTrainConfig] = {}
        self.evaluated: dict[str, VlmEvaluateConfig] = {}

    def train(self, config: VlmTrainConfig) -> None:
        assert self.trained.setdefault(config.out, config) == config, "two trainings in a folder"
        Path(config.out).mkdir(parents=True, exist_ok=True)
        record = json.dumps({"step": 1, "answer_nelbo_perplexity": 2.0})
        Path(config.out, "metrics.jsonl").write_text(f"{record}\n" if config.objective == "block_diffusion" else "")

    def evaluate(self, config: VlmEvaluateConfig) -> VlmEvaluationResults:
        assert self.evaluated.setdefault(config.out, config) == config, "two evaluations in a folder"
        training = self.trained[str(config.run)]
        uses_blocks = training.objective == "block_diffusion"
        blocks = decoding_blocks(config.decoding, blocks_of(training) if uses_blocks else None)
        size = 1 if blocks is None else blocks.size
        passes = config.decoding.passes or size
        right = passes == size
        rows = []
        for number in range(4):
            answer = "red" if right or number else "blue"
            is_caption = number > 1
            rows.append(
                Row(
                    number=number,
                    kind="caption" if is_caption else "colour",
                    prompt="?",
                    expected="red",
                    answer=answer,
                    right=None if is_caption else answer == "red",
                    facts={"colour": answer == "red"} if is_caption else None,
                    log_likelihood=-1.0,
                    likelihood_tokens=1,
                    tokens=size,
                    passes=passes,
                    seconds=passes * (1 if config.decoding.cache else 3),
                )
            )
        results = summarize_rows(rows)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        Path(config.out, "answers.jsonl").write_text("\n".join(row_lines(rows)))
        results.write(config.out)
        return results


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(diffusionvl, "train_vlm", made.train)
    monkeypatch.setattr(diffusionvl, "evaluate_vlm", made.evaluate)
    monkeypatch.setattr(diffusionvl, "ray_session", lambda: nullcontext(1))
    monkeypatch.setitem(diffusionvl.BUDGETS, "full", BUDGET)
    return made


def test_all_are_tuned_on_the_same_samples_and_held_against_the_twin(commands: Commands, tmp_path: Path) -> None:
    samples = 8000 * diffusionvl.BATCH
    results = diffusionvl.run_diffusionvl(str(tmp_path), "model", "words.parquet", pretrained_samples=samples)
    steps = {Path(run).name: config.optimizer.steps for run, config in commands.trained.items()}
    others = {"data-1-percent-0": 80, "data-20-percent-0": 1600}
    assert {name: taken for name, taken in steps.items() if name in others} == others
    assert {taken for name, taken in steps.items() if name not in others} == {400}, "5% of 8,000 steps"
    for out, config in commands.trained.items():
        assert config.seed == int(out[-1])
        assert config.optimizer.batch_samples == diffusionvl.BATCH
    quality = {line.passes: line for line in results.quality}
    of_questions = {passes: line.differences["questions"] for passes, line in quality.items()}
    assert of_questions[8].mean == 0
    assert of_questions[4].mean == -0.5, "one of two questions, by both seeds"
    assert quality[4].tokens_per_pass == 2
    speeds = {line.decoder: line.over_autoregressive for line in results.speed}
    assert speeds["autoregressive"] == 1
    assert speeds["blocks of 8 in 2"] == 4
    assert speeds["full sequence, no cache"] == pytest.approx(1 / 3)
    names = [line.variant for line in results.ablations]
    assert {"blocks", "size 4", "size 16", "size 32", "clean half by blocks", "not shifted", "diffusionvl"} < set(names)
    assert all(line.nelbo_perplexity == 2 for line in results.ablations)
    assert list(results.claims.values()) == [True, True, True, True]
    worse = replace(of_questions[8], low=-0.3, high=-0.1)
    differences = quality[8].differences | {"facts": worse, "chrf": None}
    lines = [quality[8].model_copy(update={"differences": differences}), *results.quality[1:]]
    claims = diffusionvl_tables.check_claims(lines, results.speed)
    assert list(claims.values()) == [True, False, None, True]
    text = (tmp_path / "full" / "tables.md").read_text()
    assert text == diffusionvl_tables.as_markdown(results)
    assert "| 8 | 1.00 | +0.000 (+0.000 to +0.000) |" in text
    assert diffusionvl_tables.Tables.read(str(tmp_path / "full")) == results
    before = dict(commands.trained)
    again = diffusionvl.run_diffusionvl(str(tmp_path), "model", "words.parquet", pretrained_samples=samples)
    assert again == results
    assert commands.trained == before, "the same command continues in the same folders"


def test_portraits_are_rendered_once(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(diffusionvl.BUDGETS, "small", replace(diffusionvl.BUDGETS["small"], portraits=10))
    diffusionvl.run_diffusionvl(str(tmp_path), "model", budget="small")
    manifest = tmp_path / "small" / "portraits.parquet"
    written = manifest.stat().st_mtime_ns
    diffusionvl.run_diffusionvl(str(tmp_path), "model", budget="small")
    assert manifest.stat().st_mtime_ns == written
    assert {config.data for config in commands.trained.values()} == {str(manifest)}


def test_another_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--budget huge: is none of small, medium, full"):
        diffusionvl.run_diffusionvl(str(tmp_path), "model", budget="huge")


def test_a_table_is_there_as_soon_as_it_is_made(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: VlmEvaluateConfig) -> VlmEvaluationResults:
        if config.batch == 1:
            raise KeyboardInterrupt
        return commands.evaluate(config)

    monkeypatch.setattr(diffusionvl, "evaluate_vlm", stopped)
    with pytest.raises(KeyboardInterrupt):
        diffusionvl.run_diffusionvl(str(tmp_path), "model", "words.parquet")
    begun = (tmp_path / "full" / "tables.md").read_text()
    monkeypatch.setattr(diffusionvl, "evaluate_vlm", commands.evaluate)
    diffusionvl.run_diffusionvl(str(tmp_path), "model", "words.parquet")
    whole = (tmp_path / "full" / "tables.md").read_text()
    assert whole.startswith(begun)
    assert [line for line in begun.splitlines() if line.startswith("##")] == ["## Quality"]
