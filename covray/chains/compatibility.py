"""Checks that a dataset of chains fits a tokenizer and a backbone: the same codebook, the same tokens an image."""

from __future__ import annotations

from covray.chains.dataset import ChainDataset
from covray.errors import ConfigError, DatasetError
from covray.models.lvm.backbone import BackboneFacts
from covray.models.tokenizer.vqgan import Tokenizer, require_same_codebook


def require_same_codes(facts: BackboneFacts, dataset: ChainDataset) -> None:
    """Refuse chains that a backbone cannot read: of another codebook, or with ids that it has no codes for.

    If the backbone's folder does not record a codebook, no codebook check is made. Raises DatasetError.
    """
    # Datasets of early versions do not record their codes.
    codes = dataset.record.codes
    if codes is not None and codes > facts.codes:
        raise DatasetError(
            f"{dataset.path}: its tokenizer has {codes} codes, the backbone knows {facts.codes}; build the chains with "
            "the backbone's tokenizer"
        )
    if facts.codebook is not None:
        require_same_codebook(facts.codebook, dataset.fingerprints["codebook"], dataset.path)
    # None where the backbone's folder does not record it.
    if facts.tokens_per_image not in (None, dataset.tokens_per_image):
        raise DatasetError(
            f"{dataset.path}: its pictures have {dataset.tokens_per_image} tokens, the backbone's "
            f"{facts.tokens_per_image}; build the chains at the backbone's tokenizer.size_px"
        )


def require_same_tokens(dataset: ChainDataset, tokenizer: Tokenizer, what: str) -> None:
    """Refuse a tokenizer that did not write the tokens of a dataset.

    Args:
        dataset: The dataset.
        tokenizer: The tokenizer.
        what: The tokenizer, as the user knows it: the start of a message.

    Raises:
        DatasetError: It has another codebook.
        ConfigError: Its pictures are of another size.
    """
    require_same_codebook(dataset.fingerprints["codebook"], tokenizer.codebook_fingerprint, what)
    if tokenizer.tokens_per_image != dataset.tokens_per_image:
        raise ConfigError(
            f"tokenizer.size_px: {tokenizer.size_px} gives {tokenizer.tokens_per_image} tokens a picture, "
            f"{dataset.path} has {dataset.tokens_per_image}; give the size it was built with"
        )
