"""Cards: the README.md of a run, a dataset or an evaluation on the Hugging Face hub, made from their records."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

import yaml
from pydantic import JsonValue

from covray.chains.dataset import ChainDataset
from covray.config import JsonObject, recorded_section
from covray.errors import ConfigError
from covray.evaluation.records import EvaluationResults
from covray.tasks.base import Meta
from covray.training.records import RunRecord, TrainResult

_VERSION = str(vars(sys.modules["covray"])["__version__"])  # an import of the package's names would reach Ray
_PLACES = frozenset({"data", "manifest", "out", "pairs", "noise_from", "root", "uri"})
"""Keys of configurations that say where something is on the machine of whoever ran the command."""
_NOT_STATED = "not stated: ask before you use it"


def require_licence(licence: str | None) -> str:
    """Return the licence as the hub names it, such as ``apache-2.0`` or ``other``.

    Raises:
        ConfigError: None is given, or it is no identifier.
    """
    if licence is None:
        raise ConfigError("--licence: is required to upload; give the hub's name of one, such as apache-2.0 or other")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ConfigError(
            f"--licence {licence}: is no name of the hub; give one such as apache-2.0, cc-by-4.0 or other"
        )
    return licence


def dataset_card(
    dataset: ChainDataset, form: str | None, splits: Sequence[str], licence: str | None, strips: Collection[str] = ()
) -> str:
    """Return the card of a dataset.

    Args:
        dataset: The dataset.
        form: The format that it was exported in; None: covray's own folder.
        splits: The splits of the exported files.
        licence: The hub's name of its licence.
        strips: Names of the pictures of its chains, ``strips/TASK.png``, beside the card.
    """
    audit = dataset.audit
    assert audit is not None
    tasks = sorted(audit.per_task)
    head: JsonObject = {"tags": ["covray", "chain-of-vision"], "pretty_name": "Chains of vision"}
    if licence is not None:
        head["license"] = licence
    if form is None:
        # The hub shows a table for each task.
        configs: list[JsonValue] = []
        for task in tasks:
            shards: list[JsonValue] = [{"split": "all", "path": f"shards/**/task={task}/*.parquet"}]
            configs.append({"config_name": task, "data_files": shards})
        head["configs"] = configs
    elif form == "datasets":
        files: list[JsonValue] = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
        head["configs"] = [{"config_name": "default", "data_files": files}]

    lines = [
        "# Chains of vision",
        "",
        f"Pairs of an image and its label, and frames between them, as tokens of a VQGAN, by covray {_VERSION}.",
        "",
        _READING[form],
        "",
        "| task | pairs | rejected |",
        "|---|---|---|",
    ]
    for task in tasks:
        counts = audit.per_task[task]
        lines.append(f"| {task} | {counts.written} | {counts.rejected} |")
    alphas = ", ".join(f"{alpha:.4g}" for alpha in dataset.alphas)
    frames = f"{', '.join(dataset.methods) or 'none'}, at alpha {alphas}"
    lines += [
        "",
        f"- A picture has {dataset.tokens_per_image} tokens and {dataset.record.tokenizer_size_px} px a side; the "
        f"codebook has {dataset.record.codes or 'an unknown number of'} codes.",
        f"- Chain lengths: {', '.join(map(str, dataset.config['lengths']))}. Frames: {frames}.",
        f"- Licence: {licence or _NOT_STATED}.",
    ]
    classes: Meta | None = dataset.record.classes
    if classes is not None:
        lines.append(f"- Classes of segmentation: {', '.join(map(str, classes.get('classes', ())))}.")
    if strips:
        lines += ["", "## Chains", "Decoded from their tokens: one of each task."]
        for name in strips:
            lines.append(f"\n![{PurePosixPath(name).stem}: image, frames, label]({name})")
    lines += ["", *_fingerprints(dataset.fingerprints), "", *_configuration(dataset.config)]
    return _card(head, lines)


_READING: dict[str | None, str] = {
    None: 'The folder is covray\'s own: `covray inspect hf://datasets/OWNER/NAME`. `load_dataset("OWNER/NAME", TASK)` '
    "reads the rows of a task, of which `split` is a column.",
    "datasets": "`load_dataset(FOLDER)` of Hugging Face's `datasets` reads it, a row a pair: `source`, `label` "
    "and `frames` are tokens.",
    "webdataset": "Tars for WebDataset: a sample has `json`, and `tokens.npy`, uint16 [pictures, tokens], from the "
    "image over the frames of `json` to the label.",
    "mds": "Shards for mosaicml-streaming, a folder a split: `tokens` is uint16 [pictures, tokens], from the image "
    "over the frames of `about` to the label.",
}


def model_card(
    record: RunRecord, result: TrainResult, base_model: str | None, licence: str | None, scores: str = ""
) -> str:
    """Return the card of an adapter.

    Args:
        record: What the run was trained from.
        result: What it reached.
        base_model: The backbone's name on the hub; None where it has none, as the nano backbone.
        licence: The hub's name of the licence.
        scores: A table of an evaluation, as ``score_table`` makes it, and pictures of its answers.
    """
    head: JsonObject = {"library_name": "peft", "tags": ["covray", "chain-of-vision", "lora"]}
    if licence is not None:
        head["license"] = licence
    backbone = recorded_section(record.config, "backbone")
    if base_model is not None:
        head |= {"base_model": base_model, "base_model_relation": "adapter"}
    sentences = recorded_section(record.config, "sentences")
    lines = [
        "# A LoRA adapter for chains of vision",
        "",
        "It teaches a language model of visual tokens to write the frames between an image and its label, and then the "
        f"label. Trained by covray {_VERSION}: `covray generate --adapter FOLDER`.",
        "",
        f"- Backbone: {base_model or 'scale ' + str(backbone['scale'])}.",
        f"- Chains of {', '.join(map(str, sentences['lengths']))} pictures by {sentences['method']}, after "
        f"{', '.join(map(str, sentences['pairs']))} example pairs.",
        f"- {result.steps} steps, {result.tokens} tokens, {result.epochs:.3g} epochs; the adapter is that of step "
        f"{result.adapter_step}.",
        f"- Loss of the last step: {result.loss:.4f} nats a token.",
    ]
    if result.validation_loss is not None:
        lines.append(
            f"- Validation loss: {result.validation_loss_before:.4f} before, {result.validation_loss:.4f} after."
        )
    lines.append(f"- Licence: {licence or _NOT_STATED}.")
    # A run without a codebook in its backbone's folder has no fingerprint of it.
    present = {name: value for name, value in record.fingerprints.items() if value is not None}
    lines += ["", scores, "", *_fingerprints(present), "", *_configuration(record.config)]
    return _card(head, lines)


def evaluation_card(
    results: EvaluationResults, fingerprints: dict[str, str], licence: str | None, strips: Collection[str] = ()
) -> str:
    """Return the card of an evaluation.

    Args:
        results: Its table.
        fingerprints: SHA-256 (hex) of what it was made from.
        licence: The hub's name of its licence.
        strips: Names of the pictures of its answers, ``strips/TASK.png``, beside the card.
    """
    head: JsonObject = {"tags": ["covray", "chain-of-vision", "evaluation"]}
    if licence is not None:
        head["license"] = licence
    lines = [
        "# An evaluation of chains of vision",
        "",
        f"`index.html` shows the episodes, `results.json` holds every figure. Written by covray {_VERSION}.",
        "",
        score_table(results) + answer_pictures(strips),
        "",
        f"- Licence: {licence or _NOT_STATED}.",
        "",
        *_fingerprints(fingerprints),
        "",
        *_configuration(results.config),
    ]
    return _card(head, lines)


def score_table(results: EvaluationResults) -> str:
    """Return the means of an evaluation by each task's primary metric, with their 95% intervals, as Markdown."""
    lines = ["| task | metric | subject | mean | 95% interval | episodes |", "|---|---|---|---|---|---|"]
    for score in results.scores:
        task = results.tasks[score.task]
        if score.metric != task.primary:
            continue
        mean = "undefined" if score.mean is None else f"{score.mean:.4g}"
        interval = ""
        if score.low is not None and score.high is not None:
            interval = f"{score.low:.4g} to {score.high:.4g}"
        better = "lower" if score.metric in results.lower_is_better else "higher"
        lines.append(
            f"| {score.task} | {score.metric} ({better} is better) | {_cell(score.subject)} | {mean} | {interval} "
            f"| {score.episodes} |"
        )
    return "\n".join(lines)


