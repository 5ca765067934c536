"""The doctor's findings are true, say what to do, and leave nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from covray.doctor import checks, machine, models
from covray.doctor import ray as of_ray
from covray.doctor import storage as of_storage
from covray.doctor.checks import examine
from covray.doctor.findings import GIB, Finding, error_finding
from covray.doctor.ray import NodeReport, Versions, judge_node
from covray.errors import WeightsError
from covray.io import storage
from tests.support.commands import Done

OURS = Versions(python="3.11.7", ray="2.60.0", covray="0.1.0")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster, and a home folder of the test's own, so that the token of whoever runs the tests is not read."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that depend on this machine, or take long, have no findings."""
    for module, name in (
        (machine, "gpus"), (machine, "compiler"), (of_ray, "disks"), (of_ray, "ports"), (models, "weights"),
    ):  # fmt: skip
        monkeypatch.setattr(module, f"check_{name}", lambda *_: [])


def only(findings: list[Finding], name: str) -> Finding:
    """Return the one finding of that name: one line, with advice unless all is well."""
    [finding] = [finding for finding in findings if finding.name == name]
    assert finding.found.isprintable()
    assert finding.found
    assert (finding.status == "ok") == (finding.advice == "")
    return finding


# --- packages ------------------------------------------------------------------------------------------------------


def test_the_packages_that_run_the_tests_are_as_covray_requires_them() -> None:
    assert only(machine.check_packages(), "packages").status == "ok"


@pytest.mark.parametrize(
    ("found", "status"), [("2.10.1", "problem"), ("2.11.0", "ok"), ("2.13.0+cu128", "ok"), ("2.14.0", "problem")]
)
def test_a_package_out_of_bounds_is_a_problem_with_the_command_that_fixes_it(
    monkeypatch: pytest.MonkeyPatch, found: str, status: str
) -> None:
    lines = ["torch<2.14,>=2.11", "nothing-such>=1; extra == 'test'"]
    monkeypatch.setattr(machine, "requires", lambda _: lines)
    monkeypatch.setattr(machine, "version", lambda name: found if name == "torch" else "1")
    [finding] = machine.check_packages()
    assert finding.status == status
    assert found in finding.found
    assert finding.advice == ("pip install 'torch<2.14,>=2.11'" if status == "problem" else "")


def test_a_package_that_is_absent_is_a_problem_with_its_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requires", lambda _: ["no-such-package-of-anybody[train,data]>=2"])
    [finding] = machine.check_packages()
    assert finding.status == "problem"
    assert finding.advice == "pip install 'no-such-package-of-anybody[data,train]>=2'"


