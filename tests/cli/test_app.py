"""The commands as far as they need no Ray: what they print, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from covray import __version__
from covray.cli import training
from covray.cli.options import shares
from covray.pairs.manifest import MANIFEST_SCHEMA
from covray.pairs.manifest_reading import check_manifest
from covray.tasks import TASKS
from covray.training.records import TrainResult
from tests.support.commands import Done, error_line

HOSTILE = "a [red]b[/x] \\[/y] :car: \x1b[31m\n\tc"
"""A file name that is markup, an unbalanced tag, an escaped tag, an emoji, a terminal's escape and two lines."""


@pytest.fixture
def scenes(run: Callable[..., Done], tmp_path: Path) -> Path:
    """A manifest of one scene, seven pairs of 16 px."""
    path = tmp_path / "scenes.parquet"
    assert run("pairs", "scenes", "--count", 1, "--size", 16, "--out", path).code == 0
    return path


# --- what a command answers ----------------------------------------------------------------------------------------


def test_the_version_is_the_packages(run: Callable[..., Done]) -> None:
    assert run("--version") == Done(0, f"covray {__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ((), "build"), (("pairs",), "photos"), (("nano",), "train"), (("build",), "--noise-from"),
        (("pairs", "scenes"), "--count"), (("view",), "--limit"), (("inspect",), "--json"), (("demo",), "--out"),
        (("train",), "--tokens-per-s"), (("export",), "--merge"),
    ],
)  # fmt: skip
def test_every_command_has_help(run: Callable[..., Done], command: tuple[str, ...], named: str) -> None:
    done = run(*command, "--help")
    assert done.code == 0
    assert named in done.out


def test_help_does_not_wait_for_torch_or_ray() -> None:
    script = "import sys, covray.cli.app; sys.exit(bool({'torch', 'ray', 'pyarrow', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0


