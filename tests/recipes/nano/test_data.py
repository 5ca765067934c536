"""Training pictures: made once, the same for the same seed, and none of them from the held-out split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from covray.pairs.scenes import render_scene, scene_seed
from covray.recipes.nano import data
from covray.tasks.colorization import grey


def test_pictures_are_made_once_and_are_those_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = np.array(data.pictures(tmp_path / "a", "train", 1, 2, 0))
    assert first.shape == (8 + 6, 64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(data.pictures(tmp_path / "b", "train", 1, 2, 0), first)

    def never(*_: object) -> Iterator[np.ndarray]:
        raise AssertionError("rendered again")

    with monkeypatch.context() as patched:
        patched.setattr(data, "render_scene", never)
        assert np.array_equal(data.pictures(tmp_path / "a", "train", 1, 2, 0), first)
    for other in (("val", 1, 2, 0), ("train", 1, 2, 1)):
        found = data.pictures(tmp_path / "a", *other)
        assert not (found[:, None] == first[None]).all(axis=(2, 3, 4))[:, :3].any()


def test_a_rendering_in_parts_is_the_same_and_goes_on_after_the_last_whole_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.array(data.pictures(tmp_path / "whole", "train", 3, 1, 0))
    monkeypatch.setattr(data, "PART_SCENES", 2)
    render, rendered = data.render_scene, []

    def counted(seed: int, *rest: int) -> list:
        rendered.append(seed)
        if len(rendered) == 3:
            raise KeyboardInterrupt
        return render(seed, *rest)

    monkeypatch.setattr(data, "render_scene", counted)
    with pytest.raises(KeyboardInterrupt):
        data.pictures(tmp_path / "parts", "train", 3, 1, 0)
    assert np.array_equal(data.pictures(tmp_path / "parts", "train", 3, 1, 0), whole)
    assert len(rendered) == 4  # two whole, one that was killed and made again
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["train-3-1-0.npy"]


def test_another_training_may_render_the_same_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.array(data.pictures(tmp_path / "whole", "train", 3, 0, 0))
    monkeypatch.setattr(data, "PART_SCENES", 2)
    render, save, other = data.render_scene, np.save, []

    def render_in_both(seed: int, *rest: int) -> list:
        if not other and list(tmp_path.glob("both/*.npy")):  # the first part is there
            other.append(True)
            data.pictures(tmp_path / "both", "train", 3, 0, 0)
        return render(seed, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(data, "render_scene", render_in_both)
        assert np.array_equal(data.pictures(tmp_path / "both", "train", 3, 0, 0), whole)
    assert other
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["train-3-0-0.npy"]

    def save_in_both(file: Path, array: np.ndarray) -> None:
        save(file, array)
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda: -1)  # another process
            patched.setattr(np, "save", save)
            data.pictures(tmp_path / "saved", "train", 1, 0, 0)

    monkeypatch.setattr(np, "save", save_in_both)
    assert np.array_equal(data.pictures(tmp_path / "saved", "train", 1, 0, 0), whole[:8])
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["train-1-0-0.npy"]


def test_a_batch_is_inputs_then_labels_then_crops() -> None:
    scenes = np.zeros((5, 8, 4, 4, 3), np.uint8) + np.arange(8, dtype=np.uint8)[None, :, None, None, None]
    scenes += 10 * np.arange(5, dtype=np.uint8)[:, None, None, None, None]
    crops = np.full((2, 3, 4, 4, 3), 200, np.uint8)
    flat = np.concatenate((scenes.reshape(-1, 4, 4, 3), crops.reshape(-1, 4, 4, 3)))
    corpus = data.Pictures.of(flat, 2)
    pictures = corpus.batch(16, torch.Generator().manual_seed(0), torch.device("cpu"))
    values = (pictures[:, 0, 0, 0] * 255).round().int().tolist()
    assert pictures.shape == (16, 3, 4, 4)
    assert all(value % 10 in data.INPUT_KINDS for value in values[:6])
    assert all(value % 10 >= 3 for value in values[6:14])
    assert values[14:] == [200, 200]


def test_a_rendering_that_was_stopped_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        Path(path).write_bytes(b"part of it")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(OSError, match="full"):
            data.pictures(tmp_path, "train", 1, 0, 0)
    assert data.pictures(tmp_path, "train", 1, 0, 0).shape == (8, 64, 64, 3)


def test_a_scene_is_its_colour_its_two_sources_and_five_labels() -> None:
    (pictures,) = data.scene_pictures("train", [0], 0)
    view = render_scene(scene_seed(0, "train", 0))[0]
    assert pictures.shape == (8, 64, 64, 3)
    assert np.array_equal(pictures[0], view.colour)
    assert np.array_equal(pictures[1], grey(view.colour))
    assert pictures[2].mean() < 0.7 * pictures[0].mean()
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_crops_are_a_photograph_its_grey_and_its_dark() -> None:
    crops = list(data.photo_pictures(len(data.PHOTOGRAPHS), 0))
    for colour, flat, dark in crops:
        assert np.array_equal(flat, grey(colour))
        assert dark.mean() < colour.mean()
    assert len({crop[0].tobytes() for crop in crops}) == len(crops)


def test_photographs_are_installed_and_the_held_out_are_others() -> None:
    assert not set(data.PHOTOGRAPHS) & set(data.HELD_OUT_PHOTOGRAPHS)
    for name in (*data.PHOTOGRAPHS, *data.HELD_OUT_PHOTOGRAPHS):
        assert data.photograph_path(name).is_file(), name
