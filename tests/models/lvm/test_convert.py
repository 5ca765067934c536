"""Every layout is written from its description, and computed by a plain forward of its own, beside ``Lvm``."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from covray.cli.app import app
from covray.config import BackboneConfig, EngineConfig, TokenizerConfig
from covray.errors import ConfigError, CovrayError, WeightsError
from covray.models.lvm.backbone import backbone_facts
from covray.models.lvm.convert import convert_backbone
from covray.models.tokenizer.vqgan import load_tokenizer
from tests.support.backbones import CODES, load, random_batch, write_llama

Weights = dict[str, Tensor]
WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 64, 96, 2, 4, CODES + 100
IDS = random_batch(40).ids


def one_line(error: CovrayError) -> bool:
    return "\n" not in str(error) and ";" in str(error)


def refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(CovrayError) as raised:
        convert_backbone(str(source), str(out), **options)
    assert one_line(raised.value)
    assert not out.exists()
    return str(raised.value)


def require_logits(folder: Path, expected: Tensor, tolerance: float = 2e-5) -> None:
    """The written folder computes ``expected`` [T, vocabulary] after ``IDS``, in transformers and here."""
    assert expected.std() > 0.5  # the comparison is of something
    with torch.inference_mode():
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS[None]).logits[0]
        torch.testing.assert_close(reference, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(load(folder).logits(IDS, (len(IDS),)), expected, rtol=0, atol=tolerance)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of [T, heads, d] each, written out; gives [T, heads * d]."""
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, value).flatten(1)


def angles(count: int, size: int) -> Tensor:
    """Of the rotary embedding: [T, d / 2]."""
    return torch.outer(torch.arange(count), 10000.0 ** -(torch.arange(0, size, 2) / size))


# --- EasyLM ---------------------------------------------------------------------------------------------------------


