from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from covray.config import BackboneConfig, LoraConfig
from covray.errors import ConfigError, CovrayError, WeightsError
from covray.io import storage
from covray.io.storage import Folder
from covray.models.lvm import adapter as adapter_module
from covray.models.lvm.adapter import (
    adapter_files,
    adapter_tensors,
    export_merged,
    export_run,
    load_adapter_tensors,
    read_adapter,
    read_run_adapter,
    save_adapter,
)
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.lora import TARGETS, Diffusion, Lora
from covray.models.lvm.model import Lvm
from covray.models.lvm.peft_options import READ, WITHOUT_EFFECT
from covray.models.lvm.records import VerifierRecord
from covray.models.lvm.verifier import Verifier, read_verifier, verifier_files
from tests.support.backbones import CODES, load, random_batch, write_llama

LENGTHS = (24, 9, 24, 24)
BATCH = random_batch(*LENGTHS)
ADAPTERS = [
    LoraConfig(rank=4, alpha=12),
    LoraConfig(rank=1, alpha=1, targets=("q_proj", "v_proj")),
    LoraConfig(rank=7, alpha=3, targets=("v_proj", "down_proj", "o_proj", "up_proj")),
]


COMPUTED_INITS = (False, True, "gaussian", "orthogonal", "eva", "mica")
REFUSED_INITS = ("pissa", "pissa_niter_4", "olora", "lora_ga", "corda", "loftq")
"""Those that change the backbone, too."""


def one_line(error: CovrayError) -> bool:
    return "\n" not in str(error) and ";" in str(error)


def peft_logits(model: PeftModel | LlamaForCausalLM) -> Tensor:
    return torch.cat([model(part[None]).logits[0] for part in BATCH.ids.split(LENGTHS)])


def logits(model: Lvm) -> Tensor:
    return model.logits(BATCH.ids, LENGTHS)


def with_peft(folder: Path, adapter: Path, trainable: bool = False) -> PeftModel:
    backbone = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(backbone, adapter, is_trainable=trainable)


@pytest.mark.parametrize("lora", ADAPTERS)
def test_logits_and_gradients_are_those_of_peft(llama_folder: Path, tmp_path: Path, lora: LoraConfig) -> None:
    model = load(llama_folder, lora)
    save_adapter(model, str(tmp_path), str(llama_folder))
    reference = with_peft(llama_folder, tmp_path, trainable=True)
    expected = peft_logits(reference)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with reference.disable_adapter():
        assert (peft_logits(reference) - expected).abs().max() > 0.1  # the adapter does something

    loss, _ = model(BATCH)
    loss.backward()
    torch.nn.functional.cross_entropy(expected[BATCH.positions], BATCH.targets, reduction="sum").backward()
    for parameter in model.parameters():
        if parameter.grad is not None:  # gradients in the place of weights, to read them by PEFT's names
            parameter.data = parameter.grad
    gradients = adapter_tensors(model)
    assert len(gradients) == 2 * 2 * len(lora.targets)
    for name, gradient in gradients.items():
        due = reference.get_parameter(name.replace(".weight", ".default.weight")).grad
        assert (gradient - due).norm() < 1e-5 * due.norm(), name


@pytest.mark.parametrize("lora", ADAPTERS)
def test_an_adapter_comes_back_to_the_bit(llama_folder: Path, tmp_path: Path, lora: LoraConfig) -> None:
    model = load(llama_folder, lora)
    save_adapter(model, str(tmp_path), "name")
    found, tensors = read_adapter(str(tmp_path))
    assert (found.rank, found.alpha, set(found.targets)) == (lora.rank, lora.alpha, set(lora.targets))
    other = load(llama_folder, LoraConfig(rank=found.rank, alpha=found.alpha, targets=found.targets), seed=5)
    assert not torch.equal(logits(other), logits(model))
    load_adapter_tensors(other, tensors)
    assert torch.equal(logits(other), logits(model))
    assert (
        adapter_files(other, "name")["adapter_model.safetensors"]
        == (tmp_path / "adapter_model.safetensors").read_bytes()
    )


