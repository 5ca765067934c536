"""Who stands in the table, in which order and under which name; and every mistake about them, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covray.chains.dataset import ChainDataset
from covray.config import BackboneConfig, EvaluateConfig
from covray.errors import ConfigError, CovrayError, DatasetError, WeightsError
from covray.evaluation.subjects import Subject, subjects_of
from covray.io import storage
from tests.support.backbones import write_llama

Write = Callable[..., Any]


@pytest.fixture
def subjects(config_of: Write) -> Callable[..., list[Subject]]:
    def subjects(data: str, **options: Any) -> list[Subject]:
        config: EvaluateConfig = config_of(data, **options)
        return list(subjects_of(config, ChainDataset(data)))

    return subjects


def names(found: list[Subject]) -> list[str]:
    return [subject.name for subject in found]


def forms(found: list[Subject]) -> list[tuple[str, str | None, int | None, int | None]]:
    return [(one.name, one.method, one.length, one.pairs) for one in found]


def test_everyone_stands_in_the_order_of_the_table(
    subjects: Write, write_dataset: Write, write_run: Write, llama_folder: Path
) -> None:
    data, _ = write_dataset({"depth": 4}, lengths=(3, 4))
    runs = [
        write_run(data, "plain", method="none"),
        write_run(data, "chains", method="diffusion", lengths=(3, 4), pairs=(1, 2)),
    ]
    found = subjects(data, adapters=(runs[0], f"called={runs[1]}"))
    assert forms(found) == [
        ("copy of the query", None, None, None),
        ("mean label", None, None, None),
        ("nearest label", None, None, None),
        ("untuned none", "none", 2, 1),
        ("untuned diffusion", "diffusion", 4, 2),
        ("Chain-of-Focus", "saliency", 3, 2),
        ("plain", "none", 2, 1),
        ("called", "diffusion", 4, 2),
        ("VQGAN ceiling", None, None, None),
    ]
    assert [one.kind for one in found] == [*["baseline"] * 3, *["untuned"] * 2, "focus", *["adapter"] * 2, "ceiling"]
    assert [one.adapter for one in found if one.adapter] == runs
    models = [one for one in found if one.method]
    assert len({one.fingerprint for one in models}) == 1
    assert all(one.backbone and one.backbone.path == str(llama_folder) for one in models)


def test_the_untuned_backbone_stands_once_for_every_form_of_chain(
    subjects: Write, write_dataset: Write, write_run: Write
) -> None:
    data, _ = write_dataset({"depth": 4}, lengths=(3, 4))
    kept: dict[str, Any] = {"baselines": ()}
    three = write_run(data, "three", method="linear", lengths=(3,))
    again = write_run(data, "again", method="linear", lengths=(3,))
    four = write_run(data, "four", method="linear", lengths=(4,))
    two_pairs = write_run(data, "two", method="linear", lengths=(3,), pairs=(2,))
    assert names(subjects(data, adapters=(three, again), **kept)) == ["untuned", "three", "again"]
    assert names(subjects(data, adapters=(three, four), **kept))[:2] == ["untuned linear L=3", "untuned linear L=4"]
    assert names(subjects(data, adapters=(three, two_pairs), **kept))[:2] == [
        "untuned linear L=3 1 pairs", "untuned linear L=3 2 pairs",
    ]  # fmt: skip
    # An option that makes their forms equal makes it one again.
    assert names(subjects(data, adapters=(three, two_pairs), pairs=1, **kept)) == ["untuned", "three", "two"]
    assert names(subjects(data, adapters=(three,), untuned=False, **kept)) == ["three"]


def test_the_untuned_backbone_is_asked_for_any_form_without_an_adapter(
    subjects: Write, write_dataset: Write, write_run: Write
) -> None:
    data, _ = write_dataset({"depth": 4}, lengths=(3, 4))
    asked = [("linear", 3, 1), ("linear", 3, 2), ("linear", 2, 1), ("none", 4, 1), ("linear", 3, 1)]
    wanted = [{"method": method, "length": length, "pairs": pairs} for method, length, pairs in asked]
    found = subjects(data, forms=wanted, baselines=())
    # A form that is named twice, or that has no frames by another name, stands once.
    assert forms(found) == [
        ("untuned linear L=3 1 pairs", "linear", 3, 1), ("untuned linear L=3 2 pairs", "linear", 3, 2),
        ("untuned none L=2 1 pairs", "none", 2, 1),
    ]  # fmt: skip
    run = write_run(data, "three", method="linear", lengths=(3,))
    assert len(subjects(data, adapters=(run,), forms=wanted, baselines=())) == 3 + 1, (
        "the run's own form is one of them"
    )


def test_chains_of_two_pictures_have_no_frames_whatever_the_method(
    subjects: Write, write_dataset: Write, write_run: Write
) -> None:
    data, _ = write_dataset({"depth": 4}, lengths=(4,), methods=("linear",))
    run = write_run(data, method="diffusion", lengths=(2,))
    assert forms(subjects(data, adapters=(run,), baselines=())) == [("untuned", "none", 2, 1), ("tuned", "none", 2, 1)]


def test_without_adapters_the_backbone_stands_alone(subjects: Write, write_dataset: Write) -> None:
    data, _ = write_dataset({"depth": 4})
    assert forms(subjects(data, baselines=())) == [("untuned", "none", 2, 1)]
    assert forms(subjects(data, baselines=("focus",), untuned=False, pairs=2)) == [("Chain-of-Focus", "saliency", 3, 2)]


def test_chain_of_focus_takes_the_examples_that_its_longer_chains_leave_room_for(
    subjects: Write, write_dataset: Write
) -> None:
    data, _ = write_dataset({"depth": 4})
    found = subjects(data, baselines=("focus",), pairs=7)  # 16 pictures of plain pairs: the whole context
    assert forms(found) == [("untuned", "none", 2, 7), ("Chain-of-Focus", "saliency", 3, 4)]


def test_baselines_alone_need_no_backbone(subjects: Write, write_dataset: Write) -> None:
    data, _ = write_dataset({"depth": 4})  # of codes that the nano backbone does not know
    found = subjects(data, backbone=None, untuned=False, baselines=("ceiling", "copy"))
    assert names(found) == ["copy of the query", "VQGAN ceiling"]
    with pytest.raises(DatasetError, match="different tokenizers"):
        subjects(data, backbone=None)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(subjects: Write) -> Callable[..., None]:
    def refused(kind: type[CovrayError], says: str, data: str, **options: Any) -> None:
        with pytest.raises(kind, match=says) as error:
            subjects(data, **options)
        assert "\n" not in str(error.value)

    return refused


def test_runs_that_cannot_be_evaluated_are_refused(
    refused: Callable[..., None], write_dataset: Write, write_run: Write, tmp_path: Path
) -> None:
    data, _ = write_dataset({"depth": 4})
    run = write_run(data)
    other = write_llama(tmp_path / "other", num_hidden_layers=1)
    backbone = BackboneConfig(scale="custom", path=str(other))
    refused(WeightsError, "tuned: adapts backbone .*; give --backbone", data, adapters=(run,), backbone=backbone)

    about = storage.read_json(f"{run}/_run.json")
    foreign = about | {"fingerprints": about["fingerprints"] | {"codebook": "c0de" * 16}}
    storage.write_json(f"{run}/_run.json", foreign)
    refused(DatasetError, "--adapter .*tuned: its codebook is c0dec0de", data, adapters=(run,))
    storage.write_json(f"{run}/_run.json", about | {"config": {"data": 3}})
    refused(ConfigError, "does not describe a run", data, adapters=(run,))
    storage.write_json(f"{run}/_run.json", about)

    Path(run, "adapter", "adapter_model.safetensors").unlink()
    refused(WeightsError, "is missing; give a PEFT adapter", data, adapters=(run,))
    Path(run, "_result.json").unlink()
    refused(ConfigError, "is unfinished; run the same covray train again", data, adapters=(run,))
    refused(ConfigError, "not a run; give the --out of a covray train", data, adapters=(str(tmp_path),))


def test_frames_that_were_not_built_are_asked_for(
    refused: Callable[..., None], write_dataset: Write, write_run: Write
) -> None:
    data, _ = write_dataset({"depth": 4}, methods=("diffusion",))
    refused(DatasetError, "--length 4,6", data, adapters=(write_run(data, lengths=(6,)),))
    refused(DatasetError, "--method diffusion,linear", data, adapters=(write_run(data, method="linear"),))


def test_a_sentence_beyond_the_context_is_refused_with_the_arithmetic(
    refused: Callable[..., None], write_dataset: Write, write_run: Write
) -> None:
    data, _ = write_dataset({"depth": 4})
    says = r"20 pictures x 16 tokens = 320 tokens exceed the context of 256 \(16 pictures\)"
    refused(ConfigError, says, data, adapters=(write_run(data, lengths=(4,)),), pairs=4)


def test_a_context_that_holds_no_chain_of_focus_is_refused(
    refused: Callable[..., None], write_dataset: Write, tmp_path: Path
) -> None:
    data, _ = write_dataset({"depth": 4})
    narrow = write_llama(tmp_path / "narrow", max_position_embeddings=32)
    backbone = BackboneConfig(scale="custom", path=str(narrow))
    refused(ConfigError, "3 pictures x 16 tokens", data, backbone=backbone, baselines=("focus",), pairs=0)


def test_a_name_stands_once(refused: Callable[..., None], write_dataset: Write, write_run: Write) -> None:
    data, _ = write_dataset({"depth": 4})
    run, other = write_run(data, "one"), write_run(data, "two")
    refused(ConfigError, "two are called one; .*--adapter NAME=RUN", data, adapters=(run, f"one={other}"))
    refused(ConfigError, "two are called untuned", data, adapters=(f"untuned={run}",))
    refused(ConfigError, "two are called mean label", data, adapters=(f"mean label={run}",))


def test_nothing_to_evaluate_is_refused(refused: Callable[..., None], write_dataset: Write) -> None:
    data, _ = write_dataset({"depth": 4})
    refused(ConfigError, "nothing to evaluate: give --adapter RUN", data, untuned=False, baselines=())


def test_drafts_are_asked_of_runs_that_have_them(subjects: Write, write_dataset: Write, write_run: Write) -> None:
    data, _ = write_dataset({"depth": 4})
    run = write_run(data, "plain", method="none")
    with pytest.raises(ConfigError, match=f"speculative needs a run trained with objective=draft, which {run} is not"):
        subjects(data, adapters=(run,), sampling={"decoder": "speculative"})
    with pytest.raises(ConfigError, match="speculative needs a run trained with objective=draft; take jacobi"):
        subjects(data, sampling={"decoder": "speculative"})
    config = EvaluateConfig.model_validate({"data": data, "out": "o", "sampling": {"decoder": "speculative"}})
    assert config.sampling_of(1).decoder == "speculative"
    assert config.sampling_of(3, has_adapter=False).decoder == "sequential", "of a backbone without an adapter"