# --- processor, GPU, compiler --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(True, True, "AMX"), (False, True, "AVX512-BF16"), (False, False, "float32 is faster")],
)
def test_the_processor_says_what_trainings_compute_in(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    [finding] = machine.check_processor()
    assert finding.status == "ok"
    assert expected in finding.found


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86"], True),  # a binary runs on later minor versions
        ((8, 0), ["sm_86"], False),  # and on no earlier
        ((9, 0), ["sm_80", "sm_86"], False),  # nor on another major one
        ((12, 0), ["sm_90a", "compute_90"], True),  # PTX runs on all later ones
        ((7, 0), ["sm_75", "compute_90"], False),
        ((10, 0), ["sm_100"], True),
    ],
)
def test_a_gpu_runs_what_was_compiled_for_it(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert machine.built_for(capability, built) == runs


@pytest.mark.parametrize(
    ("capability", "free_gib", "status", "expected"),
    [
        ((9, 0), 139, "ok", "139.0 of 140.0 GiB free"),
        ((9, 0), 20, "note", "others use it"),
        ((7, 5), 139, "note", "bfloat16"),
        ((12, 0), 139, "problem", "sm_120"),
    ],
)
def test_a_gpu_is_judged_by_its_build_arithmetic_and_memory(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free_gib: int, status: str, expected: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    facts = {
        "is_available": True,
        "device_count": 2,
        "mem_get_info": (free_gib * GIB, 140 * GIB),
        "get_device_capability": capability,
        "get_device_name": "A GPU",
        "get_arch_list": ["sm_75", "sm_80", "sm_90"],
    }
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    findings = machine.check_gpus()
    assert len(findings) == 2
    for number in range(2):
        finding = only(findings, f"GPU {number}")
        assert finding.status == status
        assert expected in finding.found


@pytest.mark.parametrize(
    ("driver", "build", "visible", "status"),
    [
        (None, None, None, "note"),  # a laptop
        (None, "12.8", None, "note"),
        ("550.54.14", None, None, "problem"),  # torch's CPU build beside a GPU
        ("470.10", "12.8", None, "problem"),  # a driver that is too old
        ("550.54.14", "12.8", "", "note"),
    ],
)
def test_no_gpu_is_a_problem_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, build: str | None, visible: str | None, status: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert only(machine.check_gpus(), "GPU").status == status


def test_a_driver_that_is_too_old_is_named_with_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for driver, build, needed in (
        ("470.10", "12.8", "525.60.13"), ("525.60.11", "12.8", "525.60.13"), ("570.86.15", "13.0", "580.65.06"),
        ("580.65.06", "13.0", None), ("525.60.13", "12.1", None), ("unknown", "12.8", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(machine, "_nvidia_driver", lambda driver=driver: driver)
        finding = only(machine.check_gpus(), "GPU")
        assert finding.status == "problem"
        if needed is None:
            assert "too old" not in finding.found
        else:
            assert f"driver {driver} is too old for torch {torch.__version__}, built for CUDA {build}" in finding.found
            assert f"update the driver to {needed} or newer" in finding.advice


def test_without_a_compiler_it_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    finding = only(machine.check_compiler(), "compiler")
    assert finding.status == "note"  # nothing needs it by default
    assert "engine.compile, compute.compile" in finding.found
    assert "g++" in finding.advice


# --- disk and storage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free_gib", "status"), [(50, "ok"), (3, "note"), (0.5, "problem")])
def test_a_disk_is_judged_by_what_a_dataset_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: float, status: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100 * GIB, 0, int(free_gib * GIB)))
    assert only(of_storage.check_storage(str(tmp_path)), "disk").status == status


def test_a_full_temporary_disk_and_a_small_shared_memory_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000 * GIB, 0, GIB // 16))
    findings = of_ray.check_disks()
    assert only(findings, "Ray's disk").status == "problem"
    if len(findings) > 1:  # only Linux has a folder of shared memory
        assert only(findings, "object store").status == "note"


@pytest.mark.parametrize("below", [".", "not/there/yet"])
def test_storage_is_measured_and_left_as_it_was(tmp_path: Path, below: str) -> None:
    (tmp_path / "kept").write_text("mine")
    findings = of_storage.check_storage(str(tmp_path / below))
    assert only(findings, "storage").status in ("ok", "note")  # how fast it is here is not known
    assert "MB/s" in only(findings, "storage").found
    assert only(findings, "clock").status == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(("slow", "status"), [(0.0, "ok"), (float("inf"), "note")])
def test_a_slow_storage_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow: float, status: str) -> None:
    monkeypatch.setattr(of_storage, "SLOW_BYTES_PER_S", slow)
    assert only(of_storage.check_storage(str(tmp_path)), "storage").status == status


def test_a_storage_that_cannot_be_written_is_a_problem_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: str, data: bytes) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(storage, "write_bytes", refuse)
    finding = only(of_storage.check_storage(str(tmp_path)), "storage")
    assert finding.status == "problem"
    assert "Permission denied" in finding.found
    assert str(tmp_path) in finding.found


def test_a_storage_that_fills_up_midway_keeps_nothing_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half(path: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage, "read_bytes", half)
    assert only(of_storage.check_storage(str(tmp_path)), "storage").status == "problem"
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_gives_back_something_else_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "read_bytes", lambda _: b"something else")
    assert only(of_storage.check_storage(str(tmp_path)), "storage").status == "problem"


def test_a_file_is_no_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert only(of_storage.check_storage(str(tmp_path / "file" / "below")), "storage").status == "problem"


def test_a_scheme_that_nobody_knows_is_a_finding_among_the_others(sound: None) -> None:
    findings = list(examine("nosuch://bucket/chains"))
    assert only(findings, "storage").status == "problem"
    assert "nosuch" in only(findings, "storage").found
    assert only(findings, "packages").status == "ok"


