"""``covray push``: a run, a dataset or an evaluation as one commit of a repository of the Hugging Face hub.

Files are uploaded first and belong to no revision until the commit that names all of them. So a push that ends anywhere
leaves the repository as it was: empty, or with what an earlier push gave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from covray.chains.dataset import ChainDataset
from covray.chains.records import Audit, DatasetRecord
from covray.config import recorded_section
from covray.config.section import JsonObject
from covray.errors import ConfigError, CovrayError, one_line
from covray.evaluation.records import EvaluationRecord, EvaluationResults
from covray.io.model_folders import NANO_NAMES
from covray.io.storage import Folder
from covray.models.lvm.adapter import read_run_adapter
from covray.progress import stage
from covray.sharing.cards import dataset_card, evaluation_card, model_card, require_licence
from covray.sharing.runs import scores_of
from covray.sharing.strips import chain_strips, evaluation_strips
from covray.training.records import RunRecord, TrainResult

TIMEOUT_S = 60.0
"""So long the hub may be silent in the middle of a request."""


class PushError(CovrayError):
    """Something that cannot be uploaded, or a hub that does not take it."""


@dataclass(frozen=True)
class Upload:
    """What a push uploads."""

    kind: Literal["model", "dataset"]
    card: str
    folder: Folder
    files: dict[str, str]
    """Names in the repository, with the file's name in the folder."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """Names in the repository, with PNG that the card shows."""


def push(
    source: str,
    repository: str,
    *,
    licence: str | None,
    public: bool = False,
    base_model: str | None = None,
    scores: str | None = None,
) -> JsonObject:
    """Upload a finished run, dataset or evaluation.

    Args:
        source: Its folder.
        repository: ``OWNER/NAME``; made if it is absent, private unless ``public``.
        licence: The hub's name of the licence.
        public: Whether a repository that is made now can be read by everybody.
        base_model: The hub's name of the backbone of a run; None: the one that it was trained from.
        scores: Folder of an evaluation whose table the card of a run shows.

    Returns:
        The address of the repository and of the commit, and the numbers of files and bytes.

    Raises:
        ConfigError: An option is missing or wrong.
        PushError: The hub refuses, stalls or limits.
        CovrayError: The folder is unfinished or damaged.
    """
    # All that can be refused is refused before the repository is made.
    licence = require_licence(licence)
    _require_name(repository)
    upload = prepare(source, licence, base_model, scores)
    with _hub_errors(repository):
        return _send(upload, repository, public)


def prepare(source: str, licence: str, base_model: str | None, scores: str | None) -> Upload:
    """Return what a push of ``source`` uploads. Raises CovrayError where it cannot be uploaded."""
    folder = Folder(source)
    kinds: dict[str, Callable[[], Upload]] = {
        RunRecord.FILE: lambda: _run(folder, licence, base_model, scores),
        DatasetRecord.FILE: lambda: _dataset(folder, licence),
        EvaluationRecord.FILE: lambda: _evaluation(folder, licence),
    }
    for file, make in kinds.items():
        if folder.exists(file):
            if file != RunRecord.FILE and (base_model is not None or scores is not None):
                raise ConfigError(f"--base-model and --scores: are of a run, and {source} is none; leave them out")
            return make()
    raise ConfigError(f"{source}: is no run, dataset or evaluation; give the --out of covray train, build or evaluate")


def _run(folder: Folder, licence: str, base_model: str | None, scores: str | None) -> Upload:
    record, result = RunRecord.read(folder), TrainResult.read_if_present(folder)
    if result is None:
        raise ConfigError(f"{folder.path}: is unfinished; run the same covray train again")
    read_run_adapter(folder.path)  # complete, or refused
    base = _base_model(folder, record, base_model)
    table, strips = scores_of(scores)
    files = {}
    for name in (folder / "adapter").list_files():
        # At the top for PEFT, and where covray reads a run; the hub stores equal files once.
        files[name] = f"adapter/{name}"
        files[f"adapter/{name}"] = f"adapter/{name}"
    for name in (RunRecord.FILE, TrainResult.FILE, "metrics.jsonl"):
        if folder.exists(name):
            files[name] = name
    return Upload("model", model_card(record, result, base, licence, table), folder, files, strips)


def _base_model(folder: Folder, record: RunRecord, base_model: str | None) -> str | None:
    """Return the hub's name of the backbone. Raises ConfigError where it has none, and is not the nano one."""
    path = base_model or recorded_section(record.config, "backbone").get("path")
    if path is None or path in NANO_NAMES:
        return None
    if _is_repository_name(path) and not Folder(path).exists():
        return path
    raise ConfigError(
        f"{folder.path}: its backbone is the folder {path}, which nobody else has; give --base-model OWNER/NAME of the "
        "same weights on the hub"
    )