def easylm_weights(
    width: int = WIDTH, inner: int = INNER, layers: int = LAYERS, vocabulary: int = VOCABULARY
) -> Weights:
    """Random weights as EasyLM's LLaMA has them: kernels [inputs, outputs], norms a kernel each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[0] ** 0.5

    def norm() -> Tensor:
        return 0.5 + torch.rand(width, generator=generator)

    weights = {"transformer/wte/embedding": torch.randn(vocabulary, width, generator=generator)}
    for number in range(layers):
        layer = f"transformer/h/{number}"
        for name in ("wq", "wk", "wv", "wo"):
            weights[f"{layer}/attention/{name}/kernel"] = normal(width, width)
        weights[f"{layer}/feed_forward/w1/kernel"] = normal(width, inner)
        weights[f"{layer}/feed_forward/w2/kernel"] = normal(inner, width)
        weights[f"{layer}/feed_forward/w3/kernel"] = normal(width, inner)
        weights[f"{layer}/attention_norm/kernel"] = norm()
        weights[f"{layer}/ffn_norm/kernel"] = norm()
    weights["transformer/ln_f/kernel"] = norm()
    weights["lm_head/kernel"] = normal(width, vocabulary)
    return weights


def easylm_logits(weights: Mapping[str, Tensor], ids: Tensor, heads: int = HEADS) -> Tensor:
    """EasyLM's LLaMA: a head's values are pairs (real, imaginary) of neighbours, multiplied by e^(i angle)."""
    x = weights["transformer/wte/embedding"][ids]
    turn = torch.polar(torch.ones(()), angles(len(ids), x.shape[1] // heads))[:, None]

    def turned(part: Tensor) -> Tensor:
        pairs = torch.view_as_complex(part.reshape(len(ids), heads, -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(2)

    number = 0
    while (layer := f"transformer/h/{number}") + "/ffn_norm/kernel" in weights:
        h = rms(x, weights[f"{layer}/attention_norm/kernel"])
        q, k, v = (h @ weights[f"{layer}/attention/{name}/kernel"] for name in ("wq", "wk", "wv"))
        mixed = causal(turned(q), turned(k), v.view(len(ids), heads, -1))
        x = x + mixed @ weights[f"{layer}/attention/wo/kernel"]
        h = rms(x, weights[f"{layer}/ffn_norm/kernel"])
        w1, w2, w3 = (weights[f"{layer}/feed_forward/{name}/kernel"] for name in ("w1", "w2", "w3"))
        x = x + (F.silu(h @ w1) * (h @ w3)) @ w2
        number += 1
    return rms(x, weights["transformer/ln_f/kernel"]) @ weights["lm_head/kernel"]


def packed(value: Tensor, dtype: str | None = None) -> bytes:
    """An array as flax packs it."""
    name = dtype or str(value.dtype).removeprefix("torch.")
    data = value.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(msgpack.packb(msgpack.ExtType(1, msgpack.packb((tuple(value.shape), name, data)))))


def item(name: str, value: bytes, prefix: tuple[str, ...] = ("params",)) -> bytes:
    return bytes(msgpack.packb(((*prefix, *name.split("/")), value)))


def write_easylm(file: Path, weights: Mapping[str, Tensor], prefix: tuple[str, ...] = ("params",)) -> Path:
    file.write_bytes(b"".join(item(name, packed(tensor), prefix) for name, tensor in weights.items()))
    return file


@pytest.fixture(scope="module")
def weights() -> Weights:
    return easylm_weights()


def test_easylm_becomes_the_same_model(weights: Weights, tmp_path: Path) -> None:
    made = convert_backbone(str(write_easylm(tmp_path / "streaming_params", weights)), str(tmp_path / "out"), HEADS)
    assert made.layout == "easylm"
    assert made.parameters == sum(tensor.numel() for tensor in weights.values())
    assert (made.dtype, made.codes, made.codebook) == ("float32", CODES, "not stated")
    require_logits(tmp_path / "out", easylm_logits(weights, IDS))
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(tmp_path / "out")))
    assert (facts.codes, facts.llama.max_position_embeddings) == (CODES, 4096)
    assert facts.llama.eos_token_id is None


def test_other_heads_are_another_model(weights: Weights, tmp_path: Path) -> None:
    file = write_easylm(tmp_path / "params", weights)
    for heads in (2, 8):
        convert_backbone(str(file), str(tmp_path / str(heads)), heads)
        require_logits(tmp_path / str(heads), easylm_logits(weights, IDS, heads))
    with pytest.raises(AssertionError):
        require_logits(tmp_path / "2", easylm_logits(weights, IDS, 8))


def test_a_training_state_is_read_for_its_weights_in_any_order(weights: Weights, tmp_path: Path) -> None:
    state = b"".join(
        (
            item("opt_state/1/0/mu/params/lm_head/kernel", packed(weights["lm_head/kernel"]), ()),
            *(item(name, packed(weights[name]), ("params", "params")) for name in reversed(weights)),
            item("step", bytes(msgpack.packb(msgpack.ExtType(3, b""))), ()),
        )
    )
    (tmp_path / "streaming_train_state").write_bytes(state)
    convert_backbone(str(tmp_path / "streaming_train_state"), str(tmp_path / "out"), HEADS)
    require_logits(tmp_path / "out", easylm_logits(weights, IDS))


@pytest.mark.parametrize(
    ("dtype", "norms", "written"),
    [
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
        (torch.float16, torch.float16, "float16"),
        (torch.float16, torch.bfloat16, "float32"),
    ],
)
def test_weights_keep_their_values_in_whatever_type(
    weights: Weights, tmp_path: Path, dtype: torch.dtype, norms: torch.dtype, written: str
) -> None:
    stored = {name: tensor.to(norms if tensor.ndim == 1 else dtype) for name, tensor in weights.items()}
    made = convert_backbone(str(write_easylm(tmp_path / "params", stored)), str(tmp_path / "out"), HEADS)
    assert made.dtype == written
    require_logits(tmp_path / "out", easylm_logits({name: part.float() for name, part in stored.items()}, IDS))


def test_heads_of_published_sizes_are_known(tmp_path: Path) -> None:
    weights = easylm_weights(width=256, inner=8, layers=6)  # the nano's: 4 heads
    convert_backbone(str(write_easylm(tmp_path / "params", weights)), str(tmp_path / "out"))
    require_logits(tmp_path / "out", easylm_logits(weights, IDS, heads=4))


def test_heads_that_are_not_known_are_asked_for(weights: Weights, tmp_path: Path) -> None:
    file = write_easylm(tmp_path / "params", weights)
    assert "--heads: " in refusal(file, tmp_path / "out")
    for heads in (3, 64):
        assert f"--heads {heads}: " in refusal(file, tmp_path / "out", heads=heads)


HEAD = "lm_head/kernel"
DOWN = "transformer/h/1/feed_forward/w2/kernel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({HEAD: None}, "lm_head/kernel is missing"),
        ({DOWN: None}, f"{DOWN} is missing"),
        ({"transformer/h/0/feed_forward/w1/kernel": None}, "h/0/feed_forward/w1/kernel is missing"),
        ({"transformer/h/0/attention/bq/bias": torch.zeros(3)}, "unexpected tensor transformer/h/0/attention/bq/bias"),
        ({DOWN: torch.zeros(WIDTH, INNER)}, f"{DOWN} is [64, 96], not [96, 64]"),
        ({DOWN: torch.full((INNER, WIDTH), torch.inf)}, f"{DOWN} holds values that are not finite"),
        ({DOWN: torch.zeros(INNER, WIDTH, dtype=torch.float64)}, f"{DOWN} is of type 'float64'"),
        (
            {"transformer/wte/embedding": torch.zeros(32000, WIDTH), HEAD: torch.zeros(WIDTH, 32000)},
            "of 32000 is not one",
        ),
    ],
)
def test_a_stream_of_another_model_is_refused(
    weights: Weights, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    changed = {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}
    file = write_easylm(tmp_path / "params", changed)
    text = refusal(file, tmp_path / "out", heads=HEADS)
    assert message in text
    assert str(file) in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params"]  # nothing half-made is left


def test_a_stream_that_was_cut_is_refused_wherever(weights: Weights, tmp_path: Path) -> None:
    whole = write_easylm(tmp_path / "params", weights).read_bytes()
    ends = [0]
    for name, tensor in weights.items():
        ends.append(ends[-1] + len(item(name, packed(tensor))))
    assert ends[-1] == len(whole)
    for cut in (ends[3] + 1, ends[3] + 20, ends[4] - 1, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        assert "ends within the item at byte " in refusal(tmp_path / "cut", tmp_path / "out", heads=HEADS)
    (tmp_path / "cut").write_bytes(whole[: ends[5]])  # between two
    assert " is missing" in refusal(tmp_path / "cut", tmp_path / "out", heads=HEADS)
    (tmp_path / "cut").write_bytes(whole + item(HEAD, packed(weights[HEAD])))
    assert "holds lm_head/kernel twice" in refusal(tmp_path / "cut", tmp_path / "out", heads=HEADS)
    (tmp_path / "cut").write_bytes(b"")
    assert "holds no weights" in refusal(tmp_path / "cut", tmp_path / "out", heads=HEADS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is not an EasyLM stream at the item at byte 0"),
        (b"\xc1" * 9, "is not an EasyLM stream at the item at byte 0"),
        (b"\xdd\x7f\xff\xff\xf0", "is not an EasyLM stream"),  # announces 2 G entries
        (b"\xdf\x7f\xff\xff\xf0", "is not an EasyLM stream"),
        (b"\x92\x91\xa1a\xc6\x7f\xff\xff\xf0", "ends within"),  # announces 2 GiB of bytes
        (b"\x91" * 5000, "is not an EasyLM stream"),
        (msgpack.packb({"params": {"lm_head": 1}}), "is not an EasyLM stream"),  # what flax writes whole
        (msgpack.packb((["a", 1], b"")), "is not an EasyLM stream"),
        (msgpack.packb(([], b"")), "is not an EasyLM stream"),
        (msgpack.packb((["a\nb"], b"")), "is not an EasyLM stream"),
        (msgpack.packb((["a"], "text")), "a is not an array"),
        (msgpack.packb((["a"], b"\xc1")), "a cannot be read"),
        (msgpack.packb((["a"], msgpack.packb(3))), "a is not an array"),
        (msgpack.packb((["a"], msgpack.packb(msgpack.ExtType(2, b"\x01")))), "a is not an array"),
        (msgpack.packb((["a"], msgpack.packb(msgpack.ExtType(1, b"\x01")))), "a cannot be read"),
        (item("a", msgpack.packb(msgpack.ExtType(1, msgpack.packb(([2], ["float32"], b""))))), "a is not an array"),
        (item("a", packed(torch.zeros(2), "int8")), "a is of type 'int8'"),
        (item("a", packed(torch.zeros(2), "float16")), "a has 8 bytes for [2]"),
        (item("a", packed(torch.zeros(2))), "transformer/wte/embedding is missing"),
    ],
)
def test_a_file_that_is_no_stream_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "params").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refusal(tmp_path / "params", tmp_path / "out", heads=HEADS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB: what is announced is not taken


# --- DeLVM ----------------------------------------------------------------------------------------------------------


def delvm_weights(vocabulary: int = 8192) -> Weights:
    """Random weights as DeLVM's InternLM has them: biases in all of attention, none elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {"model.embed_tokens.weight": torch.randn(vocabulary, WIDTH, generator=generator)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        for name in ("q", "k", "v", "o"):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = normal(WIDTH, WIDTH)
            weights[f"{layer}.self_attn.{name}_proj.bias"] = torch.randn(WIDTH, generator=generator)
        weights[f"{layer}.self_attn.rotary_emb.inv_freq"] = angles(2, WIDTH // HEADS)[1]
        weights[f"{layer}.mlp.gate_proj.weight"] = normal(INNER, WIDTH)
        weights[f"{layer}.mlp.down_proj.weight"] = normal(WIDTH, INNER)
        weights[f"{layer}.mlp.up_proj.weight"] = normal(INNER, WIDTH)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = 0.5 + torch.rand(WIDTH, generator=generator)
    weights["model.norm.weight"] = 0.5 + torch.rand(WIDTH, generator=generator)
    weights["lm_head.weight"] = normal(vocabulary, WIDTH)
    return weights


def delvm_logits(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """DeLVM's model: InternLM turns the halves of a head."""
    x = weights["model.embed_tokens.weight"][ids]
    turn = angles(len(ids), WIDTH // HEADS)[:, None]

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def turned(part: Tensor) -> Tensor:
        first, second = part.chunk(2, -1)
        cos, sin = turn.cos(), turn.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        h = rms(x, weights[f"{layer}.input_layernorm.weight"])
        q, k, v = (linear(f"{layer}.self_attn.{name}_proj", h).view(len(ids), HEADS, -1) for name in "qkv")
        x = x + linear(f"{layer}.self_attn.o_proj", causal(turned(q), turned(k), v))
        h = rms(x, weights[f"{layer}.post_attention_layernorm.weight"])
        x = x + linear(
            f"{layer}.mlp.down_proj", F.silu(linear(f"{layer}.mlp.gate_proj", h)) * linear(f"{layer}.mlp.up_proj", h)
        )
    return linear("lm_head", rms(x, weights["model.norm.weight"]))


DELVM = {
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoModel": "modeling_internlm.InternLMForCausalLM"},
    "bias": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 2048,
    "model_type": "internlm",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 8192,
}


def write_delvm(folder: Path, weights: Weights, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DELVM | changes))
    (folder / "modeling_internlm.py").write_text("raise SystemExit('code of the checkpoint was run')")
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def delvm() -> Weights:
    return delvm_weights()


def test_delvm_becomes_the_same_model(delvm: Weights, tmp_path: Path) -> None:
    source = write_delvm(tmp_path / "delvm", delvm)
    made = convert_backbone(str(source), str(tmp_path / "out"))
    assert (made.layout, made.codes, made.dtype) == ("internlm", 8192, "float32")
    require_logits(tmp_path / "out", delvm_logits(delvm, IDS))
    written = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name: tensor for name, tensor in delvm.items() if not name.endswith("inv_freq")}
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], kept[name]) for name in kept)
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(tmp_path / "out")))
    assert (facts.codes, facts.llama.max_position_embeddings, facts.llama.attention_bias) == (8192, 2048, True)
    assert (facts.llama.pad_token_id, facts.llama.eos_token_id) == (None, None)


