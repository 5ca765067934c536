"""LVM backbones: LLaMA folders whose words are image codes, checked, loaded into the fused ``Lvm``, and written.

A backbone is a Hugging Face folder (``config.json``, safetensors) of a ``LlamaForCausalLM``. Folders that covray writes
also have a ``covray.json``, which names the codebook that the ids index.

The end of a sequence: LVM's folders name id 2 as its end, and 2 is also an image code, so that ``generate`` would stop
in the middle of a picture. No id ends a picture. The configuration read here therefore has ids neither for a beginning
nor for an end, and folders written here also forbid ``generate`` the special ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from covray.config import BackboneConfig, LoraConfig
from covray.errors import ConfigError, WeightsError, one_line
from covray.io import storage
from covray.io.model_folders import NANO_NAMES, fingerprint_folder, local_path, require_files, resolve_folder
from covray.io.tensor_files import STORED_FLOATS, duplicate_tensor, quantised_tensor, weight_files
from covray.models.lvm.lora import Lora
from covray.models.lvm.model import Lvm, is_adapter
from covray.models.lvm.records import BackboneRecord
from covray.models.lvm.scales import SPECIAL_IDS, llama_config
from covray.models.tokenizer.vqgan import MAX_CODES
from covray.seeds import hash_number

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_ABOUT_FILES = ("config.json", BackboneRecord.FILE)
_WEIGHT_FILES = (_WEIGHTS, "model-*-of-*.safetensors", _INDEX)
_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class BackboneFacts:
    """What is known of a backbone before its weights are loaded."""

    llama: LlamaConfig
    """The architecture, without ids for the beginning and end of a sequence, whatever the folder says."""
    folder: Path | None
    """Where the weights are; None for random weights."""
    fingerprint: str
    """SHA-256 (hex) of configuration and weights; of the configuration only where weights are random."""
    codes: int
    """Number of image codes: ids below it are tokens of pictures, ids from it on are special."""
    codebook: str | None
    """SHA-256 (hex) of the codebook that the ids index; None where the folder does not record one."""
    tokens_per_image: int | None
    """Tokens of a picture; None where the folder does not record it."""


def backbone_facts(config: BackboneConfig) -> BackboneFacts:
    """Find the backbone, check everything but the values of its weights, and fingerprint it.

    A hub id is downloaded; with ``init: random`` only its ``config.json``.

    Raises:
        ConfigError: ``config`` names no backbone, or another scale than the folder's.
        WeightsError: The folder is incomplete, or is not an LVM.
    """
    random = config.init == "random"
    path = config.path
    if path is None and config.scale == "custom":
        raise ConfigError("backbone.path: scale custom takes its sizes from a folder; give it (or a hub id)")
    if path is None and not random:
        if config.scale != "nano":
            raise ConfigError(
                f"backbone.path: the {config.scale} does not ship with covray; give its LlamaForCausalLM folder or hub "
                "id (or backbone.init=random, to measure speed)"
            )
        path = "nano"
    # Random weights need no folder: the scale alone says the architecture.
    if path is None:
        return weightless_facts(llama_config(config.scale), config.scale)

    # Random weights are made here: of a hub id only the configuration is downloaded.
    patterns = _ABOUT_FILES if random else (*_ABOUT_FILES, *_WEIGHT_FILES)
    if path not in NANO_NAMES and local_path(path).is_file():
        raise WeightsError(
            f"{path}: is a file, not a folder; if EasyLM wrote it, run covray convert backbone {path} --out DIR"
        )
    folder = resolve_folder(path, config.revision, "lvm", patterns)
    llama = _read_llama(folder)
    _require_scale(llama, folder, config.scale)
    facts = weightless_facts(llama, folder)
    if random:
        return facts
    about = read_about(folder)
    # Names, shapes and types of all weights, without reading their values.
    _find_tensors(folder, llama)
    return replace(
        facts,
        folder=folder,
        fingerprint=fingerprint_folder(folder, ("config.json", *_WEIGHT_FILES)),
        codebook=about.codebook,
        tokens_per_image=about.tokens_per_image,
    )


def weightless_facts(llama: LlamaConfig, where: Path | str) -> BackboneFacts:
    """Return what the architecture alone says, and take the ids for the beginning and end of a sequence from ``llama``.

    Raises WeightsError, naming ``where`` the architecture comes from, for a vocabulary that is not of image codes.
    """
    codes = _codes(llama, where)
    llama.bos_token_id = llama.eos_token_id = None
    llama.pad_token_id = codes if codes < llama.vocab_size else None
    return BackboneFacts(llama, None, _fingerprint(llama), codes, None, None)


def load_backbone(
    facts: BackboneFacts,
    config: BackboneConfig,
    lora: LoraConfig | Lora | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    recompute: bool = False,
    beside: Lvm | None = None,
) -> Lvm:
    """Return the backbone on ``device``: frozen weights and, with ``lora``, a fresh adapter in float32 to train.

    Memory on the way is the model and one tensor. The adapter starts as PEFT's does: A uniform in +-1/sqrt(inputs) (He
    et al. 2015 with a = sqrt(5)), B zero, so that it changes nothing yet; a mask's row is the mean of the codes'. Every
    tensor has a generator of its own, seeded by ``seed`` and its name: A is the same on any device and with any set of
    targets; random weights (normal, of the configuration's ``initializer_range``, 0.02) are the same on one kind of
    device.

    Args:
        facts: The backbone, as ``backbone_facts`` returns it.
        config: The configuration that ``facts`` were made from.
        lora: Rank, alpha and targets of the adapter, and its draft adapter; None for none.
        dtype: Type of the frozen weights.
        device: Where the model is put.
        seed: Decides the adapter, and the weights where they are random.
        recompute: Recompute activations in the backward pass (see ``Lvm``).
        beside: The same backbone with another adapter, loaded before; its frozen weights are used, not loaded again.

    Raises:
        WeightsError: A file cannot be read, or weights are not finite.
    """
    if isinstance(lora, LoraConfig):
        lora = Lora(lora.rank, lora.alpha, lora.targets)
    with torch.device("meta"):
        model = Lvm(facts.llama, lora, recompute)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        is_draft = ".draft." in name or name == "mask_row"
        if is_adapter(name):
            parameter.data = parameter.data.float()
        # A draft adapter is learned alone, for the model that it finds.
        parameter.requires_grad_(is_draft or (".lora_" in name and (lora is None or lora.draft is None)))
    model.allocate(device, {} if beside is None else beside.frozen_parameters())
    tensors = model.backbone_tensors()
    if facts.folder is not None and beside is None:
        _fill_from(facts.folder, facts.llama, tensors)
    elif beside is None:
        _fill_randomly(tensors, facts.llama.initializer_range, seed, device)
    drafts = {f"draft.{name}": tensor for name, tensor in model.draft_tensors().items()}
    for name, tensor in (model.lora_tensors() | drafts).items():
        # As PEFT starts LoRA: A is random and B is zero, so that the adapter changes nothing at first.
        if name.endswith("lora_A"):
            bound = tensor.shape[1] ** -0.5
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=_generator(seed, name, "cpu")))
        else:
            tensor.zero_()
    if model.mask_row is not None:  # a mask is like every code a little
        model.mask_row.data.copy_(model.embed.weight[: facts.codes].detach().float().mean(0))
    return model


def write_backbone(folder: Path, facts: BackboneFacts, tensor: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write a plain Hugging Face folder, and beside the weights what ``facts`` record of the codes.

    ``generate`` on the folder makes pictures only: no id ends a sequence, and special ids are suppressed.

    Args:
        folder: Created where it is absent.
        facts: Architecture, codes and codebook of the backbone.
        tensor: Returns a weight by its name in ``LlamaForCausalLM``, in the shape that it has there. It is asked for
            one weight after another, and large models are written in several files, so that memory is one file (5 GB).
        dtype: Type of the written weights.
    """
    llama = LlamaConfig.from_dict(facts.llama.to_dict())
    llama.tie_word_embeddings = False  # the head is written, tied or not
    llama.architectures = ["LlamaForCausalLM"]
    llama.dtype = dtype
    with torch.device("meta"):
        shapes = {name: view.shape for name, view in Lvm(llama).backbone_tensors().items()}
        shards = split_torch_state_dict_into_shards(
            {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, max_shard_size=_SHARD_SIZE
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in shards.filename_to_tensors.items():
        # Copies: safetensors refuses tensors that share memory, as the pieces of fused matrices do.
        part = {name: tensor(name).detach().to("cpu", dtype, copy=True).contiguous() for name in names}
        save_file(part, folder / file, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        storage.write_json(str(folder / _INDEX), index)
    special = list(range(facts.codes, llama.vocab_size))
    GenerationConfig(pad_token_id=llama.pad_token_id, suppress_tokens=special or None).save_pretrained(folder)
    BackboneRecord(codebook=facts.codebook, tokens_per_image=facts.tokens_per_image).write(str(folder))
    llama.save_pretrained(folder)


def stored_tensors(folder: Path, llama: LlamaConfig) -> Callable[[str], Tensor]:
    """Return a function that reads one weight of a backbone folder by name, on the CPU as stored."""
    files = _find_tensors(folder, llama)

    def tensor(name: str) -> Tensor:
        stored_name = name if name in files else "model.embed_tokens.weight"  # a tied head
        with _opened(files[stored_name]) as file:
            return file.get_tensor(stored_name)

    return tensor


def _read_llama(folder: Path) -> LlamaConfig:
    """Return the architecture in ``config.json``, if it is one that ``Lvm`` computes."""
    values = read_config(folder)
    kind = values.get("model_type")
    if kind == "internlm":
        raise WeightsError(
            f"{folder}: is an InternLM, as DeLVM's are; run covray convert backbone {folder} --out DIR, which makes it "
            "a LLaMA"
        )
    return checked_llama(values, folder / "config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model folder, empty where it is no JSON object. Raises WeightsError for no JSON."""
    require_files(folder, ["config.json"])
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get the folder again") from error
    return values if isinstance(values, dict) else {}


def checked_llama(values: dict[str, Any], file: Path) -> LlamaConfig:
    """Return the architecture that ``values`` of ``file`` describe. Raises WeightsError for one that ``Lvm`` is not."""
    kind = values.get("model_type")
    if kind != "llama":
        raise WeightsError(f"{file}: is of model type {kind}, not llama; give the folder of a LlamaForCausalLM")
    if values.get("quantization_config"):
        raise WeightsError(f"{file}: has a quantization_config; give the weights as they were before quantisation")
    try:
        llama = LlamaConfig.from_dict(values)
    except (StrictDataclassError, ArithmeticError, TypeError, ValueError, KeyError) as error:
        raise WeightsError(f"{file}: is not a LlamaConfig ({one_line(error)}); get the folder again") from error
    # transformers takes sizes of any sign, and a base of the rotation that makes every angle infinite.
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        if getattr(llama, key) < 1:
            raise WeightsError(f"{file}: {key} is {getattr(llama, key)}, not above 0; get the folder again")
    theta = llama.rope_parameters.get("rope_theta")
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise WeightsError(f"{file}: rope_theta is {theta!r}, not a number above 0; get the folder again")
    # The published LLaMA is computed and nothing else: what would be ignored is refused.
    rope = llama.rope_parameters
    checks = (  # key, value, the only value that is supported
        ("hidden_act", llama.hidden_act, "silu"),
        ("num_key_value_heads", llama.num_key_value_heads, llama.num_attention_heads),
        ("head_dim", llama.head_dim, llama.hidden_size // llama.num_attention_heads),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("is_causal", values.get("is_causal", True), True),
        ("layer_types", sorted(set(values.get("layer_types") or ["full_attention"])), ["full_attention"]),
    )
    for key, value, supported in checks:
        if value != supported:
            raise WeightsError(f"{file}: {key} is {value}, covray computes only {supported} here; give an LVM")
    return llama


def _codes(llama: LlamaConfig, where: Path | str) -> int:
    """Return the image codes of a vocabulary: all of DeLVM's 8192, all but the 100 special ids of LVM's 8292."""
    codes = llama.vocab_size if llama.vocab_size == MAX_CODES else llama.vocab_size - SPECIAL_IDS
    if not 0 < codes <= MAX_CODES:
        raise WeightsError(
            f"{where}: a vocabulary of {llama.vocab_size} is not one of image codes (at most {MAX_CODES}, and "
            f"{SPECIAL_IDS} special ids); give an LVM"
        )
    return codes


def _require_scale(llama: LlamaConfig, folder: Path, scale: str) -> None:
    if scale == "custom":
        return
    published = llama_config(scale)
    if (llama.hidden_size, llama.num_hidden_layers) != (published.hidden_size, published.num_hidden_layers):
        raise ConfigError(
            f"{folder}: has hidden size {llama.hidden_size} and {llama.num_hidden_layers} layers, scale {scale} has "
            f"{published.hidden_size} and {published.num_hidden_layers}; give the folder's scale, or custom"
        )


def read_about(folder: Path) -> BackboneRecord:
    """Return what covray recorded of the codes; nothing of them is known where another program wrote the folder."""
    return BackboneRecord.read_if_present(str(folder)) or BackboneRecord()


def _find_tensors(folder: Path, llama: LlamaConfig) -> dict[str, Path]:
    """Return the file of every weight, after comparing names, shapes and types with the architecture.

    Reads headers only.
    """
    with torch.device("meta"):
        expected = {name: tuple(view.shape) for name, view in Lvm(llama).backbone_tensors().items()}
    files: dict[str, Path] = {}
    for file in _weight_files(folder):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if name.endswith("rotary_emb.inv_freq"):  # computed here, but stored in old folders
                    continue
                if name in files:
                    raise duplicate_tensor(file, name)
                stored = opened.get_slice(name)
                _require_weight(folder, name, stored, expected.get(name))
                files[name] = file
    tied = {"lm_head.weight"} if llama.tie_word_embeddings else set()
    # With tied weights the head may be left out of the file.
    missing = expected.keys() - files.keys() - tied
    if missing:
        raise _disagreement(folder, f"{min(missing)} is missing")
    return files


def _require_weight(folder: Path, name: str, stored: Any, expected: tuple[int, ...] | None) -> None:
    """Check type and shape of the tensor ``stored`` (a slice of safetensors). Raises WeightsError."""
    shape = tuple(stored.get_shape())
    if expected is None:
        raise _disagreement(folder, f"unexpected tensor {name}")
    if shape != expected:
        raise _disagreement(folder, f"{name} is {list(shape)}, not {list(expected)}")
    if stored.get_dtype() not in STORED_FLOATS:
        raise quantised_tensor(folder, name, stored.get_dtype())


def _disagreement(folder: Path, detail: str) -> WeightsError:
    return WeightsError(f"{folder}: weights and config.json disagree, {detail}; get the folder again, or give another")


def _weight_files(folder: Path) -> list[Path]:
    files = weight_files(folder, (_WEIGHTS, _INDEX))
    if files:
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise WeightsError(
            f"{folder}: has weights only as pytorch_model.bin, which can run code; run covray convert backbone "
            f"{folder} --out DIR, which reads them without running any and writes safetensors"
        )
    raise WeightsError(f"{folder}: {_WEIGHTS} or {_INDEX} is missing; complete the folder, or give another")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get the folder again") from error


def _fill_from(folder: Path, llama: LlamaConfig, tensors: dict[str, Tensor]) -> None:
    files = _find_tensors(folder, llama)
    for name, tensor in _stored(files):
        if not tensors[name].copy_(tensor).isfinite().all():
            raise WeightsError(f"{folder}: {name} holds values that are not finite; get the folder again")
    if "lm_head.weight" not in files:  # tied
        tensors["lm_head.weight"].copy_(tensors["model.embed_tokens.weight"])


def _stored(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor, each file opened once."""
    for file, names in groupby(files, files.__getitem__):
        with _opened(file) as opened:
            for name in names:
                yield name, opened.get_tensor(name)


def _fill_randomly(tensors: dict[str, Tensor], deviation: float, seed: int, device: torch.device) -> None:
    """Fill weights as transformers initialises them: normal matrices, norms 1, biases 0."""
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            tensor.normal_(0.0, deviation, generator=_generator(seed, name, device))


def _generator(seed: int, name: str, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(hash_number(f"{seed} {name}", bits=63))


def _fingerprint(llama: LlamaConfig) -> str:
    # Of random weights there are no files: the architecture decides, whatever version of transformers wrote it.
    values = {key: value for key, value in llama.to_dict().items() if key not in ("transformers_version", "dtype")}
    return hashlib.sha256(f"random {json.dumps(values, sort_keys=True)}".encode()).hexdigest()
