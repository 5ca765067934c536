"""``covray push`` against a server that speaks the hub's protocol: what arrives, and what a bad hub leaves behind."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import snapshot_download
from PIL import Image

from covray.chains.dataset import ChainDataset
from covray.config import TrainConfig
from covray.errors import ConfigError, CovrayError
from covray.evaluation.records import EvaluationRecord, EvaluationResults
from covray.io import storage
from covray.models.lvm.adapter import read_run_adapter
from covray.sharing import hub as hub_module
from covray.sharing.hub import PushError, push
from covray.sharing.runs import export_run_with_card
from covray.training.run import train
from tests.support.commands import tokens_of
from tests.support.hub import WritableHub

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]
NAME = "owner/name"


def front_matter(card: bytes) -> dict[str, Any]:
    _, head, _ = card.decode().split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(head)
    return loaded


def test_chains_come_back_with_equal_tokens(write_dataset: Writer, writable_hub: WritableHub, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 6, "edges": 4}, rejects={1: "missing: gone"})
    Path(out, "view").mkdir()
    Path(out, "view", "index.html").write_text("left out")
    pushed = push(out, NAME, licence="cc-by-4.0")
    repository = writable_hub.repositories["dataset", NAME]
    assert repository.private
    assert pushed["private"]
    assert pushed["bytes"] == sum(len(data) for data in repository.files.values())
    assert not [name for name in repository.files if name.startswith("view")]
    card = front_matter(repository.files["README.md"])
    assert card["license"] == "cc-by-4.0"
    assert [config["config_name"] for config in card["configs"]] == ["depth", "edges"]
    for task in ("depth", "edges"):
        assert f"(strips/{task}.png)" in repository.files["README.md"].decode()
        width, height = Image.open(io.BytesIO(repository.files[f"strips/{task}.png"])).size
        assert width > 3 * height, "image, two frames and label, side by side"
    back = snapshot_download(NAME, repo_type="dataset", local_dir=tmp_path / "back")
    assert tokens_of(back) == tokens_of(out)
    assert ChainDataset(back).audit == ChainDataset(out).audit


def test_chains_whose_tokenizer_is_gone_are_pushed_without_pictures(
    write_dataset: Writer, writable_hub: WritableHub, caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = write_dataset({"depth": 4})
    description = storage.read_json(f"{out}/_dataset.json")
    description["config"]["tokenizer"]["path"] = f"{out}/gone"
    storage.write_json(f"{out}/_dataset.json", description)
    with caplog.at_level(logging.INFO, "covray"):
        push(out, NAME, licence="other")
    assert "the card shows no chains" in caplog.text
    files = writable_hub.repositories["dataset", NAME].files
    assert "strips/" not in files["README.md"].decode()
    assert not [name for name in files if name.startswith("strips")]


def test_a_second_push_leaves_nothing_of_the_first(write_dataset: Writer, writable_hub: WritableHub) -> None:
    out, _ = write_dataset({"depth": 6})
    push(out, NAME, licence="other")
    shard = next(Path(out).rglob("*.parquet"))
    shard.rename(shard.with_name("again.parquet"))
    push(out, NAME, licence="other", public=True)
    repository = writable_hub.repositories["dataset", NAME]
    assert {name for name in repository.files if name.endswith(".parquet")} == set(ChainDataset(out).shards)
    assert repository.private, "a repository that is there stays as it is"


def trained(tiny_config: Callable[..., TrainConfig]) -> TrainConfig:
    """Train a tiny run, and return its configuration."""
    config = tiny_config()
    train(config)
    record = {"config": config.model_dump(mode="json"), "identity": config.identity(), "mlflow_run_id": None}
    storage.write_json(f"{config.out}/_run.json", {"version": 1, **record, "fingerprints": {"backbone": "ab" * 32}})
    return config


def test_a_run_is_pushed_with_its_card(
    tiny_config: Callable[..., TrainConfig], writable_hub: WritableHub, tmp_path: Path
) -> None:
    config = trained(tiny_config)
    with pytest.raises(ConfigError, match=r"its backbone is the folder .* give --base-model"):
        push(config.out, NAME, licence="apache-2.0")
    push(config.out, NAME, licence="apache-2.0", base_model="someone/lvm")
    files = writable_hub.repositories["model", NAME].files
    card = files["README.md"].decode()
    assert front_matter(files["README.md"])["base_model"] == "someone/lvm"
    assert "ab" * 32 in card
    assert "Validation loss" in card
    assert str(tmp_path) not in card, "a card names no folder of this machine"
    assert files["adapter_model.safetensors"] == files["adapter/adapter_model.safetensors"]
    back = snapshot_download(NAME, local_dir=tmp_path / "back")
    sent, received = read_run_adapter(config.out)[1], read_run_adapter(str(back))[1]
    assert sent.keys() == received.keys()
    assert all(sent[name].equal(received[name]) for name in sent)


def write_evaluation(folder: Path) -> dict[str, bytes]:
    """A finished evaluation with the pictures of two tasks; returns them by their names."""
    about = {"episodes": 3, "primary": "abs_rel", "metrics": ["abs_rel"]}
    score = {"task": "depth", "subject": "run", "metric": "abs_rel", "mean": 0.25, "low": 0.2, "high": 0.3}
    results = {
        "version": 1, "config": {"data": str(folder)}, "fingerprints": {"codebook": "c0de" * 16}, "seconds": 1.0,
        "subjects": [{"name": "run", "kind": "adapter", "about": "a run"}], "tasks": {"depth": about},
        "scores": [score | {"episodes": 3}], "lower_is_better": ["abs_rel"], "differences": [], "failed": [],
    }  # fmt: skip
    EvaluationResults.model_validate(results).write(str(folder))
    record = EvaluationRecord(config={}, identity={}, fingerprints={}, subjects=[], mlflow_run_id=None)
    record.write(str(folder))
    pictures = {}
    for number, task in enumerate(("depth", "edges")):
        picture = io.BytesIO()
        Image.new("RGB", (20, 10 + number)).save(picture, "PNG")
        pictures[f"strips/{task}.png"] = picture.getvalue()
        storage.write_bytes(str(folder / "strips" / f"{task}.png"), picture.getvalue())
    (folder / "other.png").write_bytes(b"no picture of the evaluation")
    return pictures


def test_cards_of_an_evaluation_and_of_the_run_it_scores_show_its_answers(
    tiny_config: Callable[..., TrainConfig], writable_hub: WritableHub, tmp_path: Path
) -> None:
    config = trained(tiny_config)
    scores = tmp_path / "scores"
    pictures = write_evaluation(scores)
    push(str(scores), NAME, licence="other")
    push(config.out, NAME, licence="other", base_model="someone/lvm", scores=str(scores))
    exported = tmp_path / "exported"
    export_run_with_card(config.out, str(exported), merge=False, scores=str(scores))
    here = {str(file.relative_to(exported)): file.read_bytes() for file in exported.rglob("*.*")}
    pushed = [writable_hub.repositories[kind, NAME].files for kind in ("dataset", "model")]
    for files in (*pushed, here):
        card = files["README.md"].decode()
        assert "| depth | abs_rel (lower is better) | run | 0.25 | 0.2 to 0.3 | 3 |" in card
        for name, picture in pictures.items():
            assert files[name] == picture
            assert f"query, frames, answer, label]({name})" in card
        assert "other.png" not in files
    push(config.out, NAME, licence="other", base_model="someone/lvm")
    files = writable_hub.repositories["model", NAME].files
    assert not [name for name in files if name.startswith("strips")]
    assert "query, frames, answer" not in files["README.md"].decode()


def test_a_run_is_not_exported_with_the_scores_of_no_evaluation(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = trained(tiny_config)
    with pytest.raises(CovrayError, match=r"_evaluation\.json|results\.json"):
        export_run_with_card(config.out, str(tmp_path / "out"), merge=False, scores=str(tmp_path))
    assert not (tmp_path / "out").exists(), "refused before anything is written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"licence": None}, "--licence: is required"),
        ({"licence": "My Licence!"}, "is no name of the hub"),
        ({"licence": "other", "repository": "name"}, "give OWNER/NAME"),
        ({"licence": "other", "base_model": "a/b"}, "--base-model and --scores: are of a run"),
    ],
)
def test_a_mistake_is_refused_before_the_hub_is_asked(
    write_dataset: Writer, writable_hub: WritableHub, options: dict[str, Any], message: str
) -> None:
    out, _ = write_dataset({"depth": 4})
    repository = options.pop("repository", NAME)
    with pytest.raises(ConfigError, match=message):
        push(out, repository, **options)
    assert not writable_hub.repositories
    with pytest.raises(ConfigError, match="is no run, dataset or evaluation"):
        push(str(Path(out).parent), NAME, licence="other")


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("/api/repos/create", 403, "the token may not write there"),
        ("/preupload/", 401, "hf auth login"),
        ("/objects/batch", 429, "the hub limits your requests"),
        ("/upload/", 0, "the hub cannot be reached, or stalls"),
        ("/commit/main", 0, "the hub cannot be reached, or stalls"),
        ("/commit/main", 500, "the hub answers 500"),
    ],
)
def test_a_bad_hub_is_one_line_and_leaves_nothing_that_looks_whole(
    write_dataset: Writer,
    writable_hub: WritableHub,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    status: int,
    message: str,
) -> None:
    out, _ = write_dataset({"depth": 4})
    monkeypatch.setattr(hub_module, "TIMEOUT_S", 0.2)
    writable_hub.faults[fault] = status
    with pytest.raises(PushError, match=message) as error:
        push(out, NAME, licence="other")
    assert "\n" not in str(error.value)
    assert "Nothing was changed there" in str(error.value)
    for repository in writable_hub.repositories.values():
        assert list(repository.files) == [".gitattributes"]
    writable_hub.faults.clear()
    push(out, NAME, licence="other")
    assert writable_hub.repositories["dataset", NAME].files["_audit.json"]
