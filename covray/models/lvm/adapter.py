"""Adapters in PEFT's format, which plain ``peft`` loads, and what a finished run leaves for others to use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import LlamaConfig

from covray.config import BackboneConfig, LoraConfig, differences
from covray.config.section import JsonObject
from covray.errors import ConfigError, WeightsError, one_line
from covray.io import storage
from covray.io.model_folders import local_path
from covray.io.records import Record
from covray.io.storage import Folder
from covray.io.tensor_files import new_folder, require_finite, require_new
from covray.models.lvm.adapter_parts import record_bytes
from covray.models.lvm.backbone import BackboneFacts, backbone_facts, stored_tensors, write_backbone
from covray.models.lvm.draft import Draft
from covray.models.lvm.draft_files import DRAFT_PREFIX, draft_files, read_draft
from covray.models.lvm.lora import Diffusion, Lora
from covray.models.lvm.model import Lvm
from covray.models.lvm.peft_options import read_lora
from covray.models.lvm.records import BlockDiffusionRecord, DraftRecord, VerifierRecord
from covray.models.lvm.verifier import Verifier, read_verifier
from covray.progress import stage

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER = "adapter"
"""Folder of a finished run that holds its adapter."""
MASK_ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
"""PEFT's name of the rows of the embedding that an adapter replaces, [1, width]; despite the name no difference."""
_PREFIX = "base_model.model."


class FinishedRun(Record):
    """What is read of the record of a run; ``covray.training.records`` has all of it."""

    FILE = "_run.json"
    FIX = "restore it"
    ERROR = ConfigError

    config: JsonObject
    fingerprints: dict[str, str | None]
    classes: JsonObject | None = None

    def section(self, name: str) -> JsonObject:
        """Return the section ``name`` of the configuration; empty where the run has none."""
        values = self.config.get(name)
        return values if isinstance(values, dict) else {}


def adapter_tensors(model: Lvm) -> dict[str, Tensor]:
    """Return copies of the adapter's matrices on the CPU, float32, by their names in PEFT's files.

    ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` is [rank, inputs], ``...lora_B.weight`` is
    [outputs, rank]. Those of a draft adapter begin with ``DRAFT_PREFIX``.
    """
    copies = {}
    for name, tensor in _views(model).items():
        copies[name] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return copies


def _views(model: Lvm) -> dict[str, Tensor]:
    """Return views of the adapter's tensors by their names in its files, the mask's row of the embedding too."""
    views = {}
    for name, view in model.lora_tensors().items():
        views[f"{_PREFIX}{name}.weight"] = view
    for name, view in model.draft_tensors().items():
        views[f"{DRAFT_PREFIX}{name}"] = view
    if model.mask_row is not None:
        name = f"{DRAFT_PREFIX}mask" if model.lora is not None and model.lora.draft is not None else MASK_ROW
        views[name] = model.mask_row.detach()[None]
    return views


def load_adapter_tensors(model: Lvm, tensors: Mapping[str, Tensor]) -> None:
    """Set the adapter of ``model`` to ``tensors`` (as ``adapter_tensors`` returns them).

    Raises WeightsError when they are of another backbone, rank or set of targets.
    """
    views = _views(model)
    _require_shapes(tensors, _shapes_of(views), "adapter")
    _require_mask(model.lora, model.config, "adapter")
    for name, view in views.items():
        view.copy_(tensors[name])