def test_the_copies_do_not_follow_the_model(llama_folder: Path) -> None:
    model = load(llama_folder, ADAPTERS[0])
    tensors = adapter_tensors(model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for view in model.lora_tensors().values():
        view.add_(1)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_an_adapter_that_peft_wrote_is_read(llama_folder: Path, tmp_path: Path) -> None:
    model = load(llama_folder, ADAPTERS[0])
    save_adapter(model, str(tmp_path / "ours"), str(llama_folder))
    with_peft(llama_folder, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    lora, tensors = read_adapter(str(tmp_path / "theirs"))
    assert lora == read_adapter(str(tmp_path / "ours"))[0]
    other = load(llama_folder, ADAPTERS[0], seed=5)
    load_adapter_tensors(other, tensors)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("sizes", "lora", "message"),
    [
        ({}, LoraConfig(rank=5, alpha=12), r"lora_A.weight is \(4, 96\), the model has \(5, 96\)"),
        (
            {},
            LoraConfig(rank=4, targets=("q_proj",)),
            r"down_proj.lora_A.weight is \(4, 96\), the model has not adapted",
        ),
        ({"intermediate_size": 80}, ADAPTERS[0], r"is \(4, 96\), the model has \(4, 80\)"),
        ({"num_hidden_layers": 3}, ADAPTERS[0], r"model.layers.2\S+ is missing, the model has \(4, 96\)"),
    ],
)
def test_an_adapter_of_something_else_is_refused_in_one_line(
    llama_folder: Path, tmp_path: Path, sizes: dict[str, Any], lora: LoraConfig, message: str
) -> None:
    tensors = adapter_tensors(load(llama_folder, ADAPTERS[0]))
    model = load(write_llama(tmp_path, **sizes), lora)
    before = adapter_tensors(model)
    with pytest.raises(WeightsError, match=message) as raised:
        load_adapter_tensors(model, tensors)
    assert one_line(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


def write_with_peft(backbone: Path, folder: Path, **options: Any) -> PeftModel:
    """An adapter made and saved by PEFT itself, its matrices moved as by a training; the model that it was saved of."""
    plain = {"r": 6, "lora_alpha": 9, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(backbone, dtype=torch.float32)
        model = get_peft_model(base, PeftLora(**plain | options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj", "down_proj"]},
        {"lora_dropout": 0.5, "fan_in_fan_out": True},
        {"ensure_weight_tying": True},
        *({"init_lora_weights": init} for init in COMPUTED_INITS),
    ],
    ids=str,
)
@torch.inference_mode()
def test_what_peft_makes_of_its_options_is_computed(
    llama_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """PEFT, which loads the adapter, is the judge of the model and of the merged folder."""
    with torch.inference_mode(False):
        write_with_peft(llama_folder, tmp_path / "adapter", **options)
    expected = peft_logits(with_peft(llama_folder, tmp_path / "adapter"))
    lora, tensors = read_adapter(str(tmp_path / "adapter"))
    model = load(llama_folder, LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=lora.targets), warm=False)
    before = logits(model)
    load_adapter_tensors(model, tensors)
    assert (expected - before).abs().max() > 1
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=5e-5)
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(llama_folder)))
    export_merged(facts, str(tmp_path / "adapter"), tmp_path / "merged")
    found = peft_logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", REFUSED_INITS)
def test_an_adapter_that_changes_the_backbone_too_is_refused(llama_folder: Path, tmp_path: Path, init: str) -> None:
    """PEFT takes what such an adapter starts from off the backbone, whenever it loads it."""
    if init in ("pissa", "olora"):
        write_with_peft(llama_folder, tmp_path / "adapter", init_lora_weights=init)
        loaded, base = with_peft(llama_folder, tmp_path / "adapter"), LlamaForCausalLM.from_pretrained(llama_folder)
        name = "model.layers.0.mlp.up_proj"
        there = loaded.get_submodule(f"base_model.model.{name}").base_layer.weight
        assert (there - base.get_submodule(name).weight).abs().max() > 0.01
    else:  # they want data or more packages to begin with
        save_adapter(load(llama_folder, ADAPTERS[0]), str(tmp_path / "adapter"), "name")
        edit(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=init)
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(llama_folder)))
    advice = "merge it into the backbone" if init == "loftq" else "path_initial_model_for_weight"
    with pytest.raises(WeightsError, match=f"init_lora_weights is {init}, .*{advice}") as raised:
        export_merged(facts, str(tmp_path / "adapter"), tmp_path / "merged")
    assert one_line(raised.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=["plain", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@torch.inference_mode()
def test_an_adapter_that_peft_converted_is_computed(
    llama_folder: Path, tmp_path: Path, init: str, options: dict[str, Any]
) -> None:
    """As the message advises: plain LoRA of twice the rank."""
    options = {"init_lora_weights": init, "target_modules": list(TARGETS), "r": 6, "task_type": "CAUSAL_LM"} | options
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_folder), PeftLora(**options)).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.add_(torch.full_like(parameter, 0.02))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(llama_folder)))
    export_merged(facts, str(tmp_path / "plain"), tmp_path / "merged")
    assert read_adapter(str(tmp_path / "plain"))[0].rank == 12
    found = peft_logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(found, peft_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"exclude_modules": ["o_proj"]},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
    ids=str,
)
def test_what_peft_writes_and_covray_does_not_compute_is_refused(
    llama_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    write_with_peft(llama_folder, tmp_path / "adapter", **options)
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(llama_folder)))
    with pytest.raises(WeightsError) as raised:
        export_merged(facts, str(tmp_path / "adapter"), tmp_path / "merged")
    assert one_line(raised.value)
    assert not (tmp_path / "merged").exists()