# --- clock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stamp_s", "status"), [(-1, "ok"), (0, "ok"), (4, "ok"), (-30, "note"), (30, "note"), (-3600, "problem")]
)
def test_a_stamp_is_skewed_by_what_the_writing_does_not_explain(stamp_s: float, status: str) -> None:
    now = time.time()
    finding = only([of_storage.check_clock(now, now + 3, int((now + stamp_s) * 1e9))], "clock")
    assert finding.status == status


def test_a_clock_from_before_covray_was_installed_is_wrong() -> None:
    assert only([of_storage.check_clock(0.0, 1.0, int(0.5e9))], "clock").status == "problem"


# --- weights -------------------------------------------------------------------------------------------------------


def test_the_nano_family_is_whole_and_of_one_codebook() -> None:
    findings = models.check_weights("nano", "nano", "nano")
    assert [finding.name for finding in findings] == ["prior", "tokenizer", "backbone"]
    for finding in findings:
        assert finding.status == "ok"
        assert len(finding.found.rpartition(": ")[2]) == 12


def test_a_folder_that_is_missing_or_empty_is_a_problem_and_an_id_is_a_note(
    tmp_path: Path, vqgan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    offline = models.hub.HF_HUB_OFFLINE
    findings = models.check_weights(str(tmp_path / "absent"), str(vqgan_folder), "somebody/no-such-model")
    assert only(findings, "prior").status == "problem"
    assert "absent" in only(findings, "prior").found
    assert only(findings, "tokenizer").status == "ok"
    noted = only(findings, "backbone")
    assert noted.status == "note"
    assert "hf download somebody/no-such-model" in noted.advice
    assert models.hub.HF_HUB_OFFLINE is offline
    empty = tmp_path / "empty"
    empty.mkdir()
    for finding in models.check_weights(str(empty), str(empty), str(empty)):
        assert only([finding], finding.name).status == "problem"
        assert "is missing" in finding.found


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(models.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    for finding in models.check_weights(*["somebody/no-such-model"] * 3):
        assert only([finding], finding.name).status == "note"


def test_a_tokenizer_of_another_codebook_than_the_backbone_is_noted(vqgan_folder: Path) -> None:
    findings = models.check_weights("nano", str(vqgan_folder), "nano")
    assert only(findings, "codebook").status == "note"


# --- token, ports --------------------------------------------------------------------------------------------------


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """A token at Ray's own place, in folders that others may enter."""
    file = tmp_path / "home" / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text("secret")
    file.chmod(0o600)
    return file


@pytest.fixture
def open_home(token: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Folders that everybody may enter, as far up as they are pytest's."""
    base = tmp_path_factory.getbasetemp()
    for folder in token.parents:
        if folder.is_relative_to(base) or folder.name.startswith("pytest-"):
            folder.chmod(0o755)


@pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o400, "ok"), (0o644, "problem"), (0o640, "problem")])
def test_a_token_that_others_can_read_is_a_problem(open_home: None, token: Path, mode: int, status: str) -> None:
    token.chmod(mode)
    finding = only(of_ray.check_token(), "token")
    assert finding.status == status
    assert "secret" not in finding.found
    assert finding.advice == (f"chmod 600 {token}" if status == "problem" else "")


def test_a_closed_home_keeps_an_open_token(open_home: None, token: Path) -> None:
    token.chmod(0o644)
    token.parents[1].chmod(0o700)
    assert only(of_ray.check_token(), "token").status == "ok"


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({}, "ok"),  # Ray makes one
        ({"RAY_AUTH_MODE": "token"}, "problem"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "note"),
        ({"RAY_AUTH_MODE": "disabled"}, "note"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "10.0.0.1:6379"}, "problem"),
        ({"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_MODE": "token"}, "ok"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such/token"}, "problem"),
    ],
)
def test_an_absent_token_matters_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], status: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = only(of_ray.check_token(), "token")
    assert finding.status == status
    assert "secret" not in finding.found


def test_a_port_is_taken_while_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(of_ray, "PORTS", {port: "GCS"})
        taken = only(of_ray.check_ports(), "ports")
        assert taken.status == "note"
        assert str(port) in taken.found
    assert only(of_ray.check_ports(), "ports").status == "ok"


# --- cluster -------------------------------------------------------------------------------------------------------


