"""One worker of an evaluation: episodes in, answers and their scores out. Knows no ray.

    query, example chains --LVM--> frames, answer --VQGAN--> pictures, at the label's own size --task--> scores

An episode's row follows from the configuration, its subject and its pair alone, not from its neighbours.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.chains.sentences import Chains
from covray.config import BackboneConfig, EvaluateConfig, SentencesConfig
from covray.errors import DatasetError, PairError
from covray.evaluation.baselines import nearest_label, saliency
from covray.evaluation.episodes import Episodes
from covray.evaluation.frames import frame_figures
from covray.evaluation.lpips import LEAST_PX, load_lpips
from covray.evaluation.metrics import OWN, REFERENCE
from covray.evaluation.scores import score
from covray.evaluation.subjects import SALIENCY, Subject
from covray.generation.models import LoadedModel, ModelSource
from covray.io import storage
from covray.io.images import decode, load_picture, resize, square
from covray.models.lvm.adapter import read_adapter
from covray.models.lvm.backbone import backbone_facts
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.pairs.manifest import check_manifest, read_manifest, read_meta, row_dicts
from covray.seeds import seed_of
from covray.tasks import TASKS, segmentation

EPISODE_SCHEMA = pa.schema(
    [("episode", pa.int64()), ("subject", pa.string()), ("task", pa.string()), ("pair_id", pa.int64())]
)
"""What there is to do."""
RESULT_SCHEMA = pa.schema(
    [
        *EPISODE_SCHEMA,
        ("examples", pa.list_(pa.int64())),  # pair ids, in the order of the sentence
        ("values", pa.list_(pa.struct([("metric", pa.string()), ("value", pa.float64())]))),  # null: undefined
        ("counts", pa.list_(pa.list_(pa.int64()))),  # what metrics of a whole set are made of; see ``scores``
        ("images", pa.list_(pa.list_(pa.uint16()))),  # tokens written: the frames, then the answer
        ("log_likelihood", pa.float64()),  # of the answer written, in nats
        ("error", pa.string()),
    ]
)
"""What was done, one row an episode."""
PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("task", pa.string()),
        ("image", pa.struct([("uri", pa.string()), ("bytes", pa.binary())])),
        ("label", pa.struct([("uri", pa.string()), ("bytes", pa.binary())])),
        ("meta", pa.string()),
    ]
)
_ROWS_AT_ONCE = 64

Tokens = NDArray[np.uint16]
Picture = NDArray[np.uint8]


class Runner:
    """Evaluates ``subjects`` on the pairs of ``queries``; ``examples`` are those that baselines look at.

    ``config`` is resolved. Raises CovrayError for a tokenizer that is not the dataset's.
    """

    def __init__(self, config: EvaluateConfig, subjects: Sequence[Subject], queries: str, examples: str):
        assert config.tokenizer is not None
        self.config, self.subjects = config, {subject.name: subject for subject in subjects}
        self.dataset = ChainDataset(config.data)
        self.tokenizer = load_tokenizer(config.tokenizer, config.engine)
        require_same_tokens(self.dataset, self.tokenizer, config.tokenizer.path)
        self._lpips = None if config.lpips is None else load_lpips(Path(config.lpips))
        self.fit = self.dataset.config.get("fit", "stretch")
        self._queries, self._examples = PairFile(queries), PairFile(examples)
        # One at a time: episodes come sorted by subject and task, and a large model fills a GPU.
        self._model = functools.lru_cache(maxsize=1)(self._load)
        self._chains = functools.lru_cache(maxsize=1)(self._load_chains)
        self._episodes = functools.lru_cache(maxsize=1)(self._load_episodes)
        self._labels = functools.lru_cache(maxsize=2)(self._load_labels)
        self._mean = functools.lru_cache(maxsize=4)(self._load_mean)

    def run(self, table: pa.Table) -> pa.Table:
        """The rows (``RESULT_SCHEMA``) of the episodes of ``table`` (``EPISODE_SCHEMA``), in its order."""
        rows = table.to_pylist()
        for subject, task in dict.fromkeys((row["subject"], row["task"]) for row in rows):
            mine = [row for row in rows if (row["subject"], row["task"]) == (subject, task)]
            who = self.subjects[subject]
            if who.method is None:
                for row in mine:
                    row["images"] = None
            else:
                self._write(who, mine)
            for row in mine:
                self._score(who, row)
        return pa.Table.from_pylist(rows, RESULT_SCHEMA)

    # --- what models write ---

    def _write(self, subject: Subject, rows: list[dict[str, Any]]) -> None:
        """Tokens, likelihoods and perplexities of one subject's episodes of one task."""
        assert subject.method is not None
        assert subject.length is not None
        model = self._model(subject.name)
        episodes, places = self._episodes(subject.name)
        prompts = []
        for row in rows:
            query = places[(row["task"], row["pair_id"])]
            chosen = episodes.rows(query)
            row["examples"] = episodes.examples.pair_ids[chosen].tolist()
            chains = self._with_frames(subject, episodes.examples, chosen)
            own = self._with_frames(subject, episodes.queries, np.array([query]))[0]
            prompts.append(np.concatenate([chains.reshape(-1), own[0]]))
            row["_chain"] = own
        seeds = [seed_of(self.config.seed, row["pair_id"]) for row in rows]
        images = subject.length - 1
        written = model.decoder.decode(np.empty(0, np.uint16), np.stack(prompts), images, self.config.sampling, seeds)
        for row, prompt, ids, likelihood in zip(rows, prompts, written.ids, written.image_log_likelihood, strict=True):
            row["images"], row["log_likelihood"] = ids.tolist(), float(likelihood[-1])
            answer = row["_chain"][-1]
            by_reference = model.answer_nats(np.concatenate([prompt, row["_chain"][1:-1].reshape(-1)]), answer)
            by_own = by_reference
            if images > 1:
                by_own = model.answer_nats(np.concatenate([prompt, ids[:-1].reshape(-1)]), answer)
            row["_nats"] = {OWN: by_own, REFERENCE: by_reference}

    def _load_episodes(self, name: str) -> tuple[Episodes, dict[tuple[str, int], int]]:
        subject = self.subjects[name]
        method = "none" if subject.method == SALIENCY else str(subject.method)
        queries, examples = self._chains(method, 2 if method == "none" else subject.length)
        selection = "focus" if subject.method == SALIENCY else self.config.selection
        episodes = Episodes(queries, examples, subject.pairs or 0, selection, self.config.seed, self.tokenizer.codebook)
        task = np.repeat(np.array(queries.tasks, object), np.diff(queries.starts))
        return episodes, {key: row for row, key in enumerate(zip(task, queries.pair_ids.tolist(), strict=True))}

    def _load_chains(self, method: str, length: int) -> tuple[Chains, Chains]:
        queries, examples = (
            Chains.load(
                self.dataset,
                SentencesConfig.model_validate(
                    {"method": method, "lengths": (length,), "pairs": (0,), "tasks": self.config.tasks}
                ),
                split,
            )
            for split in (self.config.split, self.config.example_split)
        )
        return queries, examples

    def _with_frames(self, subject: Subject, chains: Chains, rows: NDArray[np.int64]) -> Tokens:
        """The chains of ``rows``, uint16 [rows, length, tokens]."""
        found: Tokens = chains.tokens[rows]
        if subject.method != SALIENCY or not len(rows):
            return found
        maps = [saliency(picture) for picture in self.tokenizer.decode(found[:, 0])]
        return np.stack([found[:, 0], self.tokenizer.encode(np.stack(maps)), found[:, 1]], axis=1)

    def _load(self, name: str) -> LoadedModel:
        subject = self.subjects[name]
        backbone = BackboneConfig.model_validate(subject.backbone)
        facts = backbone_facts(backbone)
        if facts.fingerprint != subject.fingerprint:
            raise DatasetError(
                f"{name}: this node's backbone is {facts.fingerprint[:12]}, not {subject.fingerprint[:12]}"
            )
        adapter = None if subject.adapter is None else read_adapter(storage.join(subject.adapter, "adapter"))
        source = ModelSource(facts, backbone, adapter, self.config.seed)
        return LoadedModel.load(source, self.config.engine, self.tokenizer, self.config.batch)

    # --- pictures and scores ---

    def _score(self, subject: Subject, row: dict[str, Any]) -> None:
        """Fill ``values`` and ``counts``, or ``error``."""
        task = row["task"]
        try:
            pair = self._queries.read([row["pair_id"]])[0]
            label = self._picture(pair, "label", row["pair_id"])
            meta = read_meta(pair["meta"])
            answer, pictures = self._answer(subject, row, label, meta)
        except PairError as error:
            row["error"] = str(error)
            return
        large = min(label.shape[:2]) >= LEAST_PX
        found = score(task, answer, label, meta, self._lpips if large else None)
        values: dict[str, float | None] = dict(found.values)
        if row["images"] is not None:
            values |= row["_nats"]
            if len(pictures) > 1:
                query, *references = self.tokenizer.decode(row["_chain"][:-1])
                values |= frame_figures(query, pictures[:-1], pictures[-1], np.stack(references))
        row["values"] = [{"metric": metric, "value": value} for metric, value in values.items()]
        row["counts"] = None if found.counts is None else found.counts.tolist()

    def _answer(
        self, subject: Subject, row: dict[str, Any], label: Picture, meta: dict[str, Any]
    ) -> tuple[Picture, NDArray[np.uint8]]:
        """The answer at the label's size, and the pictures written, uint8 [images, s, s, 3]."""
        task, nothing = row["task"], np.empty((0, 0, 0, 3), np.uint8)
        resample, (height_px, width_px) = TASKS[task].resample, label.shape[:2]
        if row["images"] is not None:
            pictures = self.tokenizer.decode(np.asarray(row["images"]))
            return resize(pictures[-1], height_px, width_px, resample), pictures
        if subject.baseline == "copy":
            image = self._picture(self._queries.read([row["pair_id"]])[0], "image", row["pair_id"])
            return resize(image, height_px, width_px), nothing
        size_px = self.tokenizer.size_px
        if subject.baseline == "ceiling":
            read = self.tokenizer.decode(self.tokenizer.encode(square(label, size_px, self.fit, resample)[None]))
            return resize(read[0], height_px, width_px, resample), nothing
        ids, images, labels = self._labels(task)
        other = ids != row["pair_id"]
        if not other.any():
            raise PairError("no_examples", f"no example of {task} has pictures that can be read")
        if subject.baseline == "mean":
            # Of the row's meta only the classes decide how a label is read: all else would defeat the cache.
            reading = json.dumps({key: meta.get(key) for key in segmentation.META_KEYS})
            found = self._mean(task, None if other.all() else row["pair_id"], reading)
        else:
            image = self._picture(self._queries.read([row["pair_id"]])[0], "image", row["pair_id"])
            found = nearest_label(square(image, size_px, self.fit), images[other], labels[other])
        return resize(found, height_px, width_px, resample), nothing

    def _load_mean(self, task: str, without: int | None, reading: str) -> Picture:
        """Return the mean label of the examples of ``task``, but for pair ``without``; ``reading`` is meta as JSON."""
        ids, _, labels = self._labels(task)
        others = labels if without is None else labels[ids != without]
        return TASKS[task].mean(others, json.loads(reading))

    def _load_labels(self, task: str) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]:
        """Pair ids, images and labels of the examples of ``task`` at the tokenizer's size; without those unreadable."""
        size_px = self.tokenizer.size_px
        ids, images, labels = [], [], []
        for pair in self._examples.read(self._examples.ids_of(task)):
            try:
                image, label = (self._picture(pair, name, pair["pair_id"]) for name in ("image", "label"))
            except PairError:
                continue
            ids.append(pair["pair_id"])
            images.append(square(image, size_px, self.fit))
            labels.append(square(label, size_px, self.fit, TASKS[task].resample))
        sources, targets = (np.array(part, np.uint8).reshape(-1, size_px, size_px, 3) for part in (images, labels))
        return np.array(ids, np.int64), sources, targets

    def _picture(self, pair: dict[str, Any], name: str, pair_id: int) -> Picture:
        """A picture of the pair, of which with fit ``crop`` the centre square."""
        try:
            picture = decode(load_picture(pair[name] or {}, self._queries.root))
        except PairError as error:
            reason, _, detail = str(error).partition(": ")
            raise PairError(reason, f"{name}: {detail}") from error
        if self.fit == "crop":
            picture = square(picture, min(picture.shape[:2]), "crop")
        return picture

    def pictures_of(self, row: dict[str, Any]) -> tuple[Picture, NDArray[np.uint8], Picture, Picture]:
        """Query, frames, answer and label of a row of ``run``, for people to look at. Raises PairError."""
        subject = self.subjects[row["subject"]]
        pair = self._queries.read([row["pair_id"]])[0]
        query, label = (self._picture(pair, name, row["pair_id"]) for name in ("image", "label"))
        answer, pictures = self._answer(subject, row, label, read_meta(pair["meta"]))
        return query, pictures[:-1], answer, label