def test_scenes_become_a_manifest(run: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "new" / "scenes.parquet"
    done = run("pairs", "scenes", "--count", 2, "--size", 16, "--tasks", "depth, pose", "--out", out, "--json")
    assert done.code == 0
    answer = json.loads(done.out)
    info = check_manifest(out)
    assert answer == {
        "out": str(out), "pairs": 4, "per_task": {"depth": 2, "pose": 2}, "splits": info.splits, "duplicates": 0,
    }  # fmt: skip
    assert info.per_task == answer["per_task"]


def test_photographs_become_a_manifest_with_their_root(run: Callable[..., Done], tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    out = tmp_path / "photos.parquet"
    done = run("pairs", "photos", folder, "--out", out, "--tasks", "colorization", "--json")
    assert json.loads(done.out)["per_task"] == {"colorization": 1}
    assert check_manifest(out).root == str(folder)


def test_a_list_becomes_a_manifest_and_duplicates_are_told(run: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image,label\na.png,b.png\na.png,b.png\nc.png,b.png\n")
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    out = tmp_path / "pairs.parquet"
    done = run("pairs", "manifest", tmp_path / "list.csv", "--task", "depth", "--out", out)
    assert done.code == 0
    assert "2 pairs in" in done.out
    assert "1 duplicates left out" in done.out
    assert check_manifest(out).root == str(tmp_path)


def test_a_plan_is_one_object_and_starts_nothing(run: Callable[..., Done], scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "chains"
    done = run(
        "build", "--plan", "--json", "--pairs", scenes, "--out", out, "--lengths", "8,4", "--set", "prior.steps=10",
        "--set", "check_endpoints=0",
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert (plan["pairs"], plan["per_task"]) == (7, dict.fromkeys(sorted(TASKS), 1))
    assert plan["methods"] == ["diffusion", "linear"]
    assert len(plan["alphas"]) == 2 + 6
    assert plan["unet_evaluations"] == 7 * (2 + 8) * 10
    assert not out.exists()


def test_a_plan_for_people_names_every_figure(run: Callable[..., Done], scenes: Path, tmp_path: Path) -> None:
    done = run("build", "--plan", "--pairs", scenes, "--out", tmp_path / "chains", "--methods", "linear")
    assert done.code == 0
    assert all(word in done.out for word in ("pairs", "methods", "linear", "unet evaluations"))


Chains = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def chains(write_dataset: Chains) -> str:
    """A finished dataset of 12 pairs of depth, 9 of them to train on, at length 4."""
    return write_dataset({"depth": 12})[0]


def test_a_plan_of_a_training_is_one_object_and_starts_nothing(
    run: Callable[..., Done], chains: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = run(
        "train", "--plan", "--json", "--scale", "7b", "--data", chains, "--out", out, "--epochs", 20, "--workers", 2,
        "--pairs", "1,2", "--tokens-per-s", 100,
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["pairs"] == 9
    assert plan["tokens"] == 20 * 9 * 4 * 16 * 2.5
    assert plan["gpu_hours"] == pytest.approx(plan["tokens"] / 100 / 3600)
    assert plan["hours"] == pytest.approx(plan["gpu_hours"] / 2)
    assert {part["stage"] for part in plan["memory"]} == {0, 1, 2, 3}
    for part in plan["memory"]:
        assert part["total"] == sum(part[term] for term in ("weights", "adapter", "activations", "working"))
    assert not out.exists()


def test_a_plan_of_a_training_for_people_names_every_figure(
    run: Callable[..., Done], chains: str, tmp_path: Path
) -> None:
    done = run("train", "--plan", "--init", "random", "--data", chains, "--out", tmp_path / "run")
    assert done.code == 0
    assert all(word in done.out for word in ("parameters", "trainable", "steps", "tokens", "ZeRO 3, recompute", "GiB"))
    assert "hours" not in done.out


def test_a_plan_of_a_training_loads_no_ray(chains: str) -> None:
    script = (
        "import sys; from covray.cli import app as cli; sys.argv[1:] = sys.argv[2:]; cli.app(standalone_mode=False); "
        "sys.exit(bool({'ray', 'mlflow', 'deepspeed', 'diffusers', 'peft'} & set(sys.modules)))"
    )
    arguments = ["-", "train", "--plan", "--scale", "300m", "--data", chains, "--out", "never"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=Path(__file__).parents[2], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"trainable" in done.stdout


def test_the_end_of_a_training_is_told(
    run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from covray.distributed import train as training
    from covray.training.records import TrainResult

    asked = []
    result = {
        "adapter": "run/adapter", "adapter_step": 20, "steps": 20, "tokens": 4096, "sentences": 8, "epochs": 2.0,
        "loss": 3.25, "seconds": 4.0, "tokens_per_s": 12345.6, "memory_bytes": 10**9,
        "validation_loss_before": 4.0, "validation_loss": 3.5, "answer_perplexity_before": 80.0,
        "answer_perplexity": 40.0,
    }  # fmt: skip

    def trained(config: Any) -> TrainResult:
        asked.append(config)
        return TrainResult.model_validate(result)

    monkeypatch.setattr(training, "train", trained)
    arguments = (
        "train", "--scale", "1b", "--data", "chains", "--out", tmp_path / "[red]run", "--length", "4,6", "--pairs", "2",
        "--method", "linear", "--backbone", "folder", "--init", "random", "--workers", 3, "--epochs", 2.5, "--steps", 7,
        "--deepspeed", "zero2", "--tracking-uri", "none", "--seed", 5, "--set", "lora.rank=4",
    )  # fmt: skip
    done = run(*arguments)
    assert done.code == 0, done.err
    assert all(part in done.out for part in ("3.2500", "4.0000 -> 3.5000", "80.0000 -> 40.0000", "12,346"))
    assert f"next: covray export {tmp_path}/[red]run --merge" in done.out
    assert json.loads(run(*arguments, "--json").out) == result
    config = asked[0]
    assert (config.backbone.scale, config.backbone.path, config.backbone.init) == ("1b", "folder", "random")
    chosen = config.sentences
    assert (chosen.lengths, chosen.pairs, chosen.method) == ((4, 6), (2,), "linear")
    assert (config.workers.count, config.optimizer.epochs, config.optimizer.steps) == (3, 2.5, 7)
    assert (config.compute.deepspeed, config.tracking.uri, config.seed) == ("zero2", "none", 5)
    assert config.lora.rank == 4


def test_a_file_decides_what_options_leave_open(run: Callable[..., Done], chains: str, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("backbone: {scale: 300m}\nseed: 3\noptimizer: {steps: 11}\n")
    done = run("train", "--plan", "--json", "--config", file, "--data", chains, "--out", tmp_path / "run")
    plan = json.loads(done.out)
    assert plan["steps"] == 11
    assert plan["parameters"] == pytest.approx(291e6, rel=0.01)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "prior.stepps=3"], "prior.stepps: no such key"),
        (["--set", "engine.batch"], "--set engine.batch: write key=value"),
        (["--set", "engine.batch=0"], "engine.batch: "),
        (["--lengths", "4,x"], "--length 4,x: write whole numbers"),
        (["--lengths", "4.5"], "--length 4.5"),
        (["--lengths", "1"], "lengths.0: "),
        (["--methods", "cubic"], "methods.0: "),
        (["--config", "absent.yaml"], "--config absent.yaml: No such file"),
        ([], "absent.parquet"),
    ],
)
def test_a_build_that_cannot_be_says_why(
    mistake: Callable[..., str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    line = mistake("build", "--plan", "--pairs", tmp_path / "absent.parquet", "--out", tmp_path / "chains", *arguments)
    assert said in line
    assert not (tmp_path / "chains").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--length", "1"], "sentences.lengths.0: "),
        (["--length", "4,x"], "--length 4,x: write whole numbers"),
        (["--length", "8"], "needs alpha"),
        (["--pairs", "15"], "4 pictures x (15 + 1) chains x 16 tokens = 1024 tokens exceed the context of 1000"),
        (["--pairs", "9"], "depth has 9 good pairs"),
        (["--method", "cubic"], "sentences.method: "),
        (["--data", "absent"], "absent: no _dataset.json"),
        (["--scale", "13b"], "backbone.scale: "),
        (["--scale", "300m"], "backbone.path: the 300m does not ship"),
        (["--backbone", "./absent"], "./absent: no such folder"),
        (["--out", "taken"], "taken: holds files that covray train did not write"),
        (["--epochs", "0"], "optimizer.epochs: "),
        (["--deepspeed", "zero9"], "compute.deepspeed: zero9"),
        (["--tokens-per-s", "100"], "--tokens-per-s: is for --plan"),
        (["--plan", "--tokens-per-s", "0"], "--tokens-per-s 0: "),
        (["--plan", "--tokens-per-s", "nan"], "--tokens-per-s nan: "),
        (["--plan", "--tokens-per-s", "inf"], "--tokens-per-s inf: "),
        (["--plan", "--tokens-per-s", "1e-308"], "--tokens-per-s 1e-308: "),
        (["--epochs", "nan"], "optimizer.epochs: "),
        (["--out", "taken/file"], "taken/file: cannot be written"),
        (["--workers", "2000"], "workers.count: 2000 workers"),
        (["--config", "absent.yaml"], "--config absent.yaml: No such file"),
    ],
)
def test_a_training_that_cannot_be_says_why_before_anything_starts(
    mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, chains: str, tmp_path: Path,
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    from covray.models.lvm import scales

    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    monkeypatch.setitem(scales._SHAPES, "nano", (64, 128, 1, 1, 64, 1000))
    random = [] if "300m" in arguments or "--backbone" in arguments else ["--init", "random"]
    line = mistake("train", "--data", chains, "--out", "run", *random, *arguments)
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"fingerprints": {"codebook": "0" * 64}}, "codebook"),
        ({"tokens_per_image": 64}, "its pictures have 64 tokens"),
        ({"config": {"lengths": [3]}}, "a chain of 4 needs alpha 0.3333, 0.6667, the dataset has 0.5"),
        ({}, "9 pairs are in two of the datasets"),
    ],
)
def test_a_mixture_that_cannot_be_says_why_before_anything_starts(
    run_here: Callable[..., Any], chains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    record: dict[str, Any], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chains, "other")
    file = Path("other", "_dataset.json")
    values = json.loads(file.read_text())
    for key, value in record.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(values))
    arguments = ["train", "--data", chains, "--data", "other=0.3", "--out", "run", "--init", "random", "--length", "4"]
    line = error_line(run_here(*arguments, code=2).stderr)
    assert said in line
    assert not Path("run").exists()


def test_an_unfinished_dataset_is_not_trained_on(mistake: Callable[..., str], write_dataset: Chains) -> None:
    path, _ = write_dataset({"depth": 8}, finished=False)
    for plan in ([], ["--plan"]):
        assert "is unfinished; run the same covray build again" in mistake("train", "--data", path, "--out", "x", *plan)


def test_a_training_of_nothing_says_what_is_missing(mistake: Callable[..., str]) -> None:
    assert "data: is required; out: is required" in mistake("train")


def test_a_build_of_nothing_says_what_is_missing(mistake: Callable[..., str]) -> None:
    assert "pairs: is required" in mistake("build", "--plan")


@pytest.mark.parametrize("lacking", ["pair_id", "label", "split"])
def test_a_manifest_that_lacks_a_column_is_named(mistake: Callable[..., str], scenes: Path, lacking: str) -> None:
    table = pq.read_table(scenes)
    broken = scenes.with_name("broken.parquet")
    pq.write_table(table.drop_columns(lacking), broken)
    line = mistake("build", "--plan", "--pairs", broken, "--out", "x")
    assert "broken.parquet" in line
    assert lacking in line


def test_files_that_are_no_manifest_are_named(mistake: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.Table.from_pylist([], MANIFEST_SCHEMA), tmp_path / "empty.parquet")
    for name in ("text.parquet", "empty.parquet"):
        assert name in mistake("build", "--plan", "--pairs", tmp_path / name, "--out", "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pairs", "photos", "absent", "--out", "p.parquet"], "absent"),
        (["pairs", "photos", ".", "--out", "p.parquet", "--tasks", "weather"], "weather"),
        (["pairs", "photos", "empty", "--out", "p.parquet"], "holds no photographs"),
        (["pairs", "scenes", "--count", "1", "--out", "p.parquet", "--tasks", "weather"], "--task weather: no such"),
        (["pairs", "scenes", "--count", "1", "--out", "."], "is a folder"),
        (["pairs", "scenes", "--count", "1", "--out", "gopher://x/y"], "gopher://x/y"),
        (["pairs", "manifest", "absent.csv", "--out", "p.parquet"], "absent.csv"),
        (["pairs", "manifest", "absent.txt", "--out", "p.parquet"], "absent.txt"),
        (["pairs", "manifest", "list.csv", "--out", "p.parquet"], "has no task"),
        (["pairs", "manifest", "list.csv", "--out", "p.parquet", "--task", "weather"], "weather"),
        (["view", "absent"], "absent: "),
        (["inspect", "absent"], "absent: "),
        (["inspect", "list.csv"], "list.csv: "),
        (["inspect", "gopher://x/y"], "gopher://x/y"),
        (["nano", "train", "unet", "--out", "o"], "unet: no such nano model"),
        (["nano", "train", "prior", "--out", "o"], "vae: not there"),
        (["nano", "train", "vae", "--out", "o", "--device", "tpu"], "--device tpu"),
        (["nano", "train", "vae", "--out", "list.csv/o"], "list.csv/o: cannot be written"),
        (["nano", "measure", "--weights", "absent"], "absent: "),
        (["demo", "--out", "list.csv"], "list.csv: "),
        (["export", "chains", "--as", "mds", "--scores", "eval", "--out", "o"], "--scores: is for a run"),
        (["export", "absent", "--merge", "--out", "o"], "absent: has no _run.json"),
        (["export", ".", "--out", "list.csv"], "list.csv: already exists"),
    ],
)
def test_every_command_answers_a_mistake_in_one_line(
    mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("image,label\na.png,b.png\n")
    (tmp_path / "empty").mkdir()
    assert said in mistake(*arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "list.csv"]


@pytest.mark.parametrize(
    "command",
    [
        ["view"],
        ["inspect"],
        ["pairs", "photos", "--out", "p.parquet"],
        ["pairs", "manifest", "--out", "p.parquet"],
        ["build", "--plan", "--out", "x", "--pairs"],
        ["build", "--plan", "--out", "x", "--config"],
        ["nano", "measure", "--weights"],
        ["train", "--out", "x", "--data"],
        ["export", "--out", "x"],
    ],
)
def test_a_hostile_name_is_printed_safely(
    mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = mistake(*command, f"{HOSTILE}.csv")
    assert "a [red]b[/x] \\[/y] :car: ?[31m c.csv" in line


@pytest.mark.parametrize(
    "command",
    [["view"], ["inspect"], ["pairs", "photos", "--out", "p.parquet"], ["build", "--plan", "--out", "x", "--pairs"]],
)
def test_a_name_that_is_no_text_is_a_mistake_too(
    mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "?" in mistake(*command, "\udcff")  # as Python hands over the byte FF of a file name


def test_paths_are_printed_as_they_are(run: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "[red]x :car: [/y]" / "pairs.parquet"
    done = run("pairs", "scenes", "--count", 1, "--size", 16, "--tasks", "depth", "--out", out)
    assert done.code == 0
    assert str(out) in done.out


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["pairs", "scenes"], ["pairs", "scenes", "--out", "x", "--count", "0"], ["build", "--colour", "red"]],
)
def test_a_command_that_is_none_is_a_usage_error(run: Callable[..., Done], arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err


def test_a_stop_is_told_and_has_its_own_code(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    from covray.pairs import scenes

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "scene_pairs", stopped)
    done = run("pairs", "scenes", "--out", "never.parquet")
    assert done.code == 130
    assert error_line(done.err).startswith("stopped")


def test_splits_of_pairs_are_shares(run: Callable[..., Done], mistake: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    done = run("pairs", "scenes", "--count", 3, "--splits", "train=2,val=1", "--tasks", "depth", "--json", "--out", out)
    assert json.loads(done.out.splitlines()[-1])["splits"] == {"train": 2, "val": 1}
    assert shares("train=8, val=1") == {"train": 8, "val": 1}
    for wrong in ("train", "train=x", "train=0", "train=-1,val=2", "", "train=1,=1", "val=1,val=2"):
        line = mistake("pairs", "scenes", "--splits", wrong, "--out", tmp_path / "other.parquet")
        assert f"--splits {wrong}: " in line


def test_an_adapter_that_is_worse_than_none_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    result = TrainResult(
        adapter="run/adapter", adapter_step=10, steps=10, tokens=1000, sentences=20, epochs=1.0, loss=3.0, seconds=10.0,
        tokens_per_s=100.0, memory_bytes=0, validation_loss_before=4.0, validation_loss=3.5,
    )  # fmt: skip
    training.print_training(result, "run")
    assert "no step was better" not in capsys.readouterr().out
    training.print_training(result.model_copy(update={"validation_loss": 4.5}), "run")
    assert "no step was better" in capsys.readouterr().out
