"""Backbones of other programs as the Hugging Face folders of a ``LlamaForCausalLM`` that covray reads.

DeLVM's are InternLM's: a LLaMA with biases in its attention, under LLaMA's own names. LVM was trained by EasyLM, whose
checkpoints are streams of (name, array) in msgpack: kernels are [inputs, outputs], and the rotary embedding turns
neighbouring pairs of a head where transformers turns its two halves, so rows of queries and keys are reordered.
LLaMA folders are taken, too: out come safetensors, and a ``generate`` that stops at no image code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor
from transformers import LlamaConfig

from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, WeightsError, one_line
from covray.io.tensor_files import (
    Shape,
    new_folder,
    read_all_tensors,
    require_finite,
    require_new,
    require_tensors,
    weight_files,
)
from covray.models.lvm.backbone import (
    BackboneFacts,
    checked_llama,
    read_about,
    read_config,
    weightless_facts,
    write_backbone,
)
from covray.models.lvm.model import Lvm
from covray.models.lvm.scales import SCALES, llama_config, parameters
from covray.models.tokenizer.vqgan import load_tokenizer

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INTERNLM = (  # what its configuration must say, and may
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    ("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"),
)
_CONTEXT = 4096  # of every LVM; EasyLM's files do not say
_ARRAY = 1  # flax's type of extension
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_READ_BYTES = 2**20
_EASYLM = {  # transformers: EasyLM
    "self_attn.q_proj": "attention/wq",
    "self_attn.k_proj": "attention/wk",
    "self_attn.v_proj": "attention/wv",
    "self_attn.o_proj": "attention/wo",
    "mlp.gate_proj": "feed_forward/w1",
    "mlp.down_proj": "feed_forward/w2",
    "mlp.up_proj": "feed_forward/w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class _Source:
    """A checkpoint, its weights by their names in ``LlamaForCausalLM``, asked for one after another."""

    layout: str
    facts: BackboneFacts
    tensor: Callable[[str], Tensor]
    dtype: torch.dtype
    """The narrowest type that holds every weight exactly."""


def convert_backbone(source: str, out: str, heads: int | None = None, tokenizer: str | None = None) -> dict[str, Any]:
    """Write the backbone ``source`` as a plain Hugging Face folder ``out``; gives what was converted, to show.

    ``source``: a folder of DeLVM (InternLM) or of a LLaMA, with safetensors or ``pytorch_model.bin``, or a file that
    EasyLM streamed. ``heads``: an EasyLM file does not say; known for LVM's published sizes. ``tokenizer``: folder,
    hub id or ``nano``, whose codes the backbone knows: written beside it, and chains of other codes are then refused.
    Weights keep their type. Memory is that of one written file, of at most 5 GB. ``out`` must be new.
    Raises WeightsError for a checkpoint that is damaged, is none of these, or is no LVM, ConfigError for an ``out``
    that cannot be used or a number of heads that is wanted.
    """
    path, target = Path(source).expanduser(), Path(out).expanduser()
    require_new(target)
    if path.is_file():
        checkpoint = _read_easylm(path, heads)
    elif path.is_dir():
        checkpoint = _read_folder(path)
    else:
        raise ConfigError(f"{path}: no such file or folder; give a downloaded checkpoint")
    about = read_about(path)
    facts = replace(checkpoint.facts, codebook=about.get("codebook"), tokens_per_image=about.get("tokens_per_image"))
    if tokenizer is not None:
        known = load_tokenizer(TokenizerConfig(path=tokenizer), EngineConfig(device="cpu"))
        if known.codes > facts.codes:
            raise WeightsError(
                f"{tokenizer}: has {known.codes} codes, {path} knows {facts.codes}; give its own tokenizer"
            )
        facts = replace(facts, codebook=known.codebook_fingerprint, tokens_per_image=known.tokens_per_image)
    with new_folder(target) as folder:
        write_backbone(folder, facts, checkpoint.tensor, checkpoint.dtype)
    return {
        "layout": checkpoint.layout,
        "out": out,
        "parameters": parameters(facts.llama),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "codes": facts.codes,
        "codebook": facts.codebook or "not stated",
    }


def _read_folder(folder: Path) -> _Source:
    """A folder whose weights have the names of ``LlamaForCausalLM``."""
    values, file = read_config(folder), folder / "config.json"
    layout = str(values.get("model_type"))
    if layout == "internlm":
        missing = [key for key in _INTERNLM[0] if key not in values]
        if missing:
            raise WeightsError(f"{file}: {missing[0]} is missing; get the folder again")
        if "rotary" in values:
            raise WeightsError(f"{file}: has a rotary of a later InternLM; give a folder of DeLVM")
        known = {key: values[key] for keys in _INTERNLM for key in keys if key in values}
        values = known | {"model_type": "llama", "attention_bias": bool(values.get("bias", True))}
    llama = checked_llama(values, file)
    facts = weightless_facts(llama, folder)
    files = weight_files(folder, _WEIGHTS)
    if not files:
        raise WeightsError(f"{folder}: {' or '.join(_WEIGHTS)} is missing; complete the folder, or give another")
    where = files[0] if len(files) == 1 else folder
    tensors = read_all_tensors(files)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # computed, but stored in old folders
    if llama.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    require_tensors(where, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, _due(llama))

    def tensor(name: str) -> Tensor:
        return require_finite(where, name, tensors[name])

    return _Source(layout, facts, tensor, _common({tensor.dtype for tensor in tensors.values()}))


def _due(llama: LlamaConfig) -> dict[str, Shape]:
    with torch.device("meta"):
        return {name: tuple(view.shape) for name, view in Lvm(llama).backbone_tensors().items()}


def _common(dtypes: set[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


# --- EasyLM ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where an array is in a stream, and what it is."""

    offset: int
    shape: Shape
    dtype: torch.dtype


