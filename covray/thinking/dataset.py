"""Folders of features, read by row in any order.

    _features.json   tokenizer/   shards/split=NAME/*.parquet   _result.json

A shard has a row group for each picture, so that a training reads the few of a step without the rest.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from covray.errors import DatasetError, one_line
from covray.io.storage import Folder
from covray.models.aligner.records import FeaturesOrigin
from covray.thinking.records import FeaturesRecord, FeaturesResult

SHARDS = "shards"
TOKENIZER = "tokenizer"
"""The folder of the vision-language model's tokenizer, so that a training needs no more of that model."""
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), False),
        pa.field("split", pa.string(), False),
        pa.field("uri", pa.string()),
        pa.field("bytes", pa.binary()),
        pa.field("caption", pa.string(), False),
    ]
)
"""What the actors read: a picture and its caption."""
FEATURE_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), False),
        pa.field("split", pa.string(), False),
        pa.field("text", pa.string()),
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("features", pa.binary()),
        pa.field("count", pa.int32(), False),
        pa.field("error", pa.string()),
    ]
)
"""A row of a shard; docs/formats.md describes it."""
PARQUET = {"row_group_size": 1, "use_dictionary": False, "write_statistics": False, "compression": "none"}
"""How shards are written: features are not repeated, and a row can be read alone."""
_TEXT_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("error", pa.string()),
        pa.field("file", pa.string()),
        pa.field("group", pa.int32()),
    ]
)
"""Rows without their features, and where these are."""
_KNOWN_FILES = 256
_READERS = 8


class FeatureDataset:
    """A finished folder of features."""

    def __init__(self, path: str):
        """Read what the folder says of itself.

        Raises:
            DatasetError: The folder is not finished, or is none.
        """
        self.path = path
        self._folder = Folder(path)
        record = FeaturesRecord.read_if_present(self._folder)
        if record is None:
            raise DatasetError(f"{path}: holds no features; give the --out of a covray think features")
        self.record = record
        # Written last: without it the features are not complete.
        self.result = FeaturesResult.read(self._folder)

    @property
    def variant(self) -> str:
        """Whose features they are: ``lvlm`` or ``clip``."""
        return str(self.record.identity["variant"])

    @property
    def places(self) -> str:
        """Whose states the features are: those of the ``text``, or of the ``prompt``."""
        return str(self.record.identity.get("places", "text"))

    @property
    def of(self) -> str:
        """What the features are of: ``pictures`` or ``episodes``."""
        return str(self.record.identity.get("of", "pictures"))

    def about(self) -> FeaturesOrigin:
        """Return how the features were taken, as an aligner's record has it."""
        keys = ("variant", "vlm", "patches") if self.variant == "clip" else ("variant", "vlm", "thought", "places")
        return FeaturesOrigin.model_validate({key: self.record.config[key] for key in keys})

    def digest(self) -> str:
        """Return a SHA-256 (hex) of what decides the features."""
        deciding = {"identity": self.record.identity, "fingerprints": self.record.fingerprints}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Any:
        """Return the tokenizer of the vision-language model, which wrote the texts; None of a vision tower.

        Raises:
            DatasetError: Its files are missing or cannot be read.
        """
        if self.variant == "clip":
            return None
        # transformers reads local folders only; the features may lie on any storage.
        inner = self._folder / TOKENIZER
        with tempfile.TemporaryDirectory() as local:
            try:
                for name in inner.list_files():
                    Path(local, name).write_bytes(inner.read_bytes(name))
                return AutoTokenizer.from_pretrained(local, trust_remote_code=False, local_files_only=True)
            except (OSError, ValueError, ImportError) as error:
                raise DatasetError(
                    f"{inner.path}: cannot be loaded ({one_line(error)}); take the features again"
                ) from error

    def of_split(self, split: str, fewest_tokens: int = 1, most: int | None = None) -> FeatureRows:
        """Return the rows of a split that have features, sorted by id: the layout of the shards changes nothing.

        Args:
            split: The split.
            fewest_tokens: Rows whose text has fewer tokens are left out; 1 for a vision tower.
            most: Rows at most, the first.

        Raises:
            DatasetError: There are none, or a shard cannot be read.
        """
        tables = list(map(self._read_texts, self._shards(split)))
        rows = pa.concat_tables(tables) if tables else _TEXT_SCHEMA.empty_table()
        # Failed samples have an error and no features.
        usable = pc.is_null(rows["error"])
        if self.variant == "lvlm":
            usable = pc.and_(usable, pc.greater_equal(pc.list_value_length(rows["ids"]), fewest_tokens))
        rows = rows.filter(usable).sort_by("sample")[:most]
        if not len(rows):
            present = ", ".join(self.result.per_split) or "none"
            raise DatasetError(f"{self.path}: split {split} has no features to use; its splits are {present}")
        return FeatureRows(self._folder, self.record.width, rows)

    def longest(self, split: str) -> int:
        """Return the most features that a row of a split has. Raises DatasetError."""
        counts = [0]
        for name in self._shards(split):
            inner = self._folder.inner_path(name)
            table = pq.read_table(inner, columns=["count"], filesystem=self._folder.filesystem, partitioning=None)
            counts += table["count"].to_pylist()
        return max(counts)

    def _shards(self, split: str) -> list[str]:
        """Return the names of a split's shards."""
        names = []
        for name in self._folder.list_files(".parquet"):
            folder, _, _ = name.rpartition("/")
            # Arrow escapes characters in the names of folders: "split=train%20set".
            if urllib.parse.unquote(folder) == f"{SHARDS}/split={split}":
                names.append(name)
        return names

    def _read_texts(self, name: str) -> pa.Table:
        """Return the rows of a shard without their features, each with its place."""
        inner = self._folder.inner_path(name)
        columns = ["sample", "text", "ids", "error"]
        try:
            table = pq.read_table(inner, columns=columns, filesystem=self._folder.filesystem, partitioning=None)
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DatasetError(
                f"{self.path}/{name}: cannot be read ({one_line(error)}); take the features again"
            ) from error
        # A row group holds one row: its number says where the features are.
        places = {"file": pa.array([inner] * len(table)), "group": pa.array(range(len(table)), pa.int32())}
        for key, values in places.items():
            table = table.append_column(key, values)
        return table.cast(_TEXT_SCHEMA)