def report(**other: Any) -> NodeReport:
    """What a sound node says, but for ``other``."""
    versions = {"python": "3.11.9", "ray": "2.60.0", "covray": "0.1.0"}
    values = {
        "free_bytes": 50 * GIB,
        "total_bytes": 99 * GIB,
        "time_s": 1000.5,
        "asked_s": 1000.0,
        "answered_s": 1001.0,
    }
    for name, value in other.items():
        (versions if name in versions else values)[name] = value
    return NodeReport(Versions(**versions), **values)


@pytest.mark.parametrize(
    ("other", "status", "expected"),
    [
        ({}, "ok", "4 CPUs, 1 GPUs, 8.0 GiB memory, disk 50.0 of 99.0 GiB free"),
        ({"python": "3.12.1"}, "problem", "python 3.11.7"),
        ({"covray": "0.0.9"}, "problem", "covray 0.1.0"),
        ({"covray": None}, "note", "not installed"),
        ({"free_bytes": GIB}, "problem", "full"),
        ({"time_s": 990.0}, "note", "clock -10.0 s"),
        ({"time_s": 1101.0}, "problem", "clock +100.0 s"),
    ],
)
def test_a_node_is_judged_by_what_it_says(other: dict[str, object], status: str, expected: str) -> None:
    resources = {"CPU": 4.0, "GPU": 1.0, "memory": 8.0 * GIB}
    finding = only([judge_node("node a", resources, report(**other), OURS)], "node a")
    assert finding.status == status
    assert expected in finding.found


@pytest.mark.parametrize("listens", [True, False])
def test_a_cluster_that_does_not_answer_is_a_finding_among_the_others(
    monkeypatch: pytest.MonkeyPatch, sound: None, tmp_path: Path, listens: bool
) -> None:
    def refused(**_: object) -> None:
        assert listens, "Ray asks a dead address for minutes"
        raise ConnectionError("no answer\nfrom there")

    monkeypatch.setattr(of_ray.ray, "init", refused)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listens:
            listener.listen()
        address = "{}:{}".format(*listener.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address)
        findings = list(examine(str(tmp_path)))
    finding = only(findings, "cluster")
    assert finding.status == "problem"
    assert address in finding.found
    assert only(findings, "packages").status == "ok"
    assert not of_ray.ray.is_initialized()


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), RuntimeError("CUDA\nsaid so"), WeightsError("a: b; do c")]
)
def test_a_check_that_fails_is_a_finding_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, sound: None, tmp_path: Path, error: Exception
) -> None:
    def fail() -> list[Finding]:
        raise error

    monkeypatch.setattr(machine, "check_gpus", fail)
    findings = list(examine(str(tmp_path)))
    assert only(findings, "GPU").status == "problem"
    assert only(findings, "token").status == "ok"


def test_json_is_the_findings(
    monkeypatch: pytest.MonkeyPatch, sound: None, tmp_path: Path, run: Callable[..., Done]
) -> None:
    found = [Finding("a", "note", "x [red]y[/red]", "do z"), Finding("b", "ok", "fine")]
    monkeypatch.setattr(checks, "examine", lambda *_: iter(found))
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert [Finding(**entry) for entry in json.loads(out)] == found
    assert json.loads(out) == [asdict(finding) for finding in found]


def test_problems_come_first_and_end_the_command_with_1(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]
) -> None:
    found = [Finding("fine", "ok", "all"), Finding("odd", "note", "some", "do x")]
    monkeypatch.setattr(checks, "examine", lambda *_: iter(found))
    assert run("doctor")[0] == 0
    found.append(Finding("bad", "problem", "[red] none", "do y"))
    code, out, _ = run("doctor")
    assert code == 1
    lines = out.splitlines()
    words = [line.split()[:2] for line in lines]
    assert words[0::2][:2] == [["problem", "bad"], ["note", "odd"]]
    assert words[1::2][:2] == [["do", "y"], ["do", "x"]]
    assert words[4:] == [["ok", "fine"], ["1", "problems,"]]
    assert "[red] none" in lines[0]
    assert lines[1].strip() == "do y"
    assert run("doctor", "--json")[0] == 1


def test_a_mistaken_option_ends_it_with_2(run: Callable[..., Done]) -> None:
    assert run("doctor", "--nosuch")[0] == 2


def test_the_advice_of_a_long_message_is_whole() -> None:
    path = "/" + "a folder/" * 40
    finding = error_finding("prior", WeightsError(f"{path}: holds no model files; give a complete model folder"))
    assert finding == Finding("prior", "problem", f"{path}: holds no model files", "give a complete model folder")
