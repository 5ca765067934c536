"""The recipe of the nano family, end to end, and what its model card says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel

from covray.config import EngineConfig, PriorConfig, TokenizerConfig
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.io.device import choose_device
from covray.io.model_folders import NANO_FOLDER, require_files
from covray.io.pixels import psnr
from covray.io.records import Record
from covray.models.diffusion.engine import ChainEngine
from covray.models.diffusion.prior import load_prior
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.recipes.nano.autoencoders import reconstruct_vae, reconstruct_vqgan, train_vae, train_vqgan
from covray.recipes.nano.clip import train_clip
from covray.recipes.nano.data import CROPS, KINDS, Pictures, pictures, scene_pictures
from covray.recipes.nano.judge import train_judge
from covray.recipes.nano.loop import new_part
from covray.recipes.nano.lvm import measure_lvm, train_lvm
from covray.recipes.nano.painter import train_painter
from covray.recipes.nano.prior import train_prior
from covray.recipes.nano.probe import ProbeResult, require_probe, run_probe
from covray.recipes.nano.text import train_text
from covray.recipes.nano.vlm import train_vlm

WEIGHTS = NANO_FOLDER
STEPS = {"vae": 2300, "vqgan": 3000, "prior": 3000}
"""Optimizer steps of a training; the LVM is trained in stages (``covray.recipes.nano.lvm.STAGES``)."""
_OF_PORTRAITS = {
    "vlm": train_vlm,
    "text": train_text,
    "painter": train_painter,
    "clip": train_clip,
    "judge": train_judge,
}
HELD_OUT_SCENES = 250
"""Scenes of the split ``val`` that are rendered for a training, and of ``test`` for ``measure``."""
VALIDATION_PICTURES = 512
"""Pictures of the split ``val``, of 64 scenes, that are measured at every save."""
PROBE_TEST_SCENES = 200
MIN_PORTRAITS = 10
"""With fewer, one of the splits may have none: a tenth of the portraits is for validation, and a tenth for the test."""
MAX_SEED = 2**32
"""scikit-learn's k-means takes no larger seeds."""


class TrainingBegun(Record):
    """The JSON file, beside a model's state, of what its training was begun with, other than steps."""

    FILE = "MODEL.begun.json"
    FIX = "give another --out, or delete it to begin again"
    ERROR = ConfigError

    scenes: int
    """Scenes, or portraits."""
    seed: int