def _read_easylm(file: Path, heads: int | None) -> _Source:
    places = _index(file)
    llama = _easylm_llama(file, places, heads)
    facts = weightless_facts(llama, file)
    due = _due(llama)
    names = {name: _easylm_name(name) for name in due}
    stored = {names[name]: shape[::-1] if _is_kernel(name) else shape for name, shape in due.items()}
    require_tensors(file, {name: place.shape for name, place in places.items()}, stored)

    def tensor(name: str) -> Tensor:
        with file.open("rb") as opened:
            opened.seek(places[names[name]].offset)
            _, value = _next(file, _unpacker(opened))
        shape, _, data = _array(file, names[name], value)
        array = torch.frombuffer(bytearray(data), dtype=places[names[name]].dtype).view(shape)
        array = require_finite(file, names[name], array)
        array = array.t() if _is_kernel(name) else array
        return _halves(array, llama.num_attention_heads) if re.search(r"\.[qk]_proj\.", name) else array

    return _Source("easylm", facts, tensor, _common({place.dtype for place in places.values()}))


def _index(file: Path) -> dict[str, _Place]:
    """Every weight of a stream by its name, from ``transformer`` or ``lm_head`` on. Holds an array at a time."""
    places = {}
    size = file.stat().st_size
    with file.open("rb") as opened:
        unpacker = _unpacker(opened)
        # Not a for loop: over a stream that was cut, it would just end.
        while (offset := unpacker.tell()) < size:
            key, value = _next(file, unpacker)
            if key[0] in ("opt_state", "step"):  # of a whole training state
                continue
            while key[0] == "params" and len(key) > 1:
                key = key[1:]
            name = "/".join(key)
            if name in places:
                raise WeightsError(f"{file}: {name} is there twice; give another checkpoint")
            shape, dtype, _ = _array(file, name, value)
            places[name] = _Place(offset, shape, dtype)
    if not places:
        raise WeightsError(f"{file}: holds no weights; give a checkpoint that EasyLM streamed")
    return places


def _unpacker(opened: Any) -> Any:
    # Bounds on what a header may announce: memory is taken for it before the rest is read.
    return msgpack.Unpacker(
        opened, read_size=_READ_BYTES, max_buffer_size=2**31 - 1, max_array_len=64, max_map_len=64, max_str_len=4096
    )