def test_delvm_in_half_and_in_several_safetensors(delvm: Weights, tmp_path: Path) -> None:
    source = write_delvm(tmp_path / "delvm", {})
    (source / "pytorch_model.bin").unlink()
    half = {name: tensor.half() for name, tensor in delvm.items()}
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: parts[number % 2] for number, name in enumerate(half)}
    for part in parts:
        save_file({name: tensor for name, tensor in half.items() if where[name] == part}, source / part)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert convert_backbone(str(source), str(tmp_path / "out")).dtype == "float16"
    require_logits(tmp_path / "out", delvm_logits({name: part.float() for name, part in half.items()}, IDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "is of model type vit, not llama"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"rotary": {"base": 10000, "type": "dynamic"}}, "rotary of a later InternLM"),
        ({"vocab_size": 103168}, "vocabulary of 103168 is not one of image codes"),
        ({"bias": False}, "unexpected tensor model.layers.0.self_attn.k_proj.bias"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"intermediate_size": 88}, "mlp.gate_proj.weight is [96, 64], not [88, 64]"),
    ],
)
def test_a_delvm_that_is_something_else_is_refused(
    delvm: Weights, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = write_delvm(tmp_path / "delvm", delvm, **changes)
    text = refusal(source, tmp_path / "out")
    assert message in text
    assert str(source) in text


def test_a_delvm_without_its_sizes_is_refused(delvm: Weights, tmp_path: Path) -> None:
    source = write_delvm(tmp_path / "delvm", delvm)
    config = {key: value for key, value in DELVM.items() if key != "num_attention_heads"}
    (source / "config.json").write_text(json.dumps(config))
    assert "config.json: num_attention_heads is missing" in refusal(source, tmp_path / "out")


class Malice:
    """Runs when unpickled."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.touched),)


def test_damaged_weights_are_refused_and_nothing_in_them_runs(delvm: Weights, tmp_path: Path) -> None:
    source, out = write_delvm(tmp_path / "delvm", delvm), tmp_path / "out"
    file = source / "pytorch_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert f"{file}: is not a PyTorch file" in refusal(source, out)
    torch.save(delvm | {"more": Malice(tmp_path / "ran")}, file)
    assert f"{file}: needs posix.mkdir" in refusal(source, out)
    name = "model.layers.1.mlp.up_proj.weight"
    for value, message in (
        (None, f"{file}: {name} is missing"),
        (torch.zeros(2), f"{file}: {name} is [2], not [96, 64]"),
        (torch.full((INNER, WIDTH), torch.nan), f"{file}: {name} holds values that are not finite"),
        (torch.zeros(INNER, WIDTH, dtype=torch.int64), f"{file}: {name} is of type torch.int64"),
    ):
        torch.save({key: tensor for key, tensor in (delvm | {name: value}).items() if tensor is not None}, file)
        assert message in refusal(source, out)
    file.unlink()
    assert "or pytorch_model.bin or pytorch_model.bin.index.json is missing" in refusal(source, out)
    assert not (tmp_path / "ran").exists()


def test_an_index_leads_nowhere_else(delvm: Weights, tmp_path: Path) -> None:
    source = write_delvm(tmp_path / "delvm", delvm)
    (source / "pytorch_model.bin").rename(tmp_path / "secret.bin")
    folder = write_llama(tmp_path / "llama")  # and so it is when a folder is used as it is
    (folder / "model.safetensors").unlink()
    for outside in ("../secret.bin", f"{tmp_path}/secret.bin", "a/../../secret.bin"):
        index = json.dumps({"weight_map": {"lm_head.weight": outside}})
        for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
            (source / name).write_text(index)
            assert f"{name}: lists {outside}, which is not a file of its folder" in refusal(source, tmp_path / "out")
            (source / name).unlink()
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(WeightsError, match="which is not a file of its folder"):
            backbone_facts(BackboneConfig(scale="custom", path=str(folder)))


# --- LVM ------------------------------------------------------------------------------------------------------------


def write_lvm(folder: Path) -> Path:
    """As LVM's 7B is published: fp16 in several safetensors, and a generation configuration that ends at id 2."""
    write_llama(folder, dtype=torch.float16, shard_size="60KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 2)
    return folder


def second_wins(_: Tensor, scores: Tensor) -> Tensor:
    scores[:, 2] += 1e6
    return scores


def generated(folder: Path) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = model.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False, logits_processor=[second_wins])
    return [int(token) for token in made[0, 2:]]


def test_lvms_folder_loads_as_it_is_and_is_repaired_when_written(tmp_path: Path) -> None:
    source = write_lvm(tmp_path / "LVM_ckpts")
    as_it_is = load(source)
    assert as_it_is.config.eos_token_id is None
    made = convert_backbone(str(source), str(tmp_path / "out"))
    assert (made.layout, made.dtype, made.codes) == ("llama", "float16", CODES)
    written = load(tmp_path / "out")
    assert torch.equal(written.logits(IDS, (40,)), as_it_is.logits(IDS, (40,)))
    assert generated(source) == [2]  # the trap
    assert generated(tmp_path / "out") == [2] * 8


@pytest.mark.parametrize("tied", [False, True])
def test_pickled_weights_become_safetensors(tmp_path: Path, tied: bool) -> None:
    source = write_llama(tmp_path / "llama", tie_word_embeddings=tied)
    expected = load(source).logits(IDS, (40,))
    stored = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    where = {name: names["layers.1" in name] for name in stored}
    for file in names:
        torch.save({name: tensor for name, tensor in stored.items() if where[name] == file}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(WeightsError, match=r"only as pytorch_model\.bin.*covray convert backbone"):
        backbone_facts(BackboneConfig(scale="custom", path=str(source)))
    convert_backbone(str(source), str(tmp_path / "out"))
    assert torch.equal(load(tmp_path / "out").logits(IDS, (40,)), expected)
    (source / names[1]).unlink()
    assert f"{names[1]} is missing" in refusal(source, tmp_path / "other")


def test_the_codes_that_a_backbone_knows_are_written_and_kept(tmp_path: Path, vqgan_folder: Path) -> None:
    source = write_lvm(tmp_path / "LVM_ckpts")
    codebook = load_tokenizer(TokenizerConfig(path=str(vqgan_folder)), EngineConfig(device="cpu")).codebook_fingerprint
    made = convert_backbone(str(source), str(tmp_path / "out"), tokenizer=str(vqgan_folder))
    assert made.codebook == codebook
    again = convert_backbone(str(tmp_path / "out"), str(tmp_path / "again"))
    assert again.codebook == codebook
    facts = backbone_facts(BackboneConfig(scale="custom", path=str(tmp_path / "again")))
    assert (facts.codebook, facts.tokens_per_image) == (codebook, 16)
    small = write_llama(tmp_path / "small", vocab_size=150)
    assert f"{vqgan_folder}: has 64 codes, {small}" in refusal(small, tmp_path / "other", tokenizer=str(vqgan_folder))


def test_what_is_not_converted_names_the_command(weights: Weights, delvm: Weights, tmp_path: Path) -> None:
    for path in (write_easylm(tmp_path / "streaming_params", weights), write_delvm(tmp_path / "delvm", delvm)):
        with pytest.raises(WeightsError, match="covray convert backbone") as raised:
            backbone_facts(BackboneConfig(scale="custom", path=str(path)))
        assert one_line(raised.value)
        assert str(path) in str(raised.value)


def test_the_command_says_what_it_wrote(weights: Weights, tmp_path: Path) -> None:
    file = write_easylm(tmp_path / "params", weights)
    arguments = ["convert", "backbone", str(file), "--out", str(tmp_path / "out"), "--heads", str(HEADS), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert json.loads(done.stdout)["parameters"] == sum(tensor.numel() for tensor in weights.values())
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ConfigError)  # one line and exit code 2, as every CovrayError


def test_a_source_or_out_that_cannot_be_used(weights: Weights, tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refusal(tmp_path / "empty", tmp_path / "out")
    file = write_easylm(tmp_path / "params", weights)
    shutil.copy(file, tmp_path / "empty")
    with pytest.raises(ConfigError, match="already exists; give a new folder"):
        convert_backbone(str(file), str(tmp_path / "empty"), HEADS)


def test_a_weight_is_asked_for_alone(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B in float32 is 26 GB: no more of a stream is in memory than an array and the file that is written."""
    held: list[int] = []
    take: Callable[..., Any] = torch.frombuffer

    def counted(data: bytearray, **options: Any) -> Tensor:
        held.append(len(data))
        return take(data, **options)

    monkeypatch.setattr(torch, "frombuffer", counted)
    convert_backbone(str(write_easylm(tmp_path / "params", weights)), str(tmp_path / "out"), HEADS)
    assert sorted(held) == sorted(tensor.nbytes for tensor in weights.values())  # each once, when it is written