def test_every_option_of_the_installed_peft_is_known_or_refused(llama_folder: Path, tmp_path: Path) -> None:
    """An option or a start that a later PEFT adds fails here, or is refused by itself."""
    save_adapter(load(llama_folder, ADAPTERS[0]), str(tmp_path), "name")
    file = tmp_path / "adapter_config.json"
    plain = file.read_text()
    known = {*READ, *WITHOUT_EFFECT}
    for field in dataclasses.fields(PeftLora):
        if field.name not in known:
            edit(file, **{field.name: {"x": 1}})
            with pytest.raises(WeightsError, match=f"uses {field.name}, .*merge it into the backbone with PEFT"):
                read_adapter(str(tmp_path))
            file.write_text(plain)
    _, starts = get_args(get_type_hints(PeftLora)["init_lora_weights"])
    named = {start.replace("[number of iters]", "4") for start in get_args(starts)}
    assert named <= {*COMPUTED_INITS, *REFUSED_INITS}


def test_peft_writes_the_configuration_and_judges_what_is_read(llama_folder: Path, tmp_path: Path) -> None:
    save_adapter(load(llama_folder, ADAPTERS[1]), str(tmp_path / "ours"), "name")
    file = tmp_path / "ours" / "adapter_config.json"
    written = json.loads(file.read_text())
    PeftLora.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    expected = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert written == expected | {"target_modules": sorted(expected["target_modules"])}

    edit(file, task_type="PAINTING")
    with pytest.raises(WeightsError, match=r"adapter_config.json: PEFT refuses it \(Invalid task type") as raised:
        read_adapter(str(tmp_path / "ours"))
    assert one_line(raised.value)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (3, "of type torch.int8")])
def test_adapters_of_no_plain_numbers_are_refused(
    llama_folder: Path, tmp_path: Path, value: float, message: str
) -> None:
    save_adapter(load(llama_folder, ADAPTERS[0]), str(tmp_path), "name")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], value, dtype=torch.int8 if value == 3 else None)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=message) as raised:
        read_adapter(str(tmp_path))
    assert one_line(raised.value)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3, not LORA"),
        ({"use_dora": True}, "uses use_dora"),
        ({"rank_pattern": {"q_proj": 3}}, "uses rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"layers_to_transform": [1]}, "uses layers_to_transform"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"of_a_later_peft": 1}, "uses of_a_later_peft"),
        ({"lora_alpha": float("inf")}, "alpha inf"),
        ({"alpha_pattern": {"q_proj": 3}}, "uses alpha_pattern"),
        ({"bias": "all"}, "uses bias"),
        ({"r": 0}, "has rank 0"),
        ({"target_modules": "all-linear"}, "adapts 'all-linear'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts .*lm_head"),
    ],
)
def test_an_adapter_that_covray_does_not_compute_is_refused(
    llama_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_adapter(load(llama_folder, ADAPTERS[0]), str(tmp_path), "name")
    edit(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(WeightsError, match=message) as raised:
        read_adapter(str(tmp_path))
    assert one_line(raised.value)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("adapter_config.json", None, "is missing"),
        ("adapter_model.safetensors", None, "is missing"),
        ("adapter_config.json", b"{", "cannot be read"),
        ("adapter_config.json", b"3", "of type None"),
        ("adapter_model.safetensors", b"\0\0", "cannot be read"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    llama_folder: Path, tmp_path: Path, file: str, data: bytes | None, message: str
) -> None:
    save_adapter(load(llama_folder, ADAPTERS[0]), str(tmp_path), "name")
    (tmp_path / file).unlink()
    if data is not None:
        (tmp_path / file).write_bytes(data)
    with pytest.raises(WeightsError, match=message) as raised:
        read_adapter(str(tmp_path))
    assert one_line(raised.value)


@pytest.mark.parametrize("lora", ADAPTERS)
@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_the_merged_folder_is_backbone_plus_adapter(tmp_path: Path, sizes: dict[str, Any], lora: LoraConfig) -> None:
    folder = write_llama(tmp_path / "backbone", **sizes)
    model = load(folder, lora)
    save_adapter(model, str(tmp_path / "adapter"), str(folder))
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(folder)))
    export_merged(facts, str(tmp_path / "adapter"), tmp_path / "out")
    with torch.inference_mode():
        found = peft_logits(LlamaForCausalLM.from_pretrained(tmp_path / "out"))
        torch.testing.assert_close(found, logits(model), rtol=0, atol=5e-5)  # logits of deviation 1.5