class FeatureRows:
    """Rows whose texts are in memory; their features are read when they are asked for."""

    def __init__(self, folder: Folder, width: int, rows: pa.Table):
        """Open nothing yet."""
        self._folder, self._width, self._rows = folder, width, rows
        self._metadata: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def numbers(self) -> dict[int, int]:
        """Return the number of each row by its id."""
        return {sample: number for number, sample in enumerate(self._rows["sample"].to_pylist())}

    def text(self, number: int) -> str:
        """Return the text of a row."""
        return str(self._rows["text"][number].as_py())

    def ids(self, number: int) -> NDArray[np.int64]:
        """Return the tokens of the text of a row, [n]."""
        return np.array(self._rows["ids"][number].as_py(), np.int64)

    def features(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return the features of rows, float32 [n, width] each.

        Raises:
            DatasetError: A shard cannot be read.
        """
        with ThreadPoolExecutor(max(1, min(_READERS, len(numbers)))) as readers:
            return list(readers.map(self._read, numbers))

    def _read(self, number: int) -> Tensor:
        name, group = self._rows["file"][number].as_py(), self._rows["group"][number].as_py()
        # The footer of a file is read once: later reads ask for one row group alone.
        with self._lock:
            known = self._metadata.get(name)
        try:
            with self._folder.filesystem.open_input_file(name) as opened:
                file = pq.ParquetFile(opened, metadata=known)
                column = file.read_row_group(group, ["features"])["features"]
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DatasetError(f"{name}: cannot be read ({one_line(error)}); take the features again") from error
        with self._lock:
            self._metadata[name] = file.metadata
            if len(self._metadata) > _KNOWN_FILES:
                self._metadata.popitem(last=False)
        return unpack(column[0].as_py(), self._width)


def pack(features: Tensor) -> bytes:
    """Return features [n, width] as the bytes of a shard."""
    # Little-endian by name: a shard means the same on every machine.
    halves: NDArray[np.float16] = features.detach().float().cpu().numpy().astype("<f2")
    return halves.tobytes()


def unpack(data: bytes, width: int) -> Tensor:
    """Return the features of a shard's bytes, float32 [n, width]."""
    halves = np.frombuffer(data, np.dtype("<f2")).reshape(-1, width)
    return torch.from_numpy(halves.astype(np.float32))


def read_table(out: str, columns: list[str]) -> pa.Table:
    """Return columns of the rows of the folder ``out``, finished or not.

    Raises:
        DatasetError: A shard cannot be read.
    """
    folder = Folder(out)
    files = []
    for name in folder.list_files(".parquet"):
        if name.startswith(f"{SHARDS}/"):  # the list of samples is a Parquet file, too
            files.append(folder.inner_path(name))
    if not files:
        return pa.table({name: pa.array([], FEATURE_SCHEMA.field(name).type) for name in columns})
    try:
        partitioning = ds.partitioning(pa.schema([("split", pa.string())]), flavor="hive")
        dataset = ds.dataset(files, FEATURE_SCHEMA, "parquet", folder.filesystem, partitioning)
        return dataset.to_table(columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{out}: a shard cannot be read ({one_line(error)}); delete it, and run again") from error
