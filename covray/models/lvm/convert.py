"""Convert backbones of other programs to the Hugging Face folders of a ``LlamaForCausalLM`` that covray reads.

- DeLVM's are InternLM's: a LLaMA with biases in its attention, under LLaMA's own names.
- LVM was trained by EasyLM, whose checkpoints are streams of (name, array) in msgpack. Its kernels are [inputs,
  outputs]. Its rotary embedding turns neighbouring pairs of a head where transformers turns the head's two halves, so
  that rows of queries and keys are reordered.
- LLaMA folders are written again, as safetensors, and so that ``generate`` stops at no image code.
"""

from __future__ import annotations

import functools
import math
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
from covray.io.model_folders import local_path
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
_CONTEXT = 4096  # of every LVM; EasyLM's files do not record it
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
    """A checkpoint that is open for reading."""

    layout: str
    facts: BackboneFacts
    tensor: Callable[[str], Tensor]
    """Returns a weight by its name in ``LlamaForCausalLM``, in the shape that it has there."""
    dtype: torch.dtype
    """The narrowest type that holds every weight exactly."""


@dataclass(frozen=True)
class ConvertedBackbone:
    """What was converted; the keys of ``covray convert backbone --json``."""

    layout: str
    out: str
    parameters: int
    dtype: str
    codes: int
    codebook: str
    """Fingerprint of the codebook, or ``not stated``."""


def convert_backbone(
    source: str, out: str, heads: int | None = None, tokenizer: str | None = None
) -> ConvertedBackbone:
    """Write the backbone ``source`` as a plain Hugging Face folder, and return what was converted.

    Weights keep their type. Memory is one written file of at most 5 GB.

    Args:
        source: A folder of DeLVM (InternLM) or of a LLaMA, with safetensors or ``pytorch_model.bin``; or a file that
            EasyLM streamed.
        out: A new folder.
        heads: Number of attention heads, which an EasyLM file does not record; known for LVM's published sizes.
        tokenizer: Folder, hub id or ``nano`` of the tokenizer whose codes the backbone knows. Its codebook is recorded
            in ``out``, and chains of another codebook are then refused.

    Raises:
        WeightsError: The checkpoint is damaged, is none of these, or is not an LVM.
        ConfigError: ``out`` cannot be used, or ``heads`` is needed.
    """
    path, target = local_path(source), local_path(out)
    require_new(target)
    if path.is_file():
        checkpoint = _read_easylm(path, heads)
    elif path.is_dir():
        checkpoint = _read_folder(path)
    else:
        raise ConfigError(f"{path}: no such file or folder; give a downloaded checkpoint")
    about = read_about(path)
    # Folders written by covray name their codebook; for others --tokenizer does.
    facts = replace(checkpoint.facts, codebook=about.codebook, tokens_per_image=about.tokens_per_image)
    # Recorded in the folder, so that chains of another codebook are refused later.
    if tokenizer is not None:
        known = load_tokenizer(TokenizerConfig(path=tokenizer), EngineConfig(device="cpu"))
        if known.codes > facts.codes:
            raise WeightsError(
                f"{tokenizer}: has {known.codes} codes, {path} knows {facts.codes}; give its own tokenizer"
            )
        facts = replace(facts, codebook=known.codebook_fingerprint, tokens_per_image=known.tokens_per_image)
    with new_folder(target) as folder:
        write_backbone(folder, facts, checkpoint.tensor, checkpoint.dtype)
    return ConvertedBackbone(
        layout=checkpoint.layout,
        out=out,
        parameters=parameters(facts.llama),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        codes=facts.codes,
        codebook=facts.codebook or "not stated",
    )


def _read_folder(folder: Path) -> _Source:
    """Read a folder whose weights have the names of ``LlamaForCausalLM``."""
    values, file = read_config(folder), folder / "config.json"
    layout = str(values.get("model_type"))
    if layout == "internlm":
        values = _internlm_as_llama(values, file)
    llama = checked_llama(values, file)
    facts = weightless_facts(llama, folder)
    files = weight_files(folder, _WEIGHTS)
    if not files:
        raise WeightsError(f"{folder}: {' or '.join(_WEIGHTS)} is missing; complete the folder, or give another")
    where = files[0] if len(files) == 1 else folder  # for messages
    tensors = read_all_tensors(files)
    frequencies = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    for name in frequencies:
        del tensors[name]  # computed, but stored in old folders
    # Tied weights are stored once; the folder that is written has both.
    if llama.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_tensors(where, stored, _shapes(llama))

    def tensor(name: str) -> Tensor:
        return require_finite(where, name, tensors[name])

    types = {tensor.dtype for tensor in tensors.values()}
    return _Source(layout, facts, tensor, _common_type(types))


