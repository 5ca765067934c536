from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from covray.chains.compatibility import require_same_codes
from covray.chains.dataset import ChainDataset
from covray.config import BackboneConfig, LoraConfig
from covray.errors import ConfigError, CovrayError, DatasetError, WeightsError
from covray.io import model_folders as weights
from covray.io import storage
from covray.models.lvm import backbone as backbone_module
from covray.models.lvm.backbone import (
    BackboneFacts,
    backbone_facts,
    load_backbone,
    stored_tensors,
    write_backbone,
)
from covray.models.lvm.convert import convert_backbone
from tests.support.backbones import CODES, CPU, load, random_batch, write_llama

WEIGHTS = "model.safetensors"


def custom(folder: Path, **settings: Any) -> BackboneConfig:
    return BackboneConfig(scale="custom", path=str(folder), **settings)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def one_line(error: CovrayError) -> bool:
    return "\n" not in str(error) and ";" in str(error)


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A folder of its own, to break."""
    shutil.copytree(llama_folder, tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_says_what_it_is(folder: Path) -> None:
    facts = backbone_facts(custom(folder))
    assert (facts.llama.hidden_size, facts.llama.num_hidden_layers) == (64, 2)
    assert (facts.folder, facts.codes, facts.codebook, facts.tokens_per_image) == (folder, CODES, None, None)
    storage.write_json(str(folder / "covray.json"), {"version": 1, "codebook": "abc", "tokens_per_image": 16})
    told = backbone_facts(custom(folder))
    assert (told.codebook, told.tokens_per_image) == ("abc", 16)


def test_the_fingerprint_is_that_of_weights_and_architecture(folder: Path) -> None:
    before = backbone_facts(custom(folder)).fingerprint
    (folder / "README.md").write_text("words")
    assert backbone_facts(custom(folder)).fingerprint == before
    edit(folder / "config.json", rms_norm_eps=1e-5)
    other = backbone_facts(custom(folder)).fingerprint
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert len({before, other, backbone_facts(custom(folder)).fingerprint}) == 3


@pytest.mark.parametrize(("vocabulary", "codes"), [(8292, 8192), (8192, 8192), (164, 64)])
def test_special_ids_follow_the_codes(tmp_path: Path, vocabulary: int, codes: int) -> None:
    facts = backbone_facts(custom(write_llama(tmp_path, vocab_size=vocabulary)))
    assert facts.codes == codes
    assert facts.llama.pad_token_id == (codes if codes < vocabulary else None)


def test_no_id_begins_or_ends_a_picture(folder: Path) -> None:
    stored = LlamaConfig.from_pretrained(folder)
    assert (stored.bos_token_id, stored.eos_token_id) == (1, 2)  # as LVM's own folder has it
    facts = backbone_facts(custom(folder))
    assert facts.llama.bos_token_id is None
    assert facts.llama.eos_token_id is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_stored_type_loads_into_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_llama(tmp_path, dtype=dtype)
    stored = load_file(folder / WEIGHTS)
    for wanted in (torch.float32, torch.bfloat16):
        tensors = load(folder, dtype=wanted).backbone_tensors()
        assert tensors.keys() == stored.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, stored[name].to(wanted)), name


def test_a_folder_of_several_files_is_the_same_model(llama_folder: Path, tmp_path: Path) -> None:
    write_llama(tmp_path, shard_size="100KB")
    assert not (tmp_path / WEIGHTS).exists()
    whole, parts = (load(path).backbone_tensors() for path in (llama_folder, tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    batch = random_batch(20)
    with torch.inference_mode():
        expected = LlamaForCausalLM.from_pretrained(folder)(batch.ids[None]).logits[0]
        torch.testing.assert_close(load(folder).logits(batch.ids, (20,)), expected, rtol=0, atol=1e-5)


def test_rotary_tables_of_old_folders_are_passed_over(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_tensors(folder, add)
    assert load(folder).config.hidden_size == 64


def test_only_the_adapter_is_trained_and_it_changes_nothing_yet(llama_folder: Path) -> None:
    plain = load(llama_folder, dtype=torch.bfloat16)
    fresh = load(llama_folder, LoraConfig(rank=2), dtype=torch.bfloat16, warm=False)
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in fresh.named_parameters() if ".lora_" in name}
    assert {parameter.dtype for name, parameter in fresh.named_parameters() if name in trained} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    batch = random_batch(12, 20)
    assert torch.equal(plain.logits(batch.ids, batch.lengths), fresh.logits(batch.ids, batch.lengths))


def test_the_adapter_starts_as_pefts_and_depends_on_the_seed_alone(llama_folder: Path) -> None:
    def start(seed: int = 0, **settings: Any) -> dict[str, Tensor]:
        return load(llama_folder, LoraConfig(rank=8, **settings), seed=seed, warm=False).lora_tensors()

    every = start()
    assert len(every) == 2 * 2 * 7
    for name, tensor in every.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:  # kaiming_uniform_(a=sqrt(5)): uniform in +-1/sqrt(inputs)
            bound = tensor.shape[1] ** -0.5
            assert 0.97 * bound < tensor.abs().max() <= bound
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    low = [tensor for name, tensor in every.items() if name.endswith("lora_A")]
    assert len({tuple(tensor[0].tolist()) for tensor in low}) == len(low)
    some = start(targets=("v_proj", "q_proj"))
    assert all(torch.equal(tensor, every[name]) for name, tensor in some.items())
    assert not torch.equal(
        start(seed=1)["model.layers.0.mlp.up_proj.lora_A"], every["model.layers.0.mlp.up_proj.lora_A"]
    )


def test_random_weights_are_as_transformers_starts(folder: Path) -> None:
    def random(seed: int) -> dict[str, Tensor]:
        config = custom(folder, init="random")
        facts = backbone_facts(config)
        return load_backbone(facts, config, None, dtype=torch.float32, device=CPU, seed=seed).backbone_tensors()

    (folder / WEIGHTS).unlink()  # not needed
    edit(folder / "config.json", initializer_range=0.02, attention_bias=True)
    tensors, again, other = random(0), random(0), random(1)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("bias"):
            assert not tensor.any()
        elif "norm" in name:
            assert (tensor == 1).all()
        else:
            assert tensor.std() == pytest.approx(0.02, rel=0.1)
            assert not torch.equal(tensor, other[name])
    assert not torch.equal(
        tensors["model.layers.0.self_attn.q_proj.weight"], tensors["model.layers.0.self_attn.k_proj.weight"]
    )


def test_random_needs_no_folder() -> None:
    facts = backbone_facts(BackboneConfig(scale="7b", init="random"))
    assert facts.folder is None
    assert facts.llama.hidden_size == 4096
    assert facts.fingerprint != backbone_facts(BackboneConfig(scale="3b", init="random")).fingerprint


def test_nano_is_the_folder_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "NANO_FOLDER", tmp_path)
    with pytest.raises(WeightsError, match="nano lvm is not installed"):
        backbone_facts(BackboneConfig())
    write_llama(tmp_path / "lvm", hidden_size=256, num_hidden_layers=6)
    assert backbone_facts(BackboneConfig()).folder == tmp_path / "lvm"
    assert backbone_facts(BackboneConfig()).fingerprint == backbone_facts(BackboneConfig(path="nano")).fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "7b"}, r"the 7b does not ship with covray; give its .* folder"),
        ({"scale": "custom"}, "takes its sizes from a folder"),
        ({"scale": "custom", "init": "random"}, "takes its sizes from a folder"),
    ],
)
def test_a_backbone_that_is_not_named_is_asked_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        backbone_facts(BackboneConfig(**settings))
    assert one_line(raised.value)


def test_the_scale_must_be_the_folders(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has hidden size 64 and 2 layers, scale nano has 256 and 6") as raised:
        backbone_facts(BackboneConfig(scale="nano", path=str(folder)))
    assert one_line(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "of model type gpt2, not llama"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is linear"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is dynamic"),
        ({"is_causal": False}, "is_causal is False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config"),
        ({"vocab_size": 100}, "vocabulary of 100 is not one of image codes"),
        ({"vocab_size": 32000}, "vocabulary of 32000 is not one of image codes"),
        ({"hidden_size": 63}, "is not a LlamaConfig"),
        ({"hidden_size": "many"}, "is not a LlamaConfig"),
        ({"intermediate_size": 95}, r"mlp.\w+.weight is \[\d+, \d+\], not \["),
        ({"num_hidden_layers": 3}, r"model.layers.2.\S+ is missing"),
        ({"num_hidden_layers": 1}, r"unexpected tensor model.layers.1."),
        ({"attention_bias": True}, r"_proj.bias is missing"),
        ({"num_attention_heads": 0}, "is not a LlamaConfig"),
        ({"intermediate_size": -96}, "intermediate_size is -96, not above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0, not a number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "large"}}, "rope_theta is 'large', not a number"),
    ],
)
def test_a_folder_that_is_no_lvm_is_refused_in_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(WeightsError, match=message) as raised:
        backbone_facts(custom(folder))
    assert one_line(raised.value)
    assert str(folder) in str(raised.value)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def drop_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def drop_head(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))


def drop_shard(folder: Path) -> None:
    drop_weights(folder)
    storage.write_json(str(folder / f"{WEIGHTS}.index.json"), {"weight_map": {"a": "model-00001-of-00002.safetensors"}})


def break_index(folder: Path) -> None:
    drop_weights(folder)
    storage.write_json(str(folder / f"{WEIGHTS}.index.json"), {"weights": []})


def nest_about(folder: Path) -> None:
    (folder / "covray.json").write_text("[" * 200_000)


def about(**values: Any) -> Callable[[Path], None]:
    return lambda folder: storage.write_json(str(folder / "covray.json"), values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "config.json: cannot be read"),
        (list_config, "of model type None"),
        (drop_config, "config.json is missing"),
        (drop_weights, "model.safetensors or model.safetensors.index.json is missing"),
        (pickle_weights, "only as pytorch_model.bin"),
        (cut_weights, "model.safetensors: cannot be read"),
        (drop_head, "lm_head.weight is missing"),
        (drop_shard, "model-00001-of-00002.safetensors is missing"),
        (break_index, "index.json: cannot be read"),
        (about(version=2), "covray.json: is of version 2, not 1"),
        (about(version=1, codebook=3), "covray.json: codebook: input should be a valid string; get the folder"),
        (nest_about, "covray.json: cannot be read"),
        (about(version=1, codebook="a", tokens_per_image="many"), "tokens_per_image: input should be a valid integer"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=message) as raised:
        backbone_facts(custom(folder))
    assert one_line(raised.value)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(torch.nan))
    with pytest.raises(WeightsError, match=r"up_proj\.weight holds values that are not finite") as raised:
        load(folder)
    assert one_line(raised.value)


def written(folder: Path, out: Path, dtype: torch.dtype = torch.float32, **known: Any) -> BackboneFacts:
    facts = replace(backbone_facts(custom(folder)), **known)
    assert facts.folder is not None
    write_backbone(out, facts, stored_tensors(facts.folder, facts.llama), dtype)
    return facts


def test_a_written_folder_is_the_same_model_and_knows_its_codes(llama_folder: Path, tmp_path: Path) -> None:
    written(llama_folder, tmp_path, codebook="abc", tokens_per_image=16)
    facts = backbone_facts(custom(tmp_path))
    assert (facts.codes, facts.codebook, facts.tokens_per_image) == (CODES, "abc", 16)
    before, after = (load(path).backbone_tensors() for path in (llama_folder, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_fused_model_can_be_written(llama_folder: Path, tmp_path: Path) -> None:
    model = load(llama_folder, dtype=torch.bfloat16)
    facts = backbone_facts(custom(llama_folder))
    write_backbone(tmp_path, facts, model.backbone_tensors().__getitem__, torch.bfloat16)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert reference.dtype == torch.bfloat16
    assert all(torch.equal(reference.get_parameter(name), view) for name, view in model.backbone_tensors().items())


def test_a_large_model_is_written_in_several_files(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_module, "_SHARD_SIZE", "100KB")
    written(llama_folder, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    reference = LlamaForCausalLM.from_pretrained(tmp_path)
    stored = load_file(llama_folder / WEIGHTS)
    assert all(torch.equal(parameter, stored[name]) for name, parameter in reference.named_parameters())
    load(tmp_path)


def test_a_tied_head_is_written(tmp_path: Path) -> None:
    written(write_llama(tmp_path / "tied", tie_word_embeddings=True), tmp_path / "out")
    before, after = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("tied", "out"))
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert not after.config.tie_word_embeddings


def force(id_: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor after which ``id_`` is likelier than all others, unless it was forbidden."""

    def processor(_: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, id_] += 1e6
        return scores

    return processor


