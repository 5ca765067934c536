"""The aligner's norm is the language encoder's to the bit; folders and the authors' files come back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from covray.errors import ConfigError, WeightsError
from covray.models.aligner.aligner import WEIGHTS, Aligner, load_aligner, new_aligner, save_aligner
from covray.models.aligner.convert import convert_aligner, read_pickled_aligner
from covray.models.aligner.records import AlignerRecord, Norm
from tests.support.language_models import WIDTH, language_model

CPU = torch.device("cpu")
FEATURES = 12


def make(norm: Norm = "encoder", seed: int = 0) -> Aligner:
    return new_aligner(FEATURES, language_model(), norm, seed, vlm_fingerprint="a" * 64, language_fingerprint="b" * 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_aligner(tmp_path / "aligner", make())
    return tmp_path / "aligner"


def pickle_aligner(file: Path, aligner: Aligner, **extra: Any) -> Path:
    """Write what the authors' trainer writes: the trained tensors, and buffers of frozen models beside them."""
    model = {f"mm_projector.{name}": tensor for name, tensor in aligner.network.state_dict().items()}
    buffers = {"vision_model.embeddings.position_ids": torch.arange(4)}
    torch.save({"model": model | buffers, "optimizer": {"state": {}}, "epoch": 4} | extra, file)
    return file


def test_the_norm_starts_as_the_encoders_to_the_bit() -> None:
    model = language_model()
    network = new_aligner(FEATURES, model, "encoder", 0).network
    assert torch.equal(network[-1].weight, model.encoder.final_layer_norm.weight)
    assert network[-1].weight is not model.encoder.final_layer_norm.weight
    states = torch.randn(2, 3, WIDTH)
    assert torch.equal(network[-1](states), model.encoder.final_layer_norm(states))


def test_the_other_norms_are_one_and_none() -> None:
    ones = make("ones").network
    assert torch.equal(ones[-1].weight, torch.ones(WIDTH))
    assert len(make("none").network) == len(ones) - 1
    for name, tensor in make("none").network.state_dict().items():
        assert torch.equal(tensor, ones.state_dict()[name])


def test_the_seed_decides_the_weights_and_leaves_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    first, again, other = make(seed=1).network, make(seed=1).network, make(seed=2).network
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("norm", ["encoder", "ones", "none"])
def test_a_folder_comes_back_to_the_bit(norm: Norm, tmp_path: Path) -> None:
    aligner = make(norm)
    save_aligner(tmp_path / "aligner", aligner)
    loaded = load_aligner(tmp_path / "aligner", CPU)
    assert loaded.record == aligner.record
    features = torch.randn(2, 5, FEATURES)
    assert torch.equal(loaded.network(features), aligner.network(features))
    with pytest.raises(ConfigError, match="already exists"):
        save_aligner(tmp_path / "aligner", aligner)


def test_an_aligner_of_the_authors_gives_the_same_numbers(tmp_path: Path) -> None:
    aligner = make()
    file = pickle_aligner(tmp_path / "thinkdiff.pth", aligner)
    converted = read_pickled_aligner(file, language_fingerprint="b" * 64)
    assert converted.record == aligner.record.model_copy(update={"vlm": None})
    features = torch.randn(2, 5, FEATURES)
    save_aligner(tmp_path / "aligner", converted)
    for network in (converted.network, load_aligner(tmp_path / "aligner", CPU).network):
        assert torch.equal(network(features), aligner.network(features))


class Code:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_no_code_of_a_pickle_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pickle_aligner(tmp_path / "thinkdiff.pth", make(), scaler=Code())
    with pytest.raises(WeightsError, match=r"thinkdiff\.pth: needs \S*print, and covray runs no code"):
        read_pickled_aligner(file)
    assert capsys.readouterr().out == ""


def test_a_checkpoint_without_an_aligner_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"visual.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"has no matrix mm_projector\.0\.weight; give a checkpoint"):
        read_pickled_aligner(tmp_path / "other.pth")
    wide = make().network.state_dict() | {"2.weight": torch.zeros(WIDTH, 3)}
    torch.save({"model": {f"mm_projector.{name}": tensor for name, tensor in wide.items()}}, tmp_path / "wide.pth")
    with pytest.raises(WeightsError, match=r"2\.weight is \[16, 3\], not \[16, 16\]"):
        read_pickled_aligner(tmp_path / "wide.pth")


def test_models_that_do_not_fit_are_refused_in_one_line() -> None:
    aligner = make()
    aligner.require_fit("run", vlm="a" * 64, language_model="b" * 64)
    aligner.require_fit("run")
    with pytest.raises(WeightsError, match=r"^run: was trained with the vision-language model a{12}, not with c{12};"):
        aligner.require_fit("run", vlm="c" * 64, language_model="b" * 64)
    with pytest.raises(WeightsError, match=r"^run: was trained with the language model b{12}, not with c{12}; give"):
        aligner.require_fit("run", language_model="c" * 64)
    unknown = Aligner(aligner.network, aligner.record.model_copy(update={"vlm": None}))
    unknown.require_fit("run", vlm="c" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"3.weight": None}, "3.weight is missing"),
        ({"3.bias": torch.zeros(WIDTH)}, "unexpected tensor 3.bias"),
        ({"0.weight": torch.zeros(WIDTH, FEATURES + 1)}, "0.weight is .*, not"),
        ({"0.bias": torch.full((WIDTH,), float("nan"))}, "0.bias holds values that are not finite"),
        ({"0.bias": torch.zeros(WIDTH, dtype=torch.int8)}, "0.bias is of type torch.int8"),
    ],
)
def test_tensors_that_are_not_the_aligners_are_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    with pytest.raises(WeightsError, match=message) as caught:
        load_aligner(folder, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"norm": "layer"}, "norm: input should be"), ({"version": 2}, "is of version 2"), ({"width": "16"}, "width")],
)
def test_a_description_that_is_none_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    file = folder / AlignerRecord.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match=message):
        load_aligner(folder, CPU)
    (folder / AlignerRecord.FILE).unlink()
    with pytest.raises(WeightsError, match=r"aligner\.json: is not there; get the folder again"):
        load_aligner(folder, CPU)


def test_a_converted_aligner_says_between_which_models_it_stands(tmp_path: Path) -> None:
    tensors = {f"mm_projector.{name}": tensor for name, tensor in make().network.state_dict().items()}
    torch.save({"model": tensors}, tmp_path / "theirs.pth")
    shown = convert_aligner(tmp_path / "theirs.pth", tmp_path / "aligner", "lvlm", "Qwen/Qwen2-VL", "google/flan")
    assert (shown["input_width"], shown["width"]) == (FEATURES, WIDTH)
    loaded = load_aligner(tmp_path / "aligner", CPU)
    assert loaded.record.features is not None
    assert loaded.record.features.to_json() == {
        "variant": "lvlm",
        "vlm": {"path": "Qwen/Qwen2-VL", "revision": None, "mask_id": None},
    }
    assert loaded.record.trained_through == {"path": "google/flan", "revision": None, "max_tokens": 128}
    states = torch.randn(3, FEATURES)
    assert torch.equal(loaded.network(states), make().network(states))
    with pytest.raises(ConfigError, match="already exists"):
        convert_aligner(tmp_path / "theirs.pth", tmp_path / "aligner", "lvlm")
    with pytest.raises(ConfigError, match="--variant vlm: give lvlm or clip"):
        convert_aligner(tmp_path / "theirs.pth", tmp_path / "other", "vlm")
