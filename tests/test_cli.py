"""The commands as far as they need no Ray: what they print, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from covray import __version__, cli
from covray.pairs.manifest import MANIFEST_SCHEMA, check_manifest
from covray.tasks import TASKS

HOSTILE = "a [red]b[/x] \\[/y] :car: \x1b[31m\n\tc"
"""A file name that is markup, an unbalanced tag, an escaped tag, an emoji, a terminal's escape and two lines."""


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``covray`` with these arguments, in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["covray", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def mistake(run: Callable[..., Done]) -> Callable[..., str]:
    """The one line that a mistaken command answers with."""

    def mistake(*arguments: object) -> str:
        done = run(*arguments)
        assert done.code == 2
        assert done.out == ""
        assert done.err.startswith("covray: ")
        assert done.err.count("\n") == 1
        assert done.err.strip().isprintable()
        return done.err.strip()

    return mistake


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
    ],
)  # fmt: skip
def test_every_command_has_help(run: Callable[..., Done], command: tuple[str, ...], named: str) -> None:
    done = run(*command, "--help")
    assert done.code == 0
    assert named in done.out


def test_help_does_not_wait_for_torch_or_ray() -> None:
    script = "import sys, covray.cli; sys.exit(bool({'torch', 'ray', 'pyarrow', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1]).returncode == 0


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


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "prior.stepps=3"], "prior.stepps: no such key"),
        (["--set", "engine.batch"], "--set engine.batch: write key=value"),
        (["--set", "engine.batch=0"], "engine.batch: "),
        (["--lengths", "4,x"], "--lengths 4,x: write whole numbers"),
        (["--lengths", "4.5"], "--lengths 4.5"),
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
        (["pairs", "photos", ".", "--out", "p.parquet"], ""),  # a folder without photographs
        (["pairs", "scenes", "--count", "1", "--out", "p.parquet", "--tasks", "weather"], "--tasks weather: no such"),
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
    ],
)
def test_every_command_answers_a_mistake_in_one_line(
    mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("image,label\na.png,b.png\n")
    assert said in mistake(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["list.csv"]


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
    assert done.err.startswith("covray: stopped")
    assert "Traceback" not in done.err


def test_splits_of_pairs_are_shares(run: Callable[..., Done], mistake: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    done = run("pairs", "scenes", "--count", 3, "--splits", "train=2,val=1", "--tasks", "depth", "--json", "--out", out)
    assert json.loads(done.out.splitlines()[-1])["splits"] == {"train": 2, "val": 1}
    for wrong in ("train", "train=x", "train=0", "train=-1,val=2", ""):
        line = mistake("pairs", "scenes", "--splits", wrong, "--out", tmp_path / "other.parquet")
        assert f"--splits {wrong}: " in line