class PairFile:
    """Pairs of a manifest, picked for an evaluation: written once, read by any worker, a few rows at a time."""

    def __init__(self, path: str):
        self.path = path
        filesystem, inner = storage.resolve(path)
        with pq.ParquetFile(inner, filesystem=filesystem) as file:
            table = file.read(columns=["pair_id", "task"])
            metadata = file.schema_arrow.metadata or {}
        self.root: str | None = json.loads(metadata[b"covray.root"])
        self._ids, self._tasks = table["pair_id"].to_numpy(), table["task"].to_pylist()
        self._place = {pair_id: row for row, pair_id in enumerate(self._ids.tolist())}
        self._group = functools.lru_cache(maxsize=4)(self._read_group)

    def ids_of(self, task: str) -> list[int]:
        """The pairs of ``task``, in the order of the file."""
        return [pair_id for pair_id, of in zip(self._ids.tolist(), self._tasks, strict=True) if of == task]

    def read(self, pair_ids: Iterable[int]) -> list[dict[str, Any]]:
        """The rows (``PAIR_SCHEMA``) of ``pair_ids``. Raises KeyError for one that is not there."""
        places = [divmod(self._place[pair_id], _ROWS_AT_ONCE) for pair_id in pair_ids]
        return [self._group(group)[row] for group, row in places]

    def _read_group(self, number: int) -> list[dict[str, Any]]:
        filesystem, inner = storage.resolve(self.path)
        with pq.ParquetFile(inner, filesystem=filesystem) as file:
            return row_dicts(file.read_row_group(number))