def test_a_merged_folder_is_of_the_type_its_backbone_is(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "backbone", dtype=torch.float16)
    model = load(folder, ADAPTERS[0])
    save_adapter(model, str(tmp_path / "adapter"), str(folder))
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(folder)))
    export_merged(facts, str(tmp_path / "adapter"), tmp_path / "half")
    export_merged(facts, str(tmp_path / "adapter"), tmp_path / "full", torch.float32)
    half, full = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "full"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(half[name], full[name].half()) for name in half)  # rounded once, at the end
    with torch.inference_mode():
        found = peft_logits(LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=0.02)  # 11 bits of weights


def test_an_adapter_of_another_backbone_is_not_merged(llama_folder: Path, tmp_path: Path) -> None:
    save_adapter(load(write_llama(tmp_path / "wide", intermediate_size=80), ADAPTERS[0]), str(tmp_path / "a"), "name")
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(llama_folder)))
    with pytest.raises(WeightsError, match="down_proj") as raised:
        export_merged(facts, str(tmp_path / "a"), tmp_path / "out")
    assert one_line(raised.value)
    assert not (tmp_path / "out").exists()
    random = backbone_facts(BackboneConfig(scale="nano", init="random"))
    with pytest.raises(ConfigError, match="random weights are stored nowhere"):
        export_merged(random, str(tmp_path / "a"), tmp_path / "out")


