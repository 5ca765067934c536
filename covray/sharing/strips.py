"""Strips of pictures for cards: what the chains of a dataset, or the answers of an evaluation, look like."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath

import numpy as np

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.config import EngineConfig, TokenizerConfig
from covray.errors import CovrayError
from covray.evaluation.records import STRIPS
from covray.io.drawing import draw_strip
from covray.io.storage import Folder
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer
from covray.progress import stage
from covray.tasks import table_order


def chain_strips(dataset: ChainDataset) -> dict[str, bytes]:
    """Return a chain of each task as PNG, by the name of its file; nothing where the tokenizer is not here any more.

    It is the first good chain of the task, with the frames of the first method.
    """
    config = TokenizerConfig.model_validate(dataset.config["tokenizer"])
    strips = {}
    try:
        tokenizer = load_tokenizer(config, EngineConfig(device="cpu"))
        require_same_tokens(dataset, tokenizer, config.path)
        for task in sorted(dataset.audit.per_task, key=table_order) if dataset.audit else ():
            with stage(f"drawing a chain of {task}"):
                strip = _strip(dataset, tokenizer, task)
            if strip is not None:
                strips[f"{STRIPS}/{task}.png"] = strip
    except CovrayError as error:
        logging.getLogger("covray").info("the card shows no chains: %s", error)
        return {}
    return strips


def evaluation_strips(folder: Folder) -> dict[str, bytes]:
    """Return the pictures of answers that an evaluation wrote, by their names; none where it wrote none."""
    names = [name for name in folder.list_files(".png") if name.startswith(f"{STRIPS}/")]
    names.sort(key=lambda name: table_order(PurePosixPath(name).stem))
    return {name: folder.read_bytes(name) for name in names}


def _strip(dataset: ChainDataset, tokenizer: Tokenizer, task: str) -> bytes | None:
    """Draw the first good chain of a task; None where it has none."""
    for row in dataset.rows(tasks=[task]):
        # One method is shown, the first of those that were built; pairs alone have no frames.
        all_frames = row["frames"] or []
        frames = []
        for frame in sorted(all_frames, key=lambda frame: frame["alpha"]):
            if frame["method"] == all_frames[0]["method"]:
                frames.append(frame)
        frame_tokens = [frame["tokens"] for frame in frames]
        frame_captions = [f"α = {frame['alpha']:.3g}" for frame in frames]
        tokens = np.stack([row["source"], *frame_tokens, row["label"]])
        captions = ["image", *frame_captions, "label"]
        return draw_strip(list(tokenizer.decode(tokens)), captions)
    return None