def require_pairs(manifest: str, wanted: pa.Table) -> str | None:
    """The manifest's root; ManifestError where it cannot be used, DatasetError where it lacks pairs of ``wanted``."""
    info = check_manifest(manifest)
    missing = np.setdiff1d(wanted["pair_id"].to_numpy(), info.pair_ids)
    if len(missing):
        raise DatasetError(
            f"{manifest}: lacks {len(missing)} of the {len(wanted)} pairs to evaluate, pair {missing[0]} for one; "
            "give --manifest the one the dataset was built from"
        )
    return info.root


def write_pairs(path: str, manifest: str, root: str | None, wanted: pa.Table) -> None:
    """Write the rows of ``manifest`` that ``wanted`` (pair_id, task) names, in its order, for ``PairFile``."""
    ids = wanted["pair_id"].combine_chunks()
    rows = read_manifest(manifest, PAIR_SCHEMA.names)
    parts = [batch.filter(pc.is_in(batch.column("pair_id"), value_set=ids)) for batch in rows]
    found = pa.Table.from_batches(parts)
    order = pc.index_in(wanted["pair_id"], value_set=found["pair_id"].combine_chunks())
    metadata = {"covray.root": json.dumps(root)}
    buffer = pa.BufferOutputStream()
    pq.write_table(found.take(order).replace_schema_metadata(metadata), buffer, row_group_size=_ROWS_AT_ONCE)
    storage.write_bytes(path, buffer.getvalue().to_pybytes())


