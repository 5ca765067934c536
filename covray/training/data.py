"""The datasets of a training, as its configuration names them."""

from __future__ import annotations

from covray.chains.dataset import ChainDataset
from covray.chains.mapped import Source
from covray.chains.token_files import token_file
from covray.config import TrainConfig


def sources_of(config: TrainConfig) -> list[Source]:
    """Return the datasets of a training with their weights.

    Raises:
        DatasetError: One is absent or unfinished.
    """
    return [Source(ChainDataset(path), weight) for path, weight in config.weighted_data]


def write_token_files(config: TrainConfig) -> None:
    """Write the token files that are not there yet, so that workers on this machine need not each do so.

    Raises:
        DatasetError: A shard cannot be used.
    """
    for source in sources_of(config):
        for version in range(1, source.dataset.version + 1):
            token_file(source.dataset, version)
