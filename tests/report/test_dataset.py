from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, DatasetError
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.report.dataset import view
from tests.support.pages import Page

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]
HOSTILE = "missing: </td><script>alert(1)</script><img src=http://evil/x onerror=alert(2)> & \"'"


def test_the_page_holds_every_picture_to_the_pixel(write_dataset: Writer, tmp_path: Path, vqgan_folder: Path) -> None:
    out, written = write_dataset({"depth": 3, "edges": 2})
    paths = view(out, str(tmp_path / "view"))
    assert paths == [str(tmp_path / "view" / name) for name in ("edges.png", "depth.png", "index.html")]
    shown = {picture.tobytes() for picture in Page(Path(paths[-1]).read_text()).pictures()}
    tokens = [ids for row in written for ids in (row["source"], row["label"], *(f["tokens"] for f in row["frames"]))]
    tokenizer = load_tokenizer(TokenizerConfig(path=str(vqgan_folder)), EngineConfig())
    assert shown == {picture.tobytes() for picture in tokenizer.decode(np.array(tokens))}


def test_hostile_text_stays_text(write_dataset: Writer, tmp_path: Path) -> None:
    out, rows = write_dataset({"depth": 3, "edges": 2}, rejects={1: HOSTILE, 4: "<u>line</u>: reason"})
    source = Path(view(out, str(tmp_path / "view"))[-1]).read_text()
    page = Page(source)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "u" not in tags
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert any(HOSTILE.removeprefix("missing: ") in text for text in page.texts)
    assert "<u>line</u>" in page.texts
    assert str(rows[1]["pair_id"]) in page.texts


def test_the_page_loads_nothing_and_runs_only_its_own_script(write_dataset: Writer, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 2}, rejects={0: HOSTILE})
    page = Page(Path(view(out, str(tmp_path / "view"))[-1]).read_text())
    page.require_self_contained()


def test_an_unfinished_dataset_can_be_seen_and_says_so(write_dataset: Writer, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 2}, finished=False)
    Path(out, "shards", "task=depth", "torn.parquet").write_bytes(b"PAR1")
    page = Page(Path(view(out, str(tmp_path / "view"))[-1]).read_text())
    assert "unfinished" in page.texts
    assert "1 shards that cannot be read" in page.texts


def test_a_dataset_of_rejects_only_is_a_page_without_pictures(write_dataset: Writer, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 2}, rejects={0: "missing: a", 1: "missing: b"})
    paths = view(out, str(tmp_path / "view"))
    assert len(paths) == 1
    page = Page(Path(paths[0]).read_text())
    assert page.pictures() == []
    assert "2 pairs without tokens" in page.texts


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_decoded(
    write_dataset: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = write_dataset({"depth": 2})
    (tmp_path / "file.txt").write_text("mine")
    monkeypatch.setattr("covray.report.dataset.load_tokenizer", lambda *_: pytest.fail("a model was loaded"))
    for taken in (str(tmp_path / "file.txt"), str(tmp_path / "file.txt" / "view"), "/proc/view"):
        with pytest.raises(ConfigError, match=f"^--out {taken}: cannot be written"):
            view(out, taken)
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_another_tokenizer_is_refused(write_dataset: Writer, tmp_path: Path, vqgan_folder: Path) -> None:
    from diffusers import VQModel

    out, _ = write_dataset({"depth": 2})
    model = VQModel.from_pretrained(vqgan_folder)
    model.quantize.embedding.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(DatasetError, match="its codebook is"):
        view(out, str(tmp_path / "view"), tokenizer=TokenizerConfig(path=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="32 gives 64 tokens a picture"):
        view(out, str(tmp_path / "view"), tokenizer=TokenizerConfig(path=str(vqgan_folder), size_px=32))
    assert not (tmp_path / "view").exists()