def _next(file: Path, unpacker: Any) -> tuple[tuple[str, ...], bytes]:
    """Key and value that stand next in a stream."""
    start = unpacker.tell()
    try:
        item = unpacker.unpack()
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        kind = "ends within" if isinstance(error, msgpack.OutOfData) else "is no EasyLM stream at"
        raise WeightsError(f"{file}: {kind} the item at byte {start}; get the checkpoint again") from error
    pair = item if isinstance(item, list) and len(item) == 2 else (None, None)
    if not (isinstance(pair[0], list) and pair[0] and all(map(_is_name, pair[0]))):
        raise WeightsError(f"{file}: is no EasyLM stream at the item at byte {start}; give one of (name, array) pairs")
    if not isinstance(pair[1], bytes):
        raise WeightsError(f"{file}: {'/'.join(pair[0])} is no array; give another checkpoint")
    return tuple(pair[0]), pair[1]


def _is_name(part: object) -> bool:
    return isinstance(part, str) and part.isprintable()


def _array(file: Path, name: str, value: bytes) -> tuple[Shape, torch.dtype, bytes]:
    """Shape, type and bytes of an array as flax packs it: an extension that holds the three."""
    try:
        extension = msgpack.unpackb(value)
        code = extension.code if isinstance(extension, msgpack.ExtType) else None
        fields: Any = msgpack.unpackb(extension.data) if code == _ARRAY else (None, None, None)
        shape, dtype, data = fields
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise WeightsError(f"{file}: {name} cannot be read ({one_line(error)}); get the checkpoint again") from error
    whole = isinstance(shape, list) and isinstance(dtype, str) and isinstance(data, bytes)
    if not (whole and all(isinstance(side, int) and side >= 0 for side in shape)):
        raise WeightsError(f"{file}: {name} is no array; give another checkpoint")
    if dtype not in _DTYPES:
        raise WeightsError(
            f"{file}: {name} is of type {dtype!r:.40}, not {', '.join(_DTYPES)}; give another checkpoint"
        )
    if functools.reduce(lambda size, side: size * side, shape, _DTYPES[dtype].itemsize) != len(data):
        raise WeightsError(f"{file}: {name} has {len(data)} bytes for {shape}; get the checkpoint again")
    return tuple(shape), _DTYPES[dtype], data


def _easylm_llama(file: Path, places: dict[str, _Place], heads: int | None) -> LlamaConfig:
    """The architecture, from the shapes; its heads are known for the published sizes, or ``heads``."""

    def shape(name: str) -> tuple[int, int]:
        found = places[name].shape if name in places else ()
        if len(found) != 2:
            raise WeightsError(f"{file}: {name} is {list(found) or 'missing'}; give a checkpoint of EasyLM's LLaMA")
        return found[0], found[1]

    vocabulary, width = shape("transformer/wte/embedding")
    inner = shape("transformer/h/0/feed_forward/w1/kernel")[1]
    layers = len({name.split("/")[2] for name in places if name.startswith("transformer/h/")})
    if heads is None:
        published = {(llama.hidden_size, llama.num_hidden_layers): llama for llama in map(llama_config, SCALES)}
        heads = published[width, layers].num_attention_heads if (width, layers) in published else None
    if heads is None:
        raise ConfigError(f"--heads: {file} has hidden size {width} and {layers} layers, no published size; give them")
    if width % (2 * heads):
        raise ConfigError(f"--heads {heads}: a hidden size of {width} has no such heads of an even size; give its own")
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=_CONTEXT,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
    )


def _easylm_name(name: str) -> str:
    """EasyLM's name of the weight ``name`` of ``LlamaForCausalLM``."""
    ends = {"model.embed_tokens": "transformer/wte/embedding", "model.norm": "transformer/ln_f/kernel"}
    stem = name.removesuffix(".weight")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if found:
        return f"transformer/h/{found[1]}/{_EASYLM[found[2]]}/kernel"
    return ends.get(stem, "lm_head/kernel")


def _is_kernel(name: str) -> bool:
    """Whether EasyLM keeps the weight as [inputs, outputs]."""
    return "_proj." in name or name == "lm_head.weight"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows [outputs, inputs] reordered within every head: first the even, then the odd, as halves are turned."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
