"""What can be wrong with the models of a build, found without loading them."""

from __future__ import annotations

from covray.chains.prepare import needs_prior
from covray.config import BuildConfig
from covray.io.model_folders import is_hub_id
from covray.models.diffusion.prior import find_prior, read_schedule
from covray.models.tokenizer.vqgan import find_tokenizer


def require_models(config: BuildConfig) -> None:
    """Check the folders of the models that ``config`` uses: that they are complete, and that the steps fit.

    A hub id is not downloaded, and so not checked.

    Raises:
        WeightsError: A folder is missing or incomplete.
        ConfigError: The prior cannot take this number of steps.
    """
    # The prior's schedule is read as well: it says how many steps it can take.
    if needs_prior(config) and not is_hub_id(config.prior.path):
        read_schedule(find_prior(config.prior), config.prior)
    if not is_hub_id(config.tokenizer.path):
        find_tokenizer(config.tokenizer)