def answer_pictures(strips: Collection[str]) -> str:
    """Return the pictures of answers as Markdown, to follow a table; empty without any."""
    if not strips:
        return ""
    lines = [
        "",
        "",
        "The best, the median and the worst episode of each task, by the first adapter's score. Frames are what the "
        "model writes between the query and its answer; the label is what the answer is scored by.",
    ]
    lines += [f"\n![{PurePosixPath(name).stem}: query, frames, answer, label]({name})" for name in strips]
    return "\n".join(lines)


def without_places(config: JsonObject) -> JsonObject:
    """Return a configuration without the paths of the machine that it ran on."""
    shared: JsonObject = {}
    for key, value in config.items():
        if key in _PLACES:
            continue
        if isinstance(value, dict):
            shared[key] = without_places(value)
        # Other keys may hold a folder, too: absolute paths are those of a machine.
        elif not (isinstance(value, str) and value.startswith(("/", "~"))):
            shared[key] = value
    return shared


def _configuration(config: JsonObject) -> list[str]:
    text = yaml.safe_dump(without_places(config), sort_keys=False, allow_unicode=True)
    return ["## Configuration", "```yaml", text.rstrip(), "```"]


def _fingerprints(fingerprints: dict[str, str]) -> list[str]:
    lines = ["## Fingerprints", "SHA-256 of what it was made from:", ""]
    for name, value in fingerprints.items():
        if value:  # what was not used has none
            lines.append(f"- {_cell(name)}: `{value}`")
    return lines


def _cell(text: str) -> str:
    """Return ``text`` for a cell of a table: names of subjects are the user's."""
    return re.sub(r"[|\r\n`]", " ", text)


def _card(head: JsonObject, lines: list[str]) -> str:
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    body = "\n".join(lines).rstrip()
    return f"---\n{front}---\n\n{body}\n"