def test_generate_does_not_take_image_code_2_for_the_end(llama_folder: Path, tmp_path: Path) -> None:
    prompt = torch.tensor([[5, 6, 7]])

    def generate(folder: Path) -> Tensor:
        model = LlamaForCausalLM.from_pretrained(folder)
        return model.generate(prompt, max_new_tokens=16, do_sample=False, logits_processor=[force(2)])[0, 3:]

    assert generate(llama_folder).tolist() == [2]  # the trap
    written(llama_folder, tmp_path)
    assert generate(tmp_path).tolist() == [2] * 16


def test_generate_makes_pictures_only(folder: Path, tmp_path: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"][CODES:].mul_(3))  # special ids would win
    prompt = torch.tensor([[5, 6, 7], [2, 2, 1]])

    def generate(path: Path) -> Tensor:
        model = LlamaForCausalLM.from_pretrained(path)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model.generate(prompt, max_new_tokens=100, do_sample=True, top_k=0)[:, 3:]

    assert (generate(folder) >= CODES).float().mean() > 0.5
    written(folder, tmp_path / "out")
    made = generate(tmp_path / "out")
    assert made.shape == (2, 100)
    assert (made < CODES).all()


def test_a_folder_without_special_ids_is_written_too(tmp_path: Path) -> None:
    written(write_llama(tmp_path / "delvm", vocab_size=8192, attention_bias=True), tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    made = model.generate(torch.tensor([[5]]), max_new_tokens=8, do_sample=False, logits_processor=[force(2)])
    assert made[0, 1:].tolist() == [2] * 8


def test_chains_must_be_of_the_backbones_codes(
    llama_folder: Path, write_dataset: Callable[..., tuple[str, list[dict[str, Any]]]]
) -> None:
    path, _ = write_dataset({"depth": 2})
    dataset = ChainDataset(path)
    unknown = backbone_facts(custom(llama_folder))
    require_same_codes(unknown, dataset)
    same = replace(unknown, codebook=dataset.fingerprints["codebook"], tokens_per_image=16)
    require_same_codes(same, dataset)
    for other, message in (
        (replace(same, codebook="0" * 64), "its codebook is"),
        (replace(same, tokens_per_image=256), "its pictures have 16 tokens, the backbone's 256"),
    ):
        with pytest.raises(DatasetError, match=message) as raised:
            require_same_codes(other, dataset)
        assert "\n" not in str(raised.value)
    edit(Path(path, "_dataset.json"), codes=65)
    with pytest.raises(DatasetError, match="its tokenizer has 65 codes, the backbone knows 64"):
        require_same_codes(unknown, ChainDataset(path))


def shard(folder: Path, pattern: str) -> list[Path]:
    """Write the weights of ``folder`` as two files whose names ``pattern`` has, with their index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        weight_map |= dict.fromkeys(part, pattern.format(number))
        save_file({name: tensors[name] for name in part}, folder / pattern.format(number), {"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / pattern.format(number) for number in (1, 2)]


@pytest.mark.parametrize("pattern", ["model-0000{}-of-00002.safetensors", "consolidated-0000{}-of-00002.safetensors"])
def test_what_an_index_names_is_loaded_and_counts(folder: Path, pattern: str) -> None:
    expected = load(folder).backbone_tensors()
    files = shard(folder, pattern)
    found = load(folder).backbone_tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    before = backbone_facts(custom(folder)).fingerprint
    for file in files:
        tensors = load_file(file)
        whole = file.read_bytes()
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, file, {"format": "pt"})
        assert backbone_facts(custom(folder)).fingerprint != before
        file.write_bytes(whole)
    assert backbone_facts(custom(folder)).fingerprint == before


def test_a_weight_in_two_shards_is_refused(folder: Path) -> None:
    first, second = shard(folder, "model-0000{}-of-00002.safetensors")
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name] * 3}, second, {"format": "pt"})
    for read in (backbone_facts, load_folder):
        with pytest.raises(WeightsError, match=f"{name} is also in another file") as raised:
            read(custom(folder))
        assert one_line(raised.value)


def load_folder(config: BackboneConfig) -> None:
    convert_backbone(str(config.path), f"{config.path}-out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_of_a_quantised_model_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    """Without their scales they would be loaded as numbers."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(WeightsError, match=f"{name} is stored as .*; give the weights as they were") as raised:
        backbone_facts(custom(folder))
    assert one_line(raised.value)