@pytest.fixture
def run(llama_folder: Path, tmp_path: Path) -> Path:
    """A finished run on a backbone folder of its own, as ``covray train`` leaves it; without its checkpoints."""
    backbone = shutil.copytree(llama_folder, tmp_path / "backbone")
    folder = tmp_path / "run"
    config = BackboneConfig(scale="custom", path=str(backbone))
    about = {
        "version": 1,
        "config": {"backbone": config.model_dump(mode="json"), "lora": ADAPTERS[0].model_dump(mode="json")},
        "fingerprints": {"backbone": backbone_facts(config).fingerprint, "codebook": "ab" * 32, "data": "cd" * 32},
    }
    storage.write_json(str(folder / "_run.json"), about)
    save_adapter(load(backbone, ADAPTERS[0]), str(folder / "adapter"), str(backbone))
    storage.write_json(str(folder / "_result.json"), {"steps": 3})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 99}, r"lora\.alpha.*12.*99"),
        ({"use_rslora": True}, r"lora\.alpha.*12.*24"),
        ({"r": 8}, r"lora\.rank.*4.*8"),
    ],
)
def test_an_adapter_whose_configuration_changed_is_not_the_runs(
    run: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Its weights alone are in the fingerprints of what is made with it."""
    assert read_run_adapter(str(run))[0] == read_adapter(str(run / "adapter"))[0]
    edit(run / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(WeightsError, match=f"is not what the run trained: {message}.*; restore the file") as raised:
        read_run_adapter(str(run))
    assert one_line(raised.value)
    with pytest.raises(WeightsError, match="is not what the run trained"):
        export_run(str(run), str(tmp_path / "out"), merge=True)
    assert not (tmp_path / "out").exists()


def test_a_run_is_exported_merged(run: Path, tmp_path: Path) -> None:
    export_run(str(run), str(tmp_path / "new" / "out"), merge=True)
    with torch.inference_mode():
        expected = peft_logits(with_peft(tmp_path / "backbone", run / "adapter"))
        found = peft_logits(LlamaForCausalLM.from_pretrained(tmp_path / "new" / "out"))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(tmp_path / "new" / "out")))
    assert (facts.codes, facts.codebook) == (CODES, "ab" * 32)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]


def test_a_run_is_exported_as_an_adapter(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder will do
    export_run(str(run), str(tmp_path / "out"), merge=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert all((run / "adapter" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)


def unfinish(run: Path) -> None:
    (run / "_result.json").unlink()


def undescribe(run: Path) -> None:
    (run / "_run.json").unlink()


def outdate(run: Path) -> None:
    edit(run / "_run.json", version=0)


def garble(run: Path) -> None:
    (run / "_run.json").write_text("{")


def empty_config(run: Path) -> None:
    edit(run / "_run.json", config={})


def change_backbone(run: Path) -> None:
    edit(run.parent / "backbone" / "config.json", rms_norm_eps=1e-3)


def lose_backbone(run: Path) -> None:
    shutil.rmtree(run.parent / "backbone")


def lose_adapter(run: Path) -> None:
    shutil.rmtree(run / "adapter")


def take_out(run: Path) -> None:
    (run.parent / "out").mkdir()
    (run.parent / "out" / "mine.txt").write_text("mine")


def out_is_a_file(run: Path) -> None:
    (run.parent / "out").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unfinish, "is unfinished; run the same covray train again"),
        (undescribe, "has no _run.json, so is not a run"),
        (outdate, "_run.json: is of version 0, not 1"),
        (garble, "_run.json: cannot be read"),
        (empty_config, "does not describe a run"),
        (change_backbone, r"is backbone \w{12}, the run adapted \w{12}"),
        (lose_backbone, "backbone: no such folder"),
        (lose_adapter, "adapter: .* is missing"),
        (take_out, "out: already exists"),
        (out_is_a_file, "out: already exists"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    run: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CovrayError, match=message) as raised:
        export_run(str(run), str(tmp_path / "out"), merge=True)
    assert one_line(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_without_an_adapter_leaves_nothing(run: Path, tmp_path: Path) -> None:
    lose_adapter(run)
    with pytest.raises(WeightsError, match=r"is missing; give a PEFT adapter"):
        export_run(str(run), str(tmp_path / "out"), merge=False)
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_broken_off_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(folder: Path, *_: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_module, "write_backbone", break_off)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        export_run(str(run), str(tmp_path / "out"), merge=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_export_is_to_this_machine(run: Path) -> None:
    with pytest.raises(ConfigError, match="is not on this machine"):
        export_run(str(run), "s3://bucket/out", merge=False)


def test_the_names_of_targets_are_those_of_the_configuration() -> None:
    assert LoraConfig().targets == TARGETS


def test_a_script_without_covray_reproduces_the_logits(llama_folder: Path, tmp_path: Path) -> None:
    model = load(llama_folder, ADAPTERS[0])
    save_adapter(model, str(tmp_path / "adapter"), str(llama_folder))
    save_file({"ids": BATCH.ids[:24], "logits": logits(model)[:24].detach()}, tmp_path / "expected.safetensors")
    script = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
expected = load_file(sys.argv[2])
with torch.inference_mode():
    found = model(expected["ids"][None]).logits[0]
torch.testing.assert_close(found, expected["logits"], rtol=0, atol=1e-5)
assert "covray" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "adapter"), str(tmp_path / "expected.safetensors")],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_mask_outside_the_vocabulary_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    config = BackboneConfig(scale="custom", path=str(llama_folder))
    facts = backbone_facts(config)
    lora = Lora(4, 8.0, ("q_proj",), diffusion=Diffusion(CODES + 1, 4))
    model = load_backbone(facts, config, lora, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    save_adapter(model, str(tmp_path / "adapter"), str(llama_folder))
    file = tmp_path / "adapter" / "adapter_config.json"
    for mask_id in (-1, facts.llama.vocab_size):
        values = json.loads(file.read_text()) | {"trainable_token_indices": {"embed_tokens": [mask_id]}}
        file.write_text(json.dumps(values))
        with pytest.raises(WeightsError, match=f"its mask has id {mask_id}, the backbone has") as raised:
            export_merged(facts, str(tmp_path / "adapter"), tmp_path / "merged")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "merged").exists()


def test_a_verifier_of_invented_sizes_takes_no_memory(tmp_path: Path) -> None:
    verifier = Verifier(VerifierRecord(width=8, hidden=4, adapter="a" * 64, backbone="b" * 64))
    for name, data in verifier_files(verifier, dict(verifier.state_dict())).items():
        (tmp_path / name).write_bytes(data)
    assert read_verifier(Folder(str(tmp_path)), "a" * 64).facts == verifier.facts
    file = tmp_path / VerifierRecord.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"width": 2**19, "hidden": 2**19}))
    with pytest.raises(WeightsError, match=f"has not the sizes of {VerifierRecord.FILE}"):
        read_verifier(Folder(str(tmp_path)), "a" * 64)
