from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covray.chains.dataset import ChainDataset
from covray.config import EngineConfig, TokenizerConfig
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer
from covray.report.contact_sheets import ChainPictures, decode_chains, draw_sheet, quality_lines

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def tokenizer(vqgan_folder: Path) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(path=str(vqgan_folder)), EngineConfig())


def _flat(level: int) -> np.ndarray:
    return np.full((8, 8, 3), (level, 255 - level, 77), np.uint8)


def _chain(methods: tuple[str, ...], **quality: float | None) -> ChainPictures:
    frames = {method: np.stack([_flat(50 + 20 * i), _flat(60 + 20 * i)]) for i, method in enumerate(methods)}
    return ChainPictures(
        pair_id=-7,
        task="depth",
        split="train",
        source=_flat(10),
        label=_flat(200),
        frames=frames,
        alphas=(1 / 3, 2 / 3) if methods else (),
        quality=quality,
    )


def _levels(line: np.ndarray) -> list[int]:
    """The flat pictures that a row or column of pixels crosses, in order."""
    levels = [int(red) for red, green, blue in line if blue == 77 and int(red) + int(green) == 255]
    return [level for index, level in enumerate(levels) if index == 0 or level != levels[index - 1]]


def test_a_sheet_shows_each_chain_from_source_to_label_a_band_a_method() -> None:
    chains = [_chain(("diffusion", "linear")), _chain(("diffusion", "linear"))]
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet(chains, "Depth"))))
    bands = [levels for row in sheet if len(levels := _levels(row)) == 4]
    distinct = [levels for index, levels in enumerate(bands) if index == 0 or levels != bands[index - 1]]
    assert distinct == [[10, 50, 60, 200], [10, 70, 80, 200]] * 2
    assert len(bands) == 4 * 128  # every tile is shown at 128 px


def test_a_sheet_without_methods_shows_the_two_ends() -> None:
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet([_chain(())], "Depth"))))
    assert [10, 200] in [_levels(row) for row in sheet]


def test_figures_that_were_not_taken_are_left_out() -> None:
    chain = _chain(("linear",), source_noise_rms=1.0, label_noise_rms=0.914, source_psnr=None, linear_path=1.0)
    assert quality_lines(chain) == [("noise |z|/√d", "source 1.00 · label 0.91"), ("path / direct way", "linear 1.00")]


def test_decoded_chains_are_the_datasets_tokens(write_dataset: Writer, tokenizer: Tokenizer) -> None:
    out, written = write_dataset({"depth": 6, "edges": 1}, lengths=(3, 4), rejects={0: "missing: gone"})
    chains = decode_chains(ChainDataset(out), tokenizer, limit_per_task=2)
    assert [chain.task for chain in chains] == ["edges", "depth", "depth"], "in the order of the paper's table"
    by_id = {row["pair_id"]: row for row in written}
    for chain in chains:
        row = by_id[chain.pair_id]
        assert "error" not in row
        assert np.array_equal(chain.source, tokenizer.decode(np.array([row["source"]]))[0])
        assert np.array_equal(chain.label, tokenizer.decode(np.array([row["label"]]))[0])
        for frame in row["frames"]:
            shown = chain.frames[frame["method"]][chain.alphas.index(frame["alpha"])]
            assert np.array_equal(shown, tokenizer.decode(np.array([frame["tokens"]]))[0])
