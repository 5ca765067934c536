"""Options set keys of a configuration, take their help from them, and keep their old spellings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from covray.cli.app import app
from covray.cli.cluster import STEPS, submitted_config
from covray.cli.command import Command
from covray.cli.vlm import print_scores
from covray.config import BuildConfig, EvaluateConfig, TrainConfig
from covray.config.think import ThinkFeaturesConfig
from covray.distributed.dashboard import VARIABLE, is_dashboard_asked
from covray.errors import ConfigError
from covray.evaluation.records import Accuracy, VlmEvaluationResults
from covray.evaluation.statistics import Mean


def parsed(*words: object) -> object:
    """Return the configuration of ``covray STEP ...``."""
    root = typer.main.get_command(app).make_context("covray", ["doctor"])
    step, *arguments = map(str, words)
    return submitted_config(root, step, arguments)


def test_a_step_of_a_group_is_submitted_by_both_its_names() -> None:
    config = parsed("think features", "--data", "d", "--vlm", "v", "--out", "o", "--max-tokens", "7")
    assert isinstance(config, ThinkFeaturesConfig)
    assert (config.vlm.path, config.thought.max_tokens) == ("v", 7)
    for words in (["think", "generate"], ["think"]):
        done = CliRunner().invoke(app, ["submit", *words])
        assert isinstance(done.exception, ConfigError)
        assert f"{' '.join(words)}: cannot be submitted; give one of pairs, build, train" in str(done.exception)


@pytest.mark.parametrize(
    ("now", "once"),
    [
        (
            ["build", "--manifest", "p", "--out", "o", "--length", "4,8", "--method", "linear"],
            ["build", "--pairs", "p", "--out", "o", "--lengths=4,8", "--methods", "linear"],
        ),
        (
            ["train", "--data", "d", "--out", "o", "--example-pairs", "1,2"],
            ["train", "--data=d", "--out=o", "--pairs=1,2"],
        ),
        (
            ["evaluate", "--data", "d", "--out", "o", "--example-pairs", "2", "--task", "depth,pose"],
            ["evaluate", "--data", "d", "--out", "o", "--pairs", "2", "--tasks", "depth,pose"],
        ),
    ],
    ids=["build", "train", "evaluate"],
)  # fmt: skip
def test_old_spellings_mean_the_same_and_are_not_shown(now: list[str], once: list[str]) -> None:
    config = parsed(*now)
    assert config is not None
    assert config == parsed(*once)
    shown = CliRunner().invoke(app, [now[0], "--help"], env={"COLUMNS": "200"}).stdout
    for word in once:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in now:
            assert f"{option} " not in shown


def test_what_follows_two_dashes_is_no_option() -> None:
    done = CliRunner().invoke(app, ["pairs", "scenes", "--out", "o.parquet", "--", "--tasks", "--debug"])
    assert "unexpected extra argument" in done.stderr


@pytest.mark.parametrize("arguments", [["--dashboard", "inspect", "absent"], ["inspect", "absent", "--dashboard"]])
def test_all_commands_can_ask_for_the_dashboard(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    done = CliRunner().invoke(app, arguments)
    assert "absent" in str(done.exception), "the option is taken out, and the command goes on to its own mistake"
    assert is_dashboard_asked()


@pytest.mark.parametrize("step", STEPS)
def test_every_option_sets_keys_that_there_are(step: str) -> None:
    command: Any = typer.main.get_command(app)
    for name in step.split():
        command = command.commands[name]
    options = STEPS[step]
    own = {parameter.opts[0] for parameter in command.params}
    beside = {
        "--config",
        "--set",
        "--plan",
        "--append",
        "--tokens-per-s",
        "--json",
        "--resume",
        "--token",
        "--rows",
        "--per-s",
    } - set(STEPS[step]._settings)
    assert own - beside == set(options._settings)


def test_help_is_the_text_of_the_key_with_its_default() -> None:
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "300"}).stdout
    text = BuildConfig.model_fields["prior"].default.__class__.model_fields["path"].description
    assert text is not None
    built = CliRunner().invoke(app, ["build", "--help"], env={"COLUMNS": "300"}).stdout
    assert text.replace("``", "") in built
    assert "Split of the queries. Default: test." in shown


def test_a_step_is_checked_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parsed("evaluate", "--data", "s3://bucket/d", "--out", "s3://bucket/o", "--backbone", "LVM", "--seed", 3)
    assert isinstance(config, EvaluateConfig)
    assert config.backbone is not None
    assert (config.backbone.path, config.backbone.scale, config.seed) == ("LVM", "custom", 3)
    assert parsed("sweep", "--resume", "--out", "s3://bucket/sweep") is None
    actors = parsed("build", "--manifest", "p", "--out", "o", "--actors", 3)
    assert isinstance(actors, BuildConfig)
    assert (actors.actors.min, actors.actors.max) == (3, 3)
    with pytest.raises(ConfigError, match=r"sentences\.lengths\.0"):
        parsed("train", "--data", "d", "--out", "o", "--length", "1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["pairs", "scenes", "--count", "1", "--out", "pairs.csv"], "ends in .parquet"),
        (["build", "--manifest", "p", "--out", "chains.parquet"], "does not end in .parquet"),
        (["train", "--data", "d", "--out", "run.safetensors"], "does not end in .safetensors"),
        (["generate", "--query", "q.png", "--out", "answer.PNG"], "does not end in .png"),
        (["evaluate", "--data", "d", "--out", "scores.json"], "does not end in .json"),
        (["sweep", "--data", "d", "--out", "sweep.yaml"], "does not end in .yaml"),
        (["view", "chains", "--out", "page.html"], "does not end in .html"),
        (["export", "run", "--out", "merged.bin"], "does not end in .bin"),
        (["convert", "prior", "x.safetensors", "--out", "y.safetensors"], "does not end in .safetensors"),
        (["demo", "--out", "demo.zip"], "does not end in .zip"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_an_out_that_means_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], advice: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ConfigError)
    assert str(error).startswith("--out ")
    assert advice in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_begun_under_such_a_name_continues(tmp_path: Path) -> None:
    begun = tmp_path / "run.bin"
    begun.mkdir()
    config = parsed("train", "--data", "d", "--out", begun)
    assert isinstance(config, TrainConfig)
    assert config.out == str(begun)
    assert parsed("train", "--data", "d", "--out", tmp_path / "run.v1") is not None


def test_every_command_takes_what_all_take() -> None:
    """``--debug`` and ``--dashboard`` are of the class, and so is what a command says while it works."""

    def commands(group: Any) -> Iterator[Any]:
        for command in group.commands.values():
            if hasattr(command, "commands"):
                yield from commands(command)
            else:
                yield command

    others = [command.name for command in commands(typer.main.get_command(app)) if not isinstance(command, Command)]
    assert others == []


def test_kinds_of_questions_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    mean = Mean(0.5, None, None, 3)
    results = VlmEvaluationResults(
        prompts=6, questions=mean, questions_by_kind={"[/where]": Accuracy(0.5, None, None, 3, 0.25)},
        facts=mean, facts_by_theme={"[red]": mean}, captions_with_all_facts=None, bleu=None, answer_perplexity=1.0,
        tokens_per_s=None, tokens_per_pass=None,
    )  # fmt: skip
    print_scores(results)
    printed = capsys.readouterr().out
    assert "  [/where]" in printed
    assert "  [red]" in printed
    assert printed.count("0.250") == 1, "only a kind of question has a most frequent answer"
