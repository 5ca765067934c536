"""``covray experiments``: fixed experiments on the nano models, on which the project's claims of the method rest."""

from __future__ import annotations

from pathlib import Path

from covray.config import SweepConfig, load_config
from covray.distributed.sweep import run_sweep
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs
from covray.sweeps.records import SweepResults

SCENES = 240
SPLITS = {"train": 17.0, "val": 2.0, "test": 5.0}
CLAIMS = {
    "grid": {"methods": ["none", "linear", "diffusion"], "lengths": [4], "pairs": [1], "seeds": [0, 1, 2]},
    "build": {"prior": {"steps": 20}, "check_endpoints": 0.0},
    "train": {
        "optimizer": {
            "learning_rate": 5e-4, "epochs": 2.0, "batch_tokens": 8192, "micro_batch_tokens": 4096,
        },
        "compute": {"deepspeed": "none"},
        "validate_every_steps": 25,
        "validation_sentences": 140,
    },
    "evaluate": {"episodes": 24, "batch": 12, "baselines": ["copy", "mean", "nearest", "ceiling"]},
}  # fmt: skip
"""No frames, linear and diffusion on seven tasks with three seeds: 1,190 pairs to train on, two epochs, the checkpoint
that is best on the validation split, 24 queries a task of scenes that no training saw, greedy decoding. Every method
sees the same pairs equally often, so a chain of 4 is trained on twice the tokens of a plain pair, as in the paper."""


def run_claims(out: str, data: str | None = None) -> SweepResults:
    """Run the experiment of the claims, or continue it.

    Args:
        out: The folder of the experiment.
        data: A dataset of chains of 4 by both methods to use in place of the experiment's own scenes, which are
            otherwise rendered and built.

    Returns:
        The results of its sweep.

    Raises:
        CovrayError: As ``covray sweep``.
    """
    options = CLAIMS | {"out": storage.join(out, "claims")}
    if data is None:
        options["manifest"] = _render_scenes(out)
    else:
        del options["build"]
        options["data"] = data
    return run_sweep(load_config(SweepConfig, None, options))


def _render_scenes(out: str) -> str:
    """Write the manifest of the scenes to the local folder ``out``, unless it is there; returns its path."""
    manifest = Path(out, "pairs.parquet")
    # Rendered once: a later call of the same experiment finds them.
    if manifest.exists():
        return str(manifest)
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error
    with ManifestWriter(manifest) as writer:
        for pair in scene_pairs(SCENES, splits=SPLITS):
            writer.add(pair)
    return str(manifest)
