"""Checks of the models: whether prior, tokenizer and backbone are there, complete, and of one codebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError

from covray.config import BackboneConfig, EngineConfig, PriorConfig, TokenizerConfig
from covray.doctor.findings import EXPECTED_ERRORS, Finding, error_finding
from covray.io.model_folders import NANO_FOLDER, NANO_NAMES, is_here

_SHOWN_DIGITS = 12
"""Of a fingerprint."""


def check_weights(prior: str, tokenizer: str, backbone: str) -> list[Finding]:
    """Check that the models are complete, and report the first digits of their fingerprints.

    Args:
        prior: ``nano``, a folder, or a hub id.
        tokenizer: As ``prior``.
        backbone: As ``prior``.
    """
    # Imported here: model libraries take seconds, and what is broken about them must not hide the other checks.
    from covray.io.model_folders import resolve_folder
    from covray.models.diffusion import empty_prompt
    from covray.models.diffusion import prior as priors
    from covray.models.lvm.backbone import backbone_facts
    from covray.models.tokenizer.vqgan import load_tokenizer

    codebooks: dict[str, str | None] = {}

    def fingerprint_prior() -> str:
        config = PriorConfig(path=prior)
        patterns = (*priors.NETWORK_PATTERNS, empty_prompt.CONTEXT_FILE, *priors.TEXT_PATTERNS)
        folder = resolve_folder(config.path, config.revision, "prior", patterns)
        priors.require_prior_files(folder)  # load_prior's own check, without gigabytes of tensors
        return priors.fingerprint_prior(folder)

    def fingerprint_tokenizer() -> str:
        loaded = load_tokenizer(TokenizerConfig(path=tokenizer), EngineConfig(device="cpu"))
        codebooks["tokenizer"] = loaded.codebook_fingerprint
        return loaded.fingerprint

    def fingerprint_backbone() -> str:
        options = {"path": backbone} if backbone in NANO_NAMES else {"scale": "custom", "path": backbone}
        facts = backbone_facts(BackboneConfig.model_validate(options))
        codebooks["backbone"] = facts.codebook
        return facts.fingerprint

    with _no_downloads():
        findings = [
            _check_model("prior", prior, fingerprint_prior),
            _check_model("tokenizer", tokenizer, fingerprint_tokenizer),
            _check_model("backbone", backbone, fingerprint_backbone),
        ]
    # The backbone knows the codes of one codebook only.
    ours, theirs = codebooks.get("tokenizer"), codebooks.get("backbone")
    if ours and theirs and ours != theirs:
        message = f"the backbone's is {theirs[:_SHOWN_DIGITS]}, the tokenizer's {ours[:_SHOWN_DIGITS]}"
        advice = "name the tokenizer that the backbone was trained with, or a backbone of this tokenizer"
        findings.append(Finding("codebook", "note", message, advice))
    return findings


def _check_model(name: str, path: str, fingerprint: Callable[[], str]) -> Finding:
    """Return the finding of one model; ``fingerprint`` reads it, and raises what is wrong with it."""
    try:
        digits = fingerprint()[:_SHOWN_DIGITS]
    except EXPECTED_ERRORS as error:
        incomplete = isinstance(error.__cause__, LocalEntryNotFoundError) or " is missing" in str(error)
        if incomplete and not is_here(path):
            message = f"{path}: is not, or not completely, in the hub's cache {hub.HF_HUB_CACHE}"
            advice = f"the first command that uses it downloads it; to do so before: hf download {path}"
            return Finding(name, "note", message, advice)
        return error_finding(name, error)
    where = f"{path} in {NANO_FOLDER.parent}" if path in NANO_NAMES else path
    return Finding(name, "ok", f"{where}: {digits}")


@contextmanager
def _no_downloads() -> Iterator[None]:
    """Let the hub's client look in its cache only.

    The client reads its environment variable when it is imported, but its constant at every use.
    """
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
