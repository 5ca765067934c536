"""``covray.load_chains``: the rows of a dataset in Python, with pictures on demand, as Arrow, pandas and PyTorch."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.chains.loading import Chains
from covray.chains.sentences import Sentences
from covray.chains.shard_rows import ShardRow, alphas_of
from covray.config import EngineConfig, SentencesConfig, TokenizerConfig
from covray.errors import ConfigError
from covray.io.drawing import draw_strip, html_picture
from covray.methods import NO_FRAMES
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import pandas as pd

NO_LOSS = -100
"""The label of a token that carries no loss, as PyTorch's and transformers' losses ignore it."""
_ANY_CONTEXT = 2**62
"""Tokens of a context that no sentence exceeds."""


def load_chains(
    path: str | os.PathLike[str],
    *,
    tasks: Iterable[str] | None = None,
    split: str | None = None,
    errors: bool = False,
) -> ChainTable:
    """Open the chains that a finished build wrote. Tokens are read, and pictures decoded, when they are asked for.

    Args:
        path: The ``--out`` of a ``covray build``, on any storage.
        tasks: Only rows of these tasks.
        split: Only rows of this split.
        errors: Also rejected rows, which have no pictures.

    Raises:
        ConfigError: ``tasks`` is a name in place of a list.
        DatasetError: There is no dataset, or it is unfinished.
    """
    # A name is iterable, too: its letters would be tasks that no row has.
    if isinstance(tasks, str):
        raise ConfigError(f"tasks: {tasks!r} is one name; give a list of them, such as [{tasks!r}]")
    dataset = ChainDataset(os.fspath(path))
    return ChainTable(dataset, None if tasks is None else tuple(tasks), split, errors)


class ChainTable:
    """The rows of a dataset, in the order of its files.

    Iteration holds a thousand rows in memory; ``len``, an index, Arrow and pandas read all rows once.
    """

    def __init__(self, dataset: ChainDataset, tasks: tuple[str, ...] | None, split: str | None, errors: bool):
        """Show rows of ``dataset``; see ``load_chains``."""
        self.dataset = dataset
        self._tasks, self._split, self._errors = tasks, split, errors

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.to_arrow())

    def __iter__(self) -> Iterator[ChainRow]:
        """Yield the rows."""
        for values in self.dataset.rows(None, self._tasks, self._split, errors=self._errors):
            yield ChainRow(self, values)

    def __getitem__(self, index: int) -> ChainRow:
        """Return a row by its number; negative ones count from the end."""
        table = self.to_arrow()
        number = index
        # As Python's lists: -1 is the last row.
        if index < 0:
            number += len(table)
        if not 0 <= number < len(table):
            raise IndexError(f"index {index}: there are {len(table)} rows")
        # Arrow returns tokens as lists; `rows` yields arrays, and so must this.
        values = table.slice(number, 1).to_pylist()[0]
        for end in ("source", "label"):
            values[end] = _tokens(values[end])
        for frame in values["frames"] or ():
            frame["tokens"] = _tokens(frame["tokens"])
        return ChainRow(self, values)

    @cached_property
    def _table(self) -> pa.Table:
        return self.dataset.table(None, self._tasks, self._split, errors=self._errors)

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table with the columns of a shard (docs/formats.md)."""
        return self._table

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a DataFrame with the columns of a shard; tokens are NumPy arrays."""
        frame: pd.DataFrame = self._table.to_pandas()
        return frame

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the dataset was built with, which decodes its pictures; loaded once.

        Raises:
            WeightsError: It cannot be loaded.
            DatasetError: What is there now has another codebook.
        """
        config = TokenizerConfig.model_validate(self.dataset.config["tokenizer"])
        tokenizer = load_tokenizer(config, EngineConfig())
        require_same_tokens(self.dataset, tokenizer, config.path)
        return tokenizer

    @property
    def lengths(self) -> tuple[int, ...]:
        """The chain lengths that were built, ascending."""
        return tuple(sorted(self.dataset.config["lengths"]))

    @property
    def method(self) -> str:
        """How frames are made where a call does not say: ``diffusion``, else ``linear``, else the first that was built.

        ``none`` where none was.
        """
        built = self.dataset.methods
        # Controls such as ``copy`` come first in the alphabet; nobody means them by default.
        for preferred in ("diffusion", "linear"):
            if preferred in built:
                return preferred
        return next(iter(built), NO_FRAMES)

    def sentences(self, config: SentencesConfig | None = None, *, seed: int = 0) -> SentenceDataset:
        """Return visual sentences of the chains, as ``covray train`` makes them with the same settings and seed.

        Args:
            config: Which sentences; by default one example, all lengths that were built, and ``method``, of the tasks
                and the split that this table shows (without one, ``train``). The sentences of a given ``config`` do not
                depend on what this table shows.
            seed: Which pairs meet follows from it.

        Raises:
            DatasetError: A frame was not built, or a task has too few pairs for a sentence.
        """
        if config is None:
            values = {"lengths": self.lengths, "method": self.method, "tasks": self._tasks}
            config = SentencesConfig.model_validate(values | {"split": self._split or "train"})
        # The context is a backbone's; here there is none.
        chains = Chains.load(self.dataset, config, config.split)
        return SentenceDataset(Sentences(chains, config, _ANY_CONTEXT, seed))