def adapter_files(model: Lvm, base_model_name: str) -> dict[str, bytes]:
    """Return the files of the adapter by name: ``adapter_config.json`` and ``adapter_model.safetensors``.

    One of block diffusion also has ``block_diffusion.json``, and one with a draft adapter ``draft.json`` and
    ``draft_model.safetensors``, which PEFT does not read.

    ``base_model_name`` is the folder or hub id of the backbone, by which ``peft`` finds it.
    """
    from peft import LoraConfig as PeftLora  # where it is needed: it takes a second

    assert model.lora is not None, "the model has no adapter"
    diffusion = model.lora.diffusion
    config = PeftLora(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_name,
        r=model.lora.rank,
        lora_alpha=model.lora.alpha,
        target_modules=model.lora.targets,
        trainable_token_indices=None if diffusion is None else {"embed_tokens": [diffusion.mask_id]},
        inference_mode=True,
    )
    drafts: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    # Drafts have a file of their own: PEFT knows no such tensors.
    for name, tensor in adapter_tensors(model).items():
        target = drafts if name.startswith(DRAFT_PREFIX) else tensors
        target[name] = tensor
    files = {WEIGHTS_FILE: save(tensors, {"format": "pt"})}
    if model.lora.draft is not None:
        files |= draft_files(model.lora.draft, drafts)
    if diffusion is not None:
        record = BlockDiffusionRecord(objective="block_diffusion", block=diffusion.block)
        files[record.FILE] = record_bytes(record)
    # PEFT keeps the targets in a set, whose order differs from process to process.
    files[CONFIG_FILE] = (json.dumps(config.to_dict(), default=sorted, indent=2, sort_keys=True) + "\n").encode()
    return files


def save_adapter(model: Lvm, folder: str, base_model_name: str) -> None:
    """Write the adapter of ``model`` as a PEFT folder, on any filesystem; see ``adapter_files``."""
    target = Folder(folder)
    for name, data in adapter_files(model, base_model_name).items():
        target.write_bytes(name, data)


def read_adapter(folder: str) -> tuple[Lora, dict[str, Tensor]]:
    """Return rank, alpha and targets of a PEFT folder, and its tensors by their names in the file; a draft's too.

    A verifier beside them is in the first of the two.

    The alpha of a rank-stabilised adapter (rsLoRA), which scales by alpha / sqrt(rank), is returned as the one that
    gives the same scale over the rank.

    Raises:
        WeightsError: The folder is incomplete, holds values that are not finite, or is a kind of adapter that covray
            does not compute as PEFT does.
    """
    source = Folder(folder)
    try:
        values = source.read_json(CONFIG_FILE)
        # Read once: the digest that a verifier names must be of the bytes that are loaded.
        weights = source.read_bytes(WEIGHTS_FILE)
        tensors = load(weights)
    except FileNotFoundError as error:
        raise WeightsError(f"{folder}: {CONFIG_FILE} or {WEIGHTS_FILE} is missing; give a PEFT adapter") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be read ({one_line(error)}); get it again") from error
    lora = read_lora(values if isinstance(values, dict) else {}, source.join(CONFIG_FILE))
    if isinstance(values, dict) and values.get("trainable_token_indices"):
        lora = replace(lora, diffusion=_read_diffusion(source, values["trainable_token_indices"]))
    for name, tensor in tensors.items():
        require_finite(source.join(WEIGHTS_FILE), name, tensor)
    if source.exists(DraftRecord.FILE):
        draft, drafts = read_draft(source)
        lora, tensors = replace(lora, draft=draft), tensors | drafts
    if source.exists(VerifierRecord.FILE):
        lora = replace(lora, verifier=read_verifier(source, hashlib.sha256(weights).hexdigest()))
    return lora, tensors


def _read_diffusion(folder: Folder, indices: Any) -> Diffusion:
    """Return what an adapter of block diffusion says of itself.

    Args:
        folder: The adapter.
        indices: ``trainable_token_indices`` of its configuration.

    Raises:
        WeightsError: The adapter trains other tokens than one mask, or does not say how long its blocks are.
    """
    tokens = indices.get("embed_tokens") if isinstance(indices, dict) and len(indices) == 1 else None
    if not isinstance(tokens, list) or len(tokens) != 1 or not isinstance(tokens[0], int):
        raise WeightsError(
            f"{folder.join(CONFIG_FILE)}: uses trainable_token_indices for other tokens than one mask, which covray "
            "does not compute; give a plain LoRA adapter"
        )
    return Diffusion(tokens[0], BlockDiffusionRecord.read(folder).block)