def _internlm_as_llama(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the configuration of a LLaMA that computes what the InternLM of ``values`` computes."""
    required, optional = _INTERNLM
    for key in required:
        if key not in values:
            raise WeightsError(f"{file}: {key} is missing; get the folder again")
    if "rotary" in values:
        raise WeightsError(f"{file}: has a rotary of a later InternLM; give a folder of DeLVM")
    known = {}
    for key in (*required, *optional):
        if key in values:
            known[key] = values[key]
    return known | {"model_type": "llama", "attention_bias": bool(values.get("bias", True))}


def _shapes(llama: LlamaConfig) -> dict[str, Shape]:
    """Return the shape of every weight by its name in ``LlamaForCausalLM``."""
    with torch.device("meta"):
        return {name: tuple(view.shape) for name, view in Lvm(llama).backbone_tensors().items()}


def _common_type(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the narrowest type that holds values of all ``dtypes`` exactly."""
    return functools.reduce(torch.promote_types, dtypes)


# --- EasyLM ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """An array in a stream."""

    offset: int
    """Byte at which its item begins."""
    shape: Shape
    dtype: torch.dtype


def _read_easylm(file: Path, heads: int | None) -> _Source:
    entries = _index(file)
    llama = _easylm_llama(file, entries, heads)
    facts = weightless_facts(llama, file)
    expected = {}
    for name, shape in _shapes(llama).items():
        expected[_easylm_name(name)] = shape[::-1] if _is_kernel(name) else shape
    # flax keeps the matrices of linear layers as [inputs, outputs], transformers the other way round.
    stored = {name: entry.shape for name, entry in entries.items()}
    require_tensors(file, stored, expected)

    def tensor(name: str) -> Tensor:
        stored_name = _easylm_name(name)
        # One array at a time, from its place in the stream: the file may not fit in memory.
        with file.open("rb") as opened:
            opened.seek(entries[stored_name].offset)
            _, value = _next(file, _unpacker(opened))
        shape, dtype, data = _array(file, stored_name, value)
        weight = require_finite(file, stored_name, torch.frombuffer(bytearray(data), dtype=dtype).view(shape))
        if _is_kernel(name):
            weight = weight.t()
        # EasyLM applies RoPE to neighbouring pairs of a head, transformers to its two halves.
        if re.search(r"\.[qk]_proj\.", name):
            weight = _halves(weight, llama.num_attention_heads)
        return weight

    types = {entry.dtype for entry in entries.values()}
    return _Source("easylm", facts, tensor, _common_type(types))


def _index(file: Path) -> dict[str, _Entry]:
    """Return every weight of a stream by its name, from ``transformer`` or ``lm_head`` on. Holds an array at a time."""
    entries: dict[str, _Entry] = {}
    size = file.stat().st_size
    with file.open("rb") as opened:
        unpacker = _unpacker(opened)
        # A for loop over a stream that was cut would end without an error.
        while (offset := unpacker.tell()) < size:
            key, value = _next(file, unpacker)
            if key[0] in ("opt_state", "step"):  # parts of a whole training state
                continue
            # A training state wraps the weights once more.
            while key[0] == "params" and len(key) > 1:
                key = key[1:]
            name = "/".join(key)
            if name in entries:
                raise WeightsError(f"{file}: holds {name} twice; give another checkpoint")
            shape, dtype, _ = _array(file, name, value)
            entries[name] = _Entry(offset, shape, dtype)
    if not entries:
        raise WeightsError(f"{file}: holds no weights; give a checkpoint that EasyLM streamed")
    return entries


def _unpacker(opened: Any) -> Any:
    # Bounds on what a header may announce, as msgpack allocates memory for it before it reads the rest.
    return msgpack.Unpacker(
        opened, read_size=_READ_BYTES, max_buffer_size=2**31 - 1, max_array_len=64, max_map_len=64, max_str_len=4096
    )


def _next(file: Path, unpacker: Any) -> tuple[tuple[str, ...], bytes]:
    """Return the next key and value of a stream. Raises WeightsError for anything else."""
    start = unpacker.tell()
    try:
        item = unpacker.unpack()
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        kind = "ends within" if isinstance(error, msgpack.OutOfData) else "is not an EasyLM stream at"
        raise WeightsError(f"{file}: {kind} the item at byte {start}; get the checkpoint again") from error
    pair = item if isinstance(item, list) and len(item) == 2 else (None, None)
    if not (isinstance(pair[0], list) and pair[0] and all(map(_is_name, pair[0]))):
        raise WeightsError(
            f"{file}: is not an EasyLM stream at the item at byte {start}; give one of (name, array) pairs"
        )
    if not isinstance(pair[1], bytes):
        raise WeightsError(f"{file}: {'/'.join(pair[0])} is not an array; give another checkpoint")
    return tuple(pair[0]), pair[1]


def _is_name(part: object) -> bool:
    return isinstance(part, str) and part.isprintable()


def _array(file: Path, name: str, value: bytes) -> tuple[Shape, torch.dtype, bytes]:
    """Return shape, type and bytes of an array as flax packs it: an msgpack extension that holds the three."""
    try:
        extension = msgpack.unpackb(value)
        code = extension.code if isinstance(extension, msgpack.ExtType) else None
        # Nothing but the extension of arrays is decoded: a stream of a stranger holds data only.
        fields: Any = msgpack.unpackb(extension.data) if code == _ARRAY else (None, None, None)
        shape, dtype, data = fields
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise WeightsError(f"{file}: {name} cannot be read ({one_line(error)}); get the checkpoint again") from error
    complete = isinstance(shape, list) and isinstance(dtype, str) and isinstance(data, bytes)
    if not (complete and all(isinstance(side, int) and side >= 0 for side in shape)):
        raise WeightsError(f"{file}: {name} is not an array; give another checkpoint")
    if dtype not in _DTYPES:
        raise WeightsError(
            f"{file}: {name} is of type {dtype!r:.40}, not {', '.join(_DTYPES)}; give another checkpoint"
        )
    # A shape may not promise more than the bytes that are there.
    if math.prod(shape) * _DTYPES[dtype].itemsize != len(data):
        raise WeightsError(f"{file}: {name} has {len(data)} bytes for {shape}; get the checkpoint again")
    return tuple(shape), _DTYPES[dtype], data


def _easylm_llama(file: Path, entries: dict[str, _Entry], heads: int | None) -> LlamaConfig:
    """Return the architecture that the shapes of ``entries`` show, with ``heads``, or those of the published size."""

    def shape(name: str) -> tuple[int, int]:
        sides = entries[name].shape if name in entries else ()
        if len(sides) != 2:
            raise WeightsError(f"{file}: {name} is {list(sides) or 'missing'}; give a checkpoint of EasyLM's LLaMA")
        return sides[0], sides[1]

    vocabulary, width = shape("transformer/wte/embedding")
    inner = shape("transformer/h/0/feed_forward/w1/kernel")[1]
    in_layers = [name for name in entries if name.startswith("transformer/h/")]
    layers = len({name.split("/")[2] for name in in_layers})
    # No tensor shows the number of heads; published sizes are known by their width and depth.
    if heads is None:
        for published in map(llama_config, SCALES):
            if (published.hidden_size, published.num_hidden_layers) == (width, layers):
                heads = published.num_attention_heads
    if heads is None:
        raise ConfigError(
            f"--heads: {file} has hidden size {width} and {layers} layers, not a published size; pass its number of "
            "heads"
        )
    # RoPE turns pairs of a head's numbers.
    if width % (2 * heads):
        raise ConfigError(
            f"--heads {heads}: a hidden size of {width} does not divide into them, each of an even size; pass the "
            "model's own"
        )
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
    """Return EasyLM's name of the weight ``name`` of ``LlamaForCausalLM``."""
    ends = {"model.embed_tokens": "transformer/wte/embedding", "model.norm": "transformer/ln_f/kernel"}
    stem = name.removesuffix(".weight")
    in_layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if in_layer:
        return f"transformer/h/{in_layer[1]}/{_EASYLM[in_layer[2]]}/kernel"
    return ends.get(stem, "lm_head/kernel")


def _is_kernel(name: str) -> bool:
    """Return whether EasyLM stores the weight ``name`` of ``LlamaForCausalLM`` as [inputs, outputs]."""
    return "_proj." in name or name == "lm_head.weight"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of ``weight`` [outputs, inputs] within each of ``heads``: first the even ones, then the odd.

    Pair i of EasyLM's rotary embedding, rows 2i and 2i + 1 of a head, then is what transformers pairs: rows i and
    i + d/2.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
