"""``covray.load_chains``: rows, pictures, Arrow, pandas and sentences are those that the readers and trainings see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from covray.chains.loading import Chains
from covray.chains.sentences import Sentences
from covray.chains.table import load_chains
from covray.config import EngineConfig, SentencesConfig, TokenizerConfig
from covray.errors import ConfigError, DatasetError
from covray.io import storage
from covray.models.tokenizer.vqgan import load_tokenizer
from tests.support.datasets import TOKENS

WriteDataset = Callable[..., tuple[str, list[dict[str, Any]]]]


def test_rows_are_those_of_the_dataset(write_dataset: WriteDataset) -> None:
    path, rows = write_dataset({"depth": 5, "pose": 4}, rejects={2: "empty: zero bytes"})
    chains = load_chains(Path(path))
    good = [row for row in rows if "error" not in row]
    assert len(chains) == len(good) == 8
    assert [row.pair_id for row in chains] == [row["pair_id"] for row in good]
    assert [chains[number].pair_id for number in range(8)] == [row["pair_id"] for row in good]
    for row, expected in zip(chains, good, strict=True):
        assert (row.task, row.split, row.error) == (expected["task"], expected["split"], None)
        tokens = row.tokens()
        assert tokens.dtype == np.uint16
        assert np.array_equal(tokens, chains.dataset.chain(row.values, 4, "diffusion"))
        assert np.array_equal(tokens[0], expected["source"])
    for number in (0, -1):
        assert np.array_equal(chains[number].tokens(4, "linear"), list(chains)[number].tokens(4, "linear"))
    assert [row.task for row in load_chains(path, tasks=["pose"], split="val")] == ["pose"]
    with pytest.raises(IndexError, match="there are 8 rows"):
        chains[8]


def test_controls_are_not_the_frames_that_are_meant_by_default(write_dataset: WriteDataset) -> None:
    path, _ = write_dataset({"depth": 3}, methods=("copy", "diffusion", "linear"))
    assert load_chains(path).method == "diffusion"


def test_what_names_no_chains_is_refused(write_dataset: WriteDataset) -> None:
    path, _ = write_dataset({"depth": 3})
    with pytest.raises(ConfigError, match=r"one name; give a list of them, such as \['depth'\]"):
        load_chains(path, tasks="depth")
    for length in (0, 1):
        with pytest.raises(DatasetError, match=f"a chain of {length} cannot be"):
            load_chains(path)[0].tokens(length)


def test_arrow_and_pandas_hold_the_same(write_dataset: WriteDataset) -> None:
    path, rows = write_dataset({"depth": 3})
    chains = load_chains(path)
    table, frame = chains.to_arrow(), chains.to_pandas()
    assert table["pair_id"].to_pylist() == [row["pair_id"] for row in rows] == list(frame["pair_id"])
    assert list(frame.columns) == table.column_names
    assert np.array_equal(np.stack(frame["label"]), [row["label"] for row in rows])


def test_pictures_are_decoded_when_they_are_asked_for(
    write_dataset: WriteDataset, vqgan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = write_dataset({"depth": 3}, lengths=(3, 4))
    tokenizer = load_tokenizer(TokenizerConfig(path=str(vqgan_folder)), EngineConfig())
    with monkeypatch.context() as patched:
        patched.setattr("covray.chains.table.load_tokenizer", None)
        row = load_chains(path)[1]
        row.tokens()
        load_chains(path).to_pandas()
    expected = tokenizer.decode(row.tokens(3, "linear"))
    assert np.array_equal([np.array(picture) for picture in row.pictures(3, "linear")], expected)
    assert len(row.pictures()) == 4
    ends = tokenizer.decode(np.array([rows[1]["source"], rows[1]["label"]], np.uint16))
    assert np.array_equal(row.image, ends[0])
    assert np.array_equal(row.label, ends[1])
    assert 'src="data:image/png;base64,' in row._repr_html_()


def test_a_rejected_row_says_why_and_has_no_pictures(write_dataset: WriteDataset) -> None:
    path, _ = write_dataset({"depth": 3}, rejects={1: "not_an_image: <b>"})
    chains = load_chains(path, errors=True)
    assert len(chains) == 3
    row = chains[1]
    assert row.error == "not_an_image: <b>"
    assert "&lt;b&gt;" in row._repr_html_()
    with pytest.raises(DatasetError, match="was rejected"):
        row.pictures()


def test_sentences_are_those_of_a_training(write_dataset: WriteDataset) -> None:
    path, _ = write_dataset({"depth": 8, "pose": 8}, lengths=(3, 4))
    config = SentencesConfig(method="linear", lengths=(3, 4), pairs=(1, 2), loss="chain")
    chains = load_chains(path)
    dataset = chains.sentences(config, seed=7)
    trained = Sentences(Chains.load(chains.dataset, config, "train"), config, 4096, seed=7)
    assert len(dataset) == len(trained) == 12
    for epoch in (0, 2):
        dataset.epoch = epoch
        for index in range(len(dataset)):
            expected = trained.sentence(epoch * len(trained) + index)
            item = dataset[index]
            assert np.array_equal(item["ids"], expected.ids)
            assert np.array_equal(torch.nonzero(item["labels"] != -100).ravel(), expected.loss_at)
            assert torch.equal(item["labels"][expected.loss_at], item["ids"][expected.loss_at])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_loader_batches_sentences_of_one_length(write_dataset: WriteDataset) -> None:
    path, _ = write_dataset({"depth": 8})
    batches = list(DataLoader(load_chains(path).sentences(), batch_size=3))
    assert [tuple(batch["ids"].shape) for batch in batches] == [(3, 8 * TOKENS), (3, 8 * TOKENS)]
    of_val = load_chains(path, split="val")
    with pytest.raises(DatasetError, match="a sentence of 2"):
        of_val.sentences(SentencesConfig(split="val", pairs=(2,)))
    assert len(of_val.sentences()) == 2


def test_what_is_no_finished_dataset_is_refused(write_dataset: WriteDataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no _dataset\.json"):
        load_chains(tmp_path / "none")
    path, _ = write_dataset({"depth": 3}, finished=False)
    with pytest.raises(DatasetError, match="is unfinished"):
        load_chains(path)


def test_a_tokenizer_that_is_another_now_is_refused(write_dataset: WriteDataset) -> None:
    path, _ = write_dataset({"depth": 3})
    description = storage.read_json(f"{path}/_dataset.json")
    description["fingerprints"]["codebook"] = "0" * 64
    storage.write_json(f"{path}/_dataset.json", description)
    with pytest.raises(DatasetError, match="codebook"):
        load_chains(path)[0].pictures()