def read_run_adapter(run: str) -> tuple[Lora, dict[str, Tensor]]:
    """Return the adapter of the finished ``run``, as ``read_adapter`` does.

    Fingerprints of evaluations and answers cover an adapter's weights, not its configuration, so the configuration must
    be the one that the run trained with.

    Raises:
        ConfigError: The folder is not a finished run.
        WeightsError: The adapter cannot be read, or has another rank, alpha or set of targets than the run.
    """
    about = read_run(run)
    lora, tensors = read_adapter(storage.join(run, ADAPTER))
    trained = about.config.get("lora")
    try:
        changed = [] if trained is None else differences(_sizes(LoraConfig.model_validate(trained)), _sizes(lora))
    except ValidationError as error:
        raise ConfigError(f"{run}/_run.json: does not describe a run; give the --out of a covray train") from error
    if changed:
        raise WeightsError(
            f"{run}/{ADAPTER}/{CONFIG_FILE}: is not what the run trained: {'; '.join(changed)}; restore the file"
        )
    trained_block = about.section("block_diffusion").get("block")
    if lora.diffusion is not None and lora.diffusion.block != trained_block:
        raise WeightsError(
            f"{run}/{ADAPTER}/{BlockDiffusionRecord.FILE}: is not what the run trained: block is "
            f"{lora.diffusion.block}, was {trained_block}; restore the file"
        )
    if lora.draft is not None:
        _require_trained_draft(run, lora.draft, about.section("draft"))
    if lora.verifier is not None:
        _require_same_backbone(run, lora.verifier, about.fingerprints.get("backbone"))
    return lora, tensors


def _require_same_backbone(run: str, verifier: Verifier, backbone: str | None) -> None:
    """Check that the verifier of ``run`` judges answers on the run's own ``backbone``. Raises WeightsError."""
    if verifier.facts.backbone != backbone:
        raise WeightsError(
            f"{run}/{ADAPTER}/{VerifierRecord.FILE}: judges answers of backbone {verifier.facts.backbone[:12]}, the "
            f"run adapts {str(backbone)[:12]}; train a verifier for this run"
        )


def _require_trained_draft(run: str, draft: Draft, expected: JsonObject) -> None:
    """Check that the draft adapter of ``run`` is the one that it was configured to train. Raises WeightsError."""
    for key in ("rank", "alpha", "tokens"):
        if getattr(draft, key) != expected.get(key):
            raise WeightsError(
                f"{run}/{ADAPTER}/{DraftRecord.FILE}: is not what the run trained: {key} is {getattr(draft, key)}, was "
                f"{expected.get(key)}; restore the file"
            )


def read_start(config: LoraConfig, llama: LlamaConfig) -> dict[str, Tensor]:
    """Return the matrices of the adapter ``config.path`` to continue from, by their names in the file.

    A draft adapter beside it is left out: it drafts for the adapter as it is.

    Raises:
        ConfigError: Its rank, alpha or targets are not those of ``config``.
        WeightsError: It cannot be read, or is of another backbone than ``llama``.
    """
    assert config.path is not None
    stored, tensors = read_adapter(config.path)
    changed = differences(_sizes(stored), _sizes(config))
    if changed:
        raise ConfigError(f"lora.path: {config.path}: {'; '.join(changed)}; set them as the adapter has them")
    _require_backbone(tensors, stored, llama, config.path)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(DRAFT_PREFIX)}


def _sizes(lora: Lora | LoraConfig) -> JsonObject:
    # Sorted, as targets in another order are the same adapter.
    return {"lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": [*sorted(lora.targets)]}}