def train_model(model: str, out: Path, steps: int | None, scenes: int, threads: int, device: str, seed: int) -> None:
    """Train a model of the family; the same call resumes a training that was stopped.

    Args:
        model: ``vae``, ``vqgan``, ``prior`` or ``lvm`` of scenes; ``vlm``, ``text``, ``painter``, ``clip`` or ``judge``
            of portraits.
        out: Folder of the family.
        steps: Optimizer steps; None: the recipe's.
        scenes: Scenes to render, or portraits.
        threads: CPU threads.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Seed of pictures, weights and batches.

    Raises:
        ConfigError: The model, the device, the folder, the number of portraits or the seed cannot be used.
    """
    trainers = {"vae": train_vae, "vqgan": train_vqgan, "prior": train_prior}
    known = (*trainers, "lvm", *_OF_PORTRAITS)
    if model not in known:
        raise ConfigError(f"{model}: no such nano model; give one of {', '.join(known)}")
    # Some models read what another has written: it must be trained first.
    before = {"prior": "vae", "lvm": "vqgan", "painter": "text", "clip": "text"}.get(model)
    if before and not (out / before).is_dir():
        raise ConfigError(
            f"{out}/{before}: not there; the {model} is made on it: covray nano train {before} --out {out}"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: give auto, cpu or cuda")
    chosen = choose_device(device, "--device")
    # The language model reads words only.
    if model in _OF_PORTRAITS and model != "text" and scenes < MIN_PORTRAITS:
        raise ConfigError(f"--scenes {scenes}: the {model} is trained on {MIN_PORTRAITS} portraits or more; give them")
    if seed >= MAX_SEED:
        raise ConfigError(f"--seed {seed}: is too large; give one below {MAX_SEED}")
    _require_folder(out)
    _require_same(out, model, TrainingBegun(scenes=scenes, seed=seed))
    torch.set_num_threads(threads)
    if model in _OF_PORTRAITS:
        _OF_PORTRAITS[model](out, steps, scenes, seed, chosen)
        return
    new_part(out, model)  # refused before anything is rendered
    training = torch.from_numpy(pictures(out / "data", "train", scenes, CROPS, seed))
    # Into memory: they are read at every save.
    validation = torch.from_numpy(pictures(out / "data", "val", HELD_OUT_SCENES, 0, seed)[:VALIDATION_PICTURES].copy())
    if model == "lvm":
        train_lvm(training, validation, out, steps, seed, chosen)
    else:
        trainers[model](training, validation, out, steps or STEPS[model], seed, chosen)


@dataclass(frozen=True)
class FamilyFigures:
    """The figures of the model card; PSNR is a mean by kind of picture, and over ``all``."""

    pictures: int
    vae_psnr_db: dict[str, float]
    vqgan_psnr_db: dict[str, float]
    codebook_in_use: float
    """Share of the codes that occur."""
    inversion_psnr_db: dict[str, float]
    """After inversion and denoising."""
    answer_perplexity: dict[str, dict[str, float]]
    """Of the LVM and of guesses without one (``covray.recipes.nano.lvm.baselines``), by task."""


def measure(folder: Path | None = None, scenes: int = HELD_OUT_SCENES, round_trips: int = 8) -> FamilyFigures:
    """Measure the family on scenes of the split ``test``, which no training saw.

    Args:
        folder: Of the family; None: the shipped one.
        scenes: Scenes to measure on.
        round_trips: Of these, those that are inverted and denoised.

    Raises:
        WeightsError: A model is missing or damaged.
    """
    root = folder or WEIGHTS
    require_files(root, ["prior/vae/config.json", "vqgan/config.json", "lvm/config.json"])
    # First: these loaders refuse a damaged folder in one line, before anything is rendered.
    engine = EngineConfig(threads=torch.get_num_threads())
    prior = load_prior(PriorConfig(path=str(root / "prior")), engine)
    load_tokenizer(TokenizerConfig(path=str(root / "vqgan")), engine)

    # Every picture goes through both autoencoders: what they lose bounds every chain and every answer.
    held_out = np.concatenate(list(scene_pictures("test", range(scenes), 0)))
    tensor = torch.from_numpy(held_out)
    vae = AutoencoderKL.from_pretrained(root / "prior" / "vae", use_safetensors=True).float()
    vqgan = VQModel.from_pretrained(root / "vqgan", use_safetensors=True).float()
    through_vae = reconstruct_vae(vae, tensor).numpy()
    through_tokens, used = reconstruct_vqgan(vqgan, tensor)

    # Some pictures are inverted and denoised; for all of them this would take long.
    some = held_out[: round_trips * len(KINDS)]
    returned = ChainEngine(prior, engine, 32).interpolate(some, [], endpoints=range(len(some))).returned
    round_trip_db = []
    for index, picture in enumerate(some):
        round_trip_db.append(psnr(picture, returned[index], most_db=99.0))

    # Guesses without a model are fitted on other scenes than those that they answer.
    training = np.concatenate(list(scene_pictures("train", range(scenes), 0)))
    answer_perplexity = {}
    for guess, by_task in measure_lvm(root, held_out, training).items():
        answer_perplexity[guess] = {task: round(value, 1) for task, value in by_task.items()}
    return FamilyFigures(
        pictures=len(held_out),
        vae_psnr_db=_by_kind(through_vae),
        vqgan_psnr_db=_by_kind(through_tokens.numpy()),
        codebook_in_use=round(float(np.mean(used > 0)), 4),
        inversion_psnr_db=_by_kind(np.array(round_trip_db, np.float64)),
        answer_perplexity=answer_perplexity,
    )


def _by_kind(values: np.ndarray) -> dict[str, float]:
    table = values.reshape(-1, len(KINDS)).mean(0)
    return {"all": round(float(values.mean()), 2)} | {
        kind: round(float(value), 2) for kind, value in zip(KINDS, table, strict=True)
    }


def probe(query: str, out: Path, judge: str, scenes: int, steps: int, threads: int, seed: int) -> ProbeResult:
    """Score the tokenizer ``query`` by what a small network reads from its tokens; see ``covray.recipes.nano.probe``.

    The result is also written to ``out``/probe-<query>.json.

    Args:
        query: ``pixels``, or a tokenizer as ``tokenizer.path`` takes it.
        out: Folder of the family; scenes are rendered once and kept in ``out``/data.
        judge: The tokenizer in which labels are predicted.
        scenes: Scenes of the split ``train`` to learn from; 200 of ``test`` are scored.
        steps: Optimizer steps of 64 pairs.
        threads: CPU threads.
        seed: Seed of scenes, weights and batches.

    Raises:
        ConfigError: ``out`` cannot be written, or a tokenizer is of other sizes than the probe's.
        WeightsError: A tokenizer cannot be loaded.
    """
    engine = EngineConfig(threads=threads)
    candidate = None if query == "pixels" else load_tokenizer(TokenizerConfig(path=query), engine)
    judging = load_tokenizer(TokenizerConfig(path=judge), engine)
    require_probe(judging, candidate)
    _require_folder(out)
    torch.set_num_threads(threads)
    train = Pictures.of(pictures(out / "data", "train", scenes, 0, seed), 0).scenes
    test = Pictures.of(pictures(out / "data", "test", PROBE_TEST_SCENES, 0, seed), 0).scenes
    result = run_probe(train, test, judging, candidate, steps, seed)
    storage.write_json(str(out / f"probe-{Path(query).name}.json"), asdict(result))
    return result


def _require_same(out: Path, model: str, begun: TrainingBegun) -> None:
    """Write what the training of a model is begun with. Raises ConfigError where it was begun with something else."""
    name = f"{model}.begun.json"
    # Without a state there is nothing to continue: what was said before no longer counts.
    recorded = TrainingBegun.read_if_present(str(out), name) if any(out.glob(f"{model}*.state.pt")) else None
    if recorded is not None and recorded != begun:
        raise ConfigError(
            f"{out}/{model}: was begun with --scenes {recorded.scenes} --seed {recorded.seed}; give the same, or "
            "another --out"
        )
    begun.write(str(out), name)


def _require_folder(out: Path) -> None:
    """Make the folder ``out``. Raises ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error