def choose_pairs(
    dataset: ChainDataset, tasks: Sequence[str] | None, split: str, count: int | None, seed: int, option: str
) -> pa.Table:
    """Good pairs of ``split`` (pair_id, task), at most ``count`` of a task, drawn by ``seed`` and the pair alone.

    Raises DatasetError where the split, or one of ``tasks``, has none.
    """
    table = dataset.table(["pair_id", "task"], tasks, split)
    there = set(table["task"].to_pylist())
    absent = [task for task in tasks or () if task not in there]
    if not len(table) or absent:
        splits = sorted(set(dataset.table(["split"], tasks)["split"].drop_null().to_pylist()))
        what = f"no good pairs of {', '.join(absent)}" if absent else "no good pairs"
        raise DatasetError(
            f"{dataset.path}: {what} in split {split}, only in {', '.join(splits) or 'none'}; set {option}"
        )
    rows = table.to_pylist()
    drawn = sorted(rows, key=lambda row: (row["task"], seed_of(seed, row["pair_id"])))
    taken: dict[str, int] = {}
    chosen = []
    for row in drawn:
        taken[row["task"]] = taken.get(row["task"], 0) + 1
        if count is None or taken[row["task"]] <= count:
            chosen.append(row)
    chosen.sort(key=lambda row: (row["task"], row["pair_id"]))
    return pa.Table.from_pylist(chosen, table.schema)