def _dataset(folder: Folder, licence: str) -> Upload:
    dataset = ChainDataset(folder.path)
    files = {name: name for name in dataset.shards}
    if not files:
        raise ConfigError(f"{folder.path}: has no shards; build it again")
    for name in (DatasetRecord.FILE, Audit.FILE):
        files[name] = name
    strips = chain_strips(dataset)
    return Upload("dataset", dataset_card(dataset, None, (), licence, strips), folder, files, strips)


def _evaluation(folder: Folder, licence: str) -> Upload:
    results = EvaluationResults.read_if_present(folder)
    if results is None:
        raise ConfigError(f"{folder.path}: is unfinished; run the same covray evaluate again")
    # What of it there is: an evaluation without a page or a table is complete, too.
    strips = evaluation_strips(folder)
    card = evaluation_card(results, EvaluationRecord.read(folder).fingerprints, licence, strips)
    names = (EvaluationRecord.FILE, EvaluationResults.FILE, "index.html", "table.csv")
    files = {}
    for name in names:
        if folder.exists(name):
            files[name] = name
    for name in folder.list_files(".parquet"):
        if name.startswith("rows/"):
            files[name] = name
    return Upload("dataset", card, folder, files, strips)


def _send(upload: Upload, repository: str, public: bool) -> JsonObject:
    """Make the repository if it is absent, and commit all files at once."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _patience(), stage(f"uploading to {repository}"):
        where = api.create_repo(repository, repo_type=upload.kind, private=not public, exist_ok=True)
        # One commit of all operations: no reader sees half of a push.
        operations: list[Any] = [CommitOperationAdd("README.md", upload.card.encode())]
        for name, picture in upload.pictures.items():
            operations.append(CommitOperationAdd(name, picture))
        size = sum(map(len, upload.pictures.values()))
        for name, file in upload.files.items():
            data = _data_of(upload.folder, file)
            size += len(data) if isinstance(data, bytes) else _size(upload.folder, file)
            operations.append(CommitOperationAdd(name, data))
        present = api.list_repo_files(repository, repo_type=upload.kind)
        # What an earlier push left and this one does not have is deleted in the same commit.
        uploaded = {"README.md", ".gitattributes", *upload.files, *upload.pictures}
        for name in present:
            if name not in uploaded:
                operations.append(CommitOperationDelete(name))
        commit = api.create_commit(
            repository, operations, commit_message="Upload by covray push", repo_type=upload.kind, revision="main"
        )
    return {
        "repository": str(where),
        "commit": commit.oid,
        "files": len(upload.files) + len(upload.pictures) + 1,
        "bytes": size + len(upload.card.encode()),
        "private": not public,
    }


def _data_of(folder: Folder, name: str) -> str | bytes:
    """Return a local file's path, which the client reads in pieces; the bytes of a file elsewhere."""
    from pyarrow import fs

    if isinstance(folder.filesystem, fs.LocalFileSystem):
        return folder.inner_path(name)
    return folder.read_bytes(name)


def _size(folder: Folder, name: str) -> int:
    return int(folder.filesystem.get_file_info(folder.inner_path(name)).size)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Let the hub's client give up on a silent server, which it would wait for without end."""
    from huggingface_hub import get_session

    client = get_session()
    before, client.timeout = client.timeout, TIMEOUT_S
    try:
        yield
    finally:
        client.timeout = before


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn what the hub's client raises in the block into a PushError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PushError(f"{repository}: HF_HUB_OFFLINE is set; unset it to upload") from error
    except LocalTokenNotFoundError as error:
        raise PushError(
            f"{repository}: there is no token of the hub here; run hf auth login, or set HF_TOKEN"
        ) from error
    except (HTTPError, RuntimeError) as error:
        # An upload of a large file raises a RuntimeError, from what the hub answered or from nothing.
        cause: BaseException = error
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):
            cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            problem = _refusal(cause.response.status_code)
        elif isinstance(cause, HTTPError):
            problem = f"the hub cannot be reached, or stalls ({one_line(cause)}); run the same command again"
        else:
            problem = (
                f"the upload broke ({one_line(cause)}); run the same command again, with HF_HUB_DISABLE_XET=1 by plain "
                "HTTP"
            )
        raise PushError(f"{repository}: {problem}. Nothing was changed there") from error


def _refusal(status: int) -> str:
    """Return what an answer of the hub means for who pushes."""
    if status == 401:
        return "the hub knows no such token; run hf auth login, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there; give a token with write access, or a repository of your own"
    if status == 429:
        return "the hub limits your requests; wait some minutes and run the same command again"
    if status == 404:
        return "there is no such owner or repository; give OWNER/NAME of your own"
    if status == 413:
        return "a file is too large for the hub; build with fewer rows_per_block"
    return f"the hub answers {status}; run the same command again later"


def _is_repository_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _require_name(repository: str) -> None:
    if not _is_repository_name(repository):
        raise ConfigError(f"{repository}: is no name of a repository; give OWNER/NAME")