def export_merged(facts: BackboneFacts, adapter: str, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write backbone plus adapter as one plain Hugging Face folder: W + (alpha / rank) B A, computed in float32.

    Weights are streamed: memory is one file of at most 5 GB.

    Args:
        facts: The backbone.
        adapter: A PEFT folder.
        out: A new or empty folder; it is complete in the end, or absent.
        dtype: Type of the written weights; by default that of the backbone's.

    Raises:
        WeightsError: Backbone and adapter do not belong together.
        ConfigError: The backbone has no weights, or ``out`` cannot be used.
    """
    if facts.folder is None:
        raise ConfigError("backbone.init: random weights are stored nowhere; give the backbone that was adapted")
    lora, tensors = read_adapter(adapter)
    _require_backbone(tensors, lora, facts.llama, adapter)
    stored = stored_tensors(facts.folder, facts.llama)

    def merged(name: str) -> Tensor:
        weight = stored(name)
        if name == "model.embed_tokens.weight" and lora.diffusion is not None:
            weight = weight.clone()
            weight[lora.diffusion.mask_id] = tensors[MASK_ROW][0].to(weight.dtype)
        projection = _PREFIX + name.removesuffix(".weight")
        if f"{projection}.lora_A.weight" not in tensors:
            return weight
        lora_a, lora_b = tensors[f"{projection}.lora_A.weight"].float(), tensors[f"{projection}.lora_B.weight"].float()
        # In float32, whatever the weights are stored in; addmm adds (alpha / rank) B A.
        return weight.float().addmm_(lora_b, lora_a, alpha=lora.alpha / lora.rank)

    with new_folder(out) as folder:
        write_backbone(folder, facts, merged, dtype or stored("model.embed_tokens.weight").dtype)


def export_run(run: str, out: str, merge: bool) -> None:
    """Write what the finished ``run`` learned to the folder ``out``: its adapter, or with ``merge`` the whole model.

    Raises:
        ConfigError: The folder is not a finished run, or ``out`` cannot be used.
        WeightsError: The backbone is missing, or has changed since the training.
    """
    # An export is complete by a rename, which object stores do not have.
    if "://" in out:
        raise ConfigError(f"--out {out}: is not on this machine; export to a folder here, and copy it from there")
    target = local_path(out)
    require_new(target)  # before a large backbone is read
    about = read_run(run)
    adapter = Folder(run) / ADAPTER
    read_run_adapter(run)  # complete, or refused
    if not merge:
        with new_folder(target) as folder:
            copy = Folder(str(folder))
            for name in adapter.list_files():
                copy.write_bytes(name, adapter.read_bytes(name))
        return
    try:
        with stage("reading the backbone"):
            facts = backbone_facts(BackboneConfig.model_validate(about.config["backbone"]))
        trained_on = str(about.fingerprints["backbone"])
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"{run}/_run.json: does not describe a run; give the --out of a covray train") from error
    if facts.fingerprint != trained_on:
        raise WeightsError(
            f"{facts.folder}: is backbone {facts.fingerprint[:12]}, the run adapted {trained_on[:12]}; "
            "put back the folder or revision it was trained on"
        )
    # The run records the codebook of its chains, even where the backbone's folder does not record one.
    codebook = facts.codebook or about.fingerprints.get("codebook")
    with stage(f"merging the adapter into the backbone, to {out}"):
        export_merged(replace(facts, codebook=codebook), adapter.path, target)


def read_run(run: str) -> FinishedRun:
    """Return what is read of the finished ``run``. Raises ConfigError for a folder that is not a finished run."""
    folder = Folder(run)
    about = FinishedRun.read_if_present(folder)
    if about is None:
        raise ConfigError(f"{run}: has no _run.json, so is not a run; give the --out of a covray train")
    if not folder.exists("_result.json"):
        raise ConfigError(f"{run}: is unfinished; run the same covray train again")
    return about


def _require_backbone(tensors: Mapping[str, Tensor], lora: Lora, llama: LlamaConfig, where: str) -> None:
    """Check that ``tensors`` fit the backbone ``llama`` with the adapter ``lora``. Raises WeightsError."""
    with torch.device("meta"):
        views = _views(Lvm(llama, lora))  # of a model without memory: only their shapes are asked for
    _require_shapes(tensors, _shapes_of(views), where)
    _require_mask(lora, llama, where)


def _require_mask(lora: Lora | None, llama: LlamaConfig, where: str) -> None:
    """Check that the vocabulary of ``llama`` has the mask of ``lora``. Raises WeightsError."""
    # The adapter holds the mask's row of the embedding, so that no shape tells where in the table it belongs.
    mask_id = None if lora is None else lora.mask_id
    if mask_id is not None and not 0 <= mask_id < llama.vocab_size:
        raise WeightsError(
            f"{where}: its mask has id {mask_id}, the backbone has {llama.vocab_size} ids; give the adapter of this "
            "backbone"
        )


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _require_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name in sorted(expected.keys() | tensors.keys()):
        stored = tuple(tensors[name].shape) if name in tensors else "missing"
        adapted = expected.get(name, "not adapted")
        if stored != adapted:
            raise WeightsError(
                f"{where}: {name.removeprefix(_PREFIX)} is {stored}, the model has {adapted}; give the adapter of this "
                "backbone, with the same rank and targets"
            )