@dataclass(frozen=True, eq=False)
class ChainRow:
    """The chains of one pair."""

    table: ChainTable
    values: ShardRow
    """The columns of its row, with tokens as uint16 arrays."""

    @property
    def pair_id(self) -> int:
        """The number of the pair in its manifest."""
        return int(self.values["pair_id"])

    @property
    def task(self) -> str:
        """The task of the pair."""
        return str(self.values["task"])

    @property
    def split(self) -> str:
        """The split of the pair; empty without one."""
        return self.values["split"] or ""

    @property
    def error(self) -> str | None:
        """Why the pair was rejected; None for a good one."""
        error: str | None = self.values["error"]
        return error

    def tokens(self, length: int | None = None, method: str | None = None) -> NDArray[np.uint16]:
        """Return the chain, uint16 [length, tokens per picture], from the image to the label.

        Args:
            length: Pictures, both ends counted; None: the longest that was built.
            method: How the frames were made; None: ``table.method``.

        Raises:
            DatasetError: Such frames were not built, or the pair was rejected.
        """
        if length is None:
            length = self.table.lengths[-1]
        return self.table.dataset.chain(self.values, length, method or self.table.method)

    def pictures(self, length: int | None = None, method: str | None = None) -> tuple[Image.Image, ...]:
        """Return the pictures of ``tokens(length, method)``, decoded by the dataset's tokenizer."""
        decoded = self.table.tokenizer.decode(self.tokens(length, method))
        return tuple(Image.fromarray(picture) for picture in decoded)

    @property
    def image(self) -> Image.Image:
        """The image of the pair, as its tokens show it."""
        return self.pictures(2)[0]

    @property
    def label(self) -> Image.Image:
        """The label of the pair as a picture, as its tokens show it."""
        return self.pictures(2)[-1]

    def _repr_html_(self) -> str:
        """Show the chain in a notebook."""
        if self.error is not None:
            return f"<p>pair {self.pair_id} of {html.escape(self.task)} was rejected: {html.escape(self.error)}</p>"
        pictures = [np.asarray(picture) for picture in self.pictures()]
        captions = ["image", *(f"α = {alpha:.3g}" for alpha in alphas_of(len(pictures))), "label"]
        return html_picture(draw_strip(pictures, captions), f"a chain of {self.task}")


class SentenceDataset(Dataset[dict[str, Tensor]]):
    """Visual sentences for a ``torch.utils.data.DataLoader``: every pair is the query of one sentence an epoch.

    An item has ``ids``, int64 [tokens], and ``labels``, the same with -100 where a token carries no loss. Set ``epoch``
    before each pass: other pairs meet in the next one. Sentences differ in length where they draw from several lengths
    or numbers of examples; collate them then, or take a batch of one.
    """

    def __init__(self, sentences: Sentences):
        """Show the sentences of an epoch; see ``ChainTable.sentences``."""
        self._sentences = sentences
        self.epoch = 0
        """The epoch, from 0."""

    def __len__(self) -> int:
        """Return the sentences of an epoch."""
        return len(self._sentences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the sentence of a number from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index}: an epoch has {len(self)} sentences")
        sentence = self._sentences.sentence(self.epoch * len(self) + index)
        ids = torch.from_numpy(sentence.ids.astype(np.int64))
        # A loss that ignores NO_LOSS reads the labels as they are.
        labels = torch.full_like(ids, NO_LOSS)
        loss_at = torch.from_numpy(sentence.loss_at)
        labels[loss_at] = ids[loss_at]
        return {"ids": ids, "labels": labels}


def _tokens(values: list[int] | None) -> NDArray[np.uint16] | None:
    if values is None:
        return None
    return np.array(values, np.uint16)
