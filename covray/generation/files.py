"""``covray generate``: example pairs and query pictures from files in, frames and answers as files out."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Sequence

from covray.chains.shard_rows import alphas_of
from covray.config import GenerateConfig, JsonObject
from covray.errors import ConfigError, PairError, one_line
from covray.generation.generator import Generator
from covray.generation.records import AnswerRecord, GenerationRecord, LogLikelihood
from covray.generation.request import Answer, Example, Request
from covray.generation.resolving import resolve_generator
from covray.io import storage
from covray.io.drawing import draw_strip
from covray.io.images import decode, encode_png
from covray.io.pixels import Picture
from covray.io.storage import Folder
from covray.models.lvm.adapter import WEIGHTS_FILE
from covray.models.lvm.decoding.requirements import require_trained_parts
from covray.progress import stage


def generate(config: GenerateConfig) -> GenerationRecord:
    """Answer ``config.queries``, and write what was answered.

    Every query gets a folder below ``config.out``, by the name of its file: ``strip.png`` (query, frames, answer),
    ``answer.png`` at the query's size, what its task exports, as ``classes.png`` or ``depth_m.npy``, and of a vote
    ``spread.png``, which is bright where the candidates disagree.

    Returns:
        What is written to ``generation.json``.

    Raises:
        CovrayError: Where it can be, before any model is loaded.
    """
    _require_out(config.out)
    # Every picture is opened before a model is loaded: a wrong file is refused at once, not after minutes.
    queries = tuple(_read_picture("--query", path) for path in config.queries)
    examples = tuple(_read_example(image, label) for image, label in config.examples)
    resolved = resolve_generator(config.generator())
    resolved.require_context(len(examples))
    request = Request(queries, examples, config.task, config.classes, config.sampling, config.seed)
    require_trained_parts(resolved.sampling_for(request), resolved.source.lora, config.adapter)
    with stage("loading the models"):
        generator = Generator(resolved)
    with stage(f"answering {len(queries)} queries with {len(examples)} examples"):
        answers = generator.answer(request)

    folder = Folder(config.out)
    records = []
    for name, query, answer in zip(_folder_names(config.queries), config.queries, answers, strict=True):
        files = answer_files(answer)
        for file, data in files.items():
            _write(folder, f"{name}/{file}", data)
        records.append(_answer_record(name, query, tuple(sorted(files)), answer))
    # Written last, so that a folder with this file is whole.
    record = GenerationRecord(
        config=_resolved_values(config, generator),
        fingerprints={**generator.fingerprints(), "adapter": _adapter_hash(config.adapter)},
        prompt_tokens=generator.prompt_tokens(request),
        answers=tuple(records),
    )
    try:
        record.write(config.out)
    except OSError as error:
        raise _cannot_write(folder.join(GenerationRecord.FILE), error) from error
    return record


def _require_out(out: str) -> None:
    storage.require_writable(out)
    # An earlier generation may be replaced; the files of anything else would be mixed with its answers.
    files = storage.list_files(out)
    if files and GenerationRecord.FILE not in files:
        raise ConfigError(f"--out {out}: holds files that are no generation of covray; give another folder")


def _read_picture(option: str, path: str) -> Picture:
    try:
        return decode(storage.read_bytes(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{option} {path}: is not there; give a picture file") from error
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({one_line(error)}); give a picture file") from error
    except PairError as error:
        raise ConfigError(f"{option} {path}: {error}; give another picture") from error


def _read_example(image: str, label: str) -> Example:
    """Return the encoded files, once both are known to be pictures."""
    for path in (image, label):
        _read_picture("--example", path)
    # The encoded bytes are kept: chains of examples are made as a build makes them, from files.
    return Example(storage.read_bytes(image), storage.read_bytes(label), f"--example {image} {label}")


def _resolved_values(config: GenerateConfig, generator: Generator) -> JsonObject:
    """Return ``config`` with all that the run decided, as JSON values."""
    resolved = generator.resolved
    update = {name: getattr(resolved.config, name) for name in type(resolved.config).model_fields}
    update["task"] = config.task or resolved.task
    return config.model_copy(update=update).model_dump(mode="json")


def _answer_record(folder: str, query: str, files: tuple[str, ...], answer: Answer) -> AnswerRecord:
    """Return what ``generation.json`` says of an answer; the number of samples only of a vote.

    Args:
        folder: Of the query's files.
        query: The picture file.
        files: Names of what was written.
        answer: What the model wrote.
    """
    *frames, of_answer = answer.log_likelihood
    record = AnswerRecord(
        query=query,
        folder=folder,
        files=files,
        seed=answer.seed,
        candidate=answer.candidate,
        log_likelihood=LogLikelihood(frames=tuple(frames), answer=of_answer),
    )
    # A field that is never set is left out of the file, which for single answers stays as it was before votes.
    if answer.spread is None:
        return record
    return record.model_copy(update={"samples": answer.samples})


def answer_files(answer: Answer) -> dict[str, bytes]:
    """Return the files of one query by name: its pictures, and the answer as its task exports it."""
    pictures = [answer.query, *answer.frames, answer.small]
    captions = ["query", *(f"α = {alpha:.3g}" for alpha in alphas_of(len(pictures))), "answer"]
    files = {"answer.png": encode_png(answer.picture)} | answer.data
    if answer.spread is not None:
        captions[-1] = f"vote of {answer.samples}"
        files["spread.png"] = encode_png(answer.spread)
    files["strip.png"] = draw_strip(pictures, captions)
    return files


def _folder_names(paths: Sequence[str]) -> list[str]:
    """Return a folder a query: the file's name without its ending, numbered where several have one."""
    names: list[str] = []
    for path in paths:
        # Queries of several folders may have one name; the second answer would replace the first.
        stem = posixpath.splitext(posixpath.basename(path))[0]
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _write(folder: Folder, name: str, data: bytes) -> None:
    try:
        folder.write_bytes(name, data)
    except OSError as error:
        raise _cannot_write(folder.join(name), error) from error


def _cannot_write(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"--out: {path} cannot be written ({one_line(error)}); give another folder")


def _adapter_hash(adapter: str | None) -> str | None:
    """Return the SHA-256 (hex) of the adapter's weights."""
    if adapter is None:
        return None
    return hashlib.sha256(storage.read_bytes(storage.join(adapter, "adapter", WEIGHTS_FILE))).hexdigest()
