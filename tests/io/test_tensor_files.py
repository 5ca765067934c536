"""Weight files of any age are read, without running code from them; the layouts are tested with their converters."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from covray.errors import WeightsError
from covray.io.tensor_files import new_folder, read_all_tensors, read_tensors, weight_files

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[1.5]], dtype=torch.bfloat16),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "number": torch.tensor(3, dtype=torch.int64),
}


class Malice:
    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.touched),)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 3])
def test_pytorch_files_of_any_age_are_read(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    """Before PyTorch 1.6 they were no zip archives."""
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    assert (file.read_bytes()[:2] == b"PK") == is_zip
    assert same(read_tensors(file), torch.load(file, weights_only=True))
    assert same(read_tensors(file), TENSORS)
    torch.save({"epoch": 3, "model": TENSORS}, file, _use_new_zipfile_serialization=is_zip)
    assert same(read_tensors(file, keys=("ema", "model")), TENSORS)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_only_the_unsafe_reader_knows_is_told(tmp_path: Path, is_zip: bool) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=is_zip, pickle_protocol=4)
    with pytest.raises(WeightsError, match=r"pickled by protocol 4 or later, .*; give its tensors alone"):
        read_tensors(file)


def test_nothing_in_an_old_file_runs(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS | {"more": Malice(tmp_path / "ran")}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"needs posix\.mkdir, and covray runs no code"):
        read_tensors(file)
    assert not (tmp_path / "ran").exists()


def test_an_old_file_that_was_cut_is_one_line_wherever_it_was(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin: .*; g") as raised:
            read_tensors(file)
        assert "\n" not in str(raised.value)


def test_what_is_no_pytorch_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for data in (b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"", b"\x80\x02}q\x00."):
        file.write_bytes(data)
        with pytest.raises(WeightsError, match="is not a PyTorch file"):
            read_tensors(file)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for number, tensors in enumerate(({"a": torch.zeros(2)}, {"b": torch.ones(2)}, {"a": torch.ones(2)})):
        save_file(tensors, tmp_path / f"{number}.safetensors")
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    assert read_all_tensors(files[:2]).keys() == {"a", "b"}
    with pytest.raises(WeightsError, match=r"2\.safetensors: a is also in another file"):
        read_all_tensors(files)


def test_the_files_of_a_model_are_those_that_its_index_lists(tmp_path: Path) -> None:
    names = ("model.safetensors", "model.safetensors.index.json")
    assert weight_files(tmp_path, names) == []
    (tmp_path / names[1]).write_text('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}')
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(WeightsError, match=r"y\.safetensors is missing"):
        weight_files(tmp_path, names)
    (tmp_path / "y.safetensors").touch()
    assert [file.name for file in weight_files(tmp_path, names)] == ["x.safetensors", "y.safetensors"]
    (tmp_path / names[0]).touch()
    assert [file.name for file in weight_files(tmp_path, names)] == ["model.safetensors"]


@pytest.mark.parametrize(("umask", "of_files", "of_folders"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_a_new_folder_is_readable_as_the_umask_says(tmp_path: Path, umask: int, of_files: int, of_folders: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "model") as draft:
            (draft / "unet").mkdir()
            save_file({"a": torch.zeros(2)}, draft / "unet" / "a.safetensors")  # 600 by itself
            (draft / "config.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"model": of_folders, "unet": of_folders, "a.safetensors": of_files, "config.json": of_files}


def test_a_new_folder_may_be_the_working_folder_or_the_target_of_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), tmp_path / "link"):
        with new_folder(out) as draft:
            (draft / "config.json").write_text("{}")
    files = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.json"))
    assert files == ["here/config.json", "there/config.json"]
    assert (tmp_path / "link").is_symlink()


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a\.bin: cannot be read \(No such file or directory\)"):
        read_tensors(tmp_path / "a.bin")
