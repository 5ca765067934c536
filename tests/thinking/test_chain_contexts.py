"""The ablation ``prior.context``: chains whose prior reads a caption, or what an aligner makes of the image."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from covray.chains import build as building
from covray.chains.build import BlockBuilder
from covray.chains.prepare import prepare_block
from covray.config import BuildConfig, EngineConfig, PriorConfig, load_config
from covray.config.build import solver_text, with_solver
from covray.distributed.build import plan_build
from covray.errors import ConfigError, CovrayError
from covray.io.images import Picture, encode_png
from covray.models.aligner.aligner import load_aligner
from covray.models.diffusion.empty_prompt import load_context
from covray.models.diffusion.engine import ChainEngine, Request
from covray.models.diffusion.prior import Contexts, load_prior
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.words import Words
from covray.thinking.chain_contexts import AlignedReader, ClipReader, T5Reader, load_context_reader
from tests.models.diffusion.test_prior import write_text_encoder
from tests.support.priors import write_prior
from tests.support.thinking import write_painter, write_parts
from tests.support.vlms import picture

CPU = EngineConfig(device="cpu")
CAPTIONS = ("a red ball on the left", "a blue box", "a red ball on the left")
Make = Callable[..., BuildConfig]


@pytest.fixture(scope="module", autouse=True)
def _unverified() -> Iterator[None]:
    """Random weights answer noise like no prediction type."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(building, "load_prior", functools.partial(load_prior, verify=False))
        yield


def write_attentive_prior(folder: Path) -> Path:
    """A painter whose random UNet minds what it reads."""
    file = write_painter(folder) / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "attn2.to_" in name and name.endswith("weight"):
            tensors[name] *= 8
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, think_folders: dict[str, str]) -> dict[str, str]:
    """A prior as wide as the T5, aligners of both variants, and a manifest with captions and one without."""
    root = tmp_path_factory.mktemp("contexts")
    made = {"prior": str(write_attentive_prior(root / "prior")), "text": think_folders["text"]}
    for variant, model in (("lvlm", "vlm"), ("clip", "clip")):
        (root / variant).mkdir()
        aligner = write_parts(root / variant, think_folders, variant) / "aligner"
        record = json.loads((aligner / "aligner.json").read_text())
        record["features"]["vlm"] = {"path": think_folders[model]}
        (aligner / "aligner.json").write_text(json.dumps(record))
        made[variant] = str(aligner)
    for name, captions in (("manifest", True), ("plain", False)):
        made[name] = str(root / f"{name}.parquet")
        with ManifestWriter(made[name], captions=captions) as writer:
            for number, caption in enumerate(CAPTIONS):
                ends = (Picture(bytes=encode_png(picture(number + end, 64, 64))) for end in (0, 7))
                writer.add(Pair("depth", "train", *ends, {}, Words(caption) if captions else None))
    return made


@pytest.fixture
def make(folders: dict[str, str], vqgan_folder: Path) -> Make:
    """Gives configurations of a build, with dotted keys on top."""

    def config(**changes: Any) -> BuildConfig:
        options = {
            "pairs": folders["manifest"], "out": "/tmp/absent-chains", "prior.path": folders["prior"],
            "prior.steps": 4, "tokenizer.path": str(vqgan_folder), "engine.device": "cpu", "engine.batch": 3,
            "engine.image_batch": 2, "check_endpoints": 1.0, "methods": ("diffusion",),
        }  # fmt: skip
        return load_config(BuildConfig, None, options | {key.replace("__", "."): own for key, own in changes.items()})

    return config


def rows_of(config: BuildConfig, captions: tuple[str | None, ...] = CAPTIONS) -> tuple[list[dict[str, Any]], int]:
    """Build the pairs of the manifest, with these captions; return the rows and the UNet evaluations."""
    import pyarrow.parquet as pq

    table = pq.read_table(config.pairs)
    table = table.set_column(table.schema.get_field_index("caption"), "caption", pa.array(captions, pa.string()))
    builder = BlockBuilder(config, load_context_reader(config))
    rows, stats = builder.build(prepare_block(table, builder.config, builder.models(), None))
    return rows.to_pylist(), stats.evaluations


def caption_of(folders: dict[str, str]) -> dict[str, str]:
    return {"prior__context": "caption", "prior__text_encoder": folders["text"]}


def test_the_empty_prompt_stays_what_it_was(make: Make) -> None:
    """An identity without the key is one of the empty prompt, and so is every dataset of an earlier version."""
    config = make()
    assert not {"context", "text_encoder", "aligner", "instruction"} & config.identity()["prior"].keys()
    assert with_solver(config.identity())["prior"]["context"] == "empty"
    assert make(prior__context="empty").identity() == config.identity()
    assert load_context_reader(config) is None
    assert solver_text(config.prior.model_dump()) == "4 DDIM steps"


def test_the_empty_prompt_as_a_context_gives_the_frames_of_the_empty_prompt(folders: dict[str, str]) -> None:
    prior = load_prior(PriorConfig(path=folders["prior"], steps=4), CPU, verify=False)
    images = np.stack([picture(number, 64, 64) for number in range(2)])
    requests = [Request(0, 1, (0.5,))]
    expected = ChainEngine(prior, CPU, 3).interpolate(images, requests)
    prior.read_contexts()
    states = load_context(Path(folders["prior"]))[0]
    padded = Contexts.of([states] * 2, len(states) + 4)
    given = ChainEngine(prior, CPU, 3).interpolate(images, requests, contexts=padded)
    np.testing.assert_allclose(given.noise, expected.noise, atol=1e-4)
    assert np.abs(given.frames[0].astype(int) - expected.frames[0]).max() <= 1


def test_captions_change_frames_and_a_pair_does_not_depend_on_its_batch(make: Make, folders: dict[str, str]) -> None:
    config = make(**caption_of(folders))
    together, evaluations = rows_of(config)
    empty, _ = rows_of(make())
    other, _ = rows_of(config, ("a blue box", *CAPTIONS[1:]))
    frames = [[frame["tokens"] for frame in row["frames"]] for row in together]
    assert frames[0] != [frame["tokens"] for frame in empty[0]["frames"]]
    assert frames[0] != [frame["tokens"] for frame in other[0]["frames"]]
    assert together[1:] == other[1:], "a row reads its own caption only"
    assert together[0]["source"] == empty[0]["source"], "the ends are the pictures"
    builder = BlockBuilder(config, load_context_reader(config))
    import pyarrow.parquet as pq

    table = pq.read_table(config.pairs)
    for order in ([2], [1, 0]):
        rows, _ = builder.build(prepare_block(table.take(order), builder.config, builder.models(), None))
        assert rows.to_pylist() == [together[number] for number in order]
    # Six pictures are inverted and returned, two frames of each pair are made.
    assert evaluations == (6 + 6 + 3 * 2) * 4


def test_a_picture_is_inverted_once_for_each_caption(make: Make, folders: dict[str, str]) -> None:
    import pyarrow.parquet as pq

    config = make(**caption_of(folders), check_endpoints=0.0)
    builder = BlockBuilder(config, load_context_reader(config))
    first = pq.read_table(config.pairs).slice(0, 1).to_pylist()[0]
    pairs = [first, first | {"pair_id": 1}, first | {"pair_id": 2, "caption": "a blue box"}]
    table = pa.Table.from_pylist(pairs, pq.read_schema(config.pairs))
    rows, stats = builder.build(prepare_block(table, builder.config, builder.models(), None))
    tokens = [row["frames"] for row in rows.to_pylist()]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert stats.evaluations == (2 * 2 + 2 * 2) * 4


def test_a_picture_returns_by_the_context_that_it_was_inverted_with(make: Make, folders: dict[str, str]) -> None:
    """The round trip is measured, and another context on the way back is worse."""
    rows, _ = rows_of(make(**caption_of(folders)))
    assert all(row["quality"]["source_psnr"] is not None for row in rows)
    prior = load_prior(PriorConfig(path=folders["prior"], steps=20), CPU, verify=False)
    prior.read_contexts()
    reader = T5Reader(folders["text"], CPU)
    image = picture(0, 64, 64)[None]
    contexts = [Contexts.of([reader.read(caption)], reader.tokens) for caption in CAPTIONS[:2]]
    engine = ChainEngine(prior, CPU, 2)
    clean = prior.encode(torch.from_numpy(image)).numpy()[0]
    noise = engine.diffuse({0: clean}, {}, [], contexts[0]).noise[0]
    errors = []
    for own in contexts:
        back = engine.diffuse({}, {0: noise}, [(0, 0, 0.0)], own).latents[0, 0, 0.0]
        errors.append(float(np.sqrt(np.square(back - clean).mean())))
    assert errors[0] < errors[1] / 2
    assert errors[0] < 0.2 * float(clean.std()), "14% with these weights"


@pytest.mark.parametrize("variant", ["lvlm", "clip"])
def test_aligned_contexts_are_the_aligners_output_for_the_image(
    variant: str, make: Make, folders: dict[str, str]
) -> None:
    config = make(prior__context="aligned", prior__aligner=folders[variant], prior__instruction="what is it")
    reader = load_context_reader(config)
    assert isinstance(reader, AlignedReader)
    first, second = (reader.read(picture(number, 64, 64)) for number in (0, 1))
    assert first.shape[1] == load_aligner(Path(folders[variant]), torch.device("cpu")).record.width
    assert 1 <= len(first) <= reader.tokens
    assert first.shape != second.shape or not torch.equal(first, second)
    torch.testing.assert_close(reader.read(picture(0, 64, 64)), first, rtol=0, atol=0)
    together, _ = rows_of(config)
    assert [row["error"] for row in together] == [None] * 3
    builder = BlockBuilder(config, reader)
    assert builder.models().fingerprints.keys() == {"prior", "tokenizer", "codebook", "aligner", "vlm"}
    assert together[0]["frames"] != rows_of(make())[0][0]["frames"]


def test_a_prior_reads_captions_by_its_own_clip(tmp_path: Path) -> None:
    folder = write_prior(tmp_path / "prior")
    write_text_encoder(folder, "!")
    reader = ClipReader(folder)
    torch.testing.assert_close(reader.read(""), load_context(folder)[0])
    assert reader.read("!").shape == (reader.tokens, 24)
    assert not torch.equal(reader.read("!"), reader.read(""))


def test_a_row_without_a_caption_is_rejected(make: Make, folders: dict[str, str]) -> None:
    rows, _ = rows_of(make(**caption_of(folders)), (None, "", "a blue box"))
    assert [(row["error"] or "").partition(":")[0] for row in rows] == ["no_caption", "no_caption", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior__text_encoder": "text", "pairs": "plain"}, "has no captions, which prior.context: caption reads"),
        ({}, "has no text encoder to read captions; give prior.text_encoder the T5"),
        (
            {"prior__text_encoder": "text", "prior__path": "narrow"},
            "the text encoder is 16 wide, the UNet of .* reads 24",
        ),
        ({"prior__text_encoder": "/absent"}, "no such folder"),
        (
            {"prior__context": "aligned", "prior__aligner": "/absent"},
            "neither a finished run of covray think train nor",
        ),
        ({"prior__context": "aligned", "prior__aligner": "lvlm", "prior__path": "narrow"}, "reads features 24 wide"),
    ],
)
def test_contexts_that_cannot_be_read_are_refused_in_one_line(
    changes: dict[str, str], message: str, make: Make, folders: dict[str, str], tmp_path: Path
) -> None:
    known = folders | {"narrow": str(tmp_path / "narrow")}
    write_prior(tmp_path / "narrow")
    options = {"prior__context": "caption"} | {key: known.get(value, value) for key, value in changes.items()}
    with pytest.raises(CovrayError, match=message) as error:
        plan_build(make(**options, out=str(tmp_path / "chains")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior__text_encoder": "text"}, "text_encoder: reads captions; set context: caption too"),
        ({"prior__context": "aligned"}, "aligner: goes with context: aligned; give both or neither"),
        ({"prior__aligner": "run"}, "aligner: goes with context: aligned; give both or neither"),
        ({"prior__context": "caption", "keep_noise": True}, "noise belongs to the context that a picture was inverted"),
        ({"prior__context": "caption", "noise_from": "a"}, "noise belongs to the context that a picture was inverted"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_the_plan_says_what_the_prior_reads(make: Make, folders: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "chains")
    assert plan_build(make(out=out)).solver == "4 DDIM steps"
    planned = plan_build(make(**caption_of(folders), out=out))
    assert planned.solver == "4 DDIM steps, reading captions (not task-free)"
    assert not Path(out).exists()


def test_examples_have_no_context_to_read(make: Make, folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"prior.context: caption is for covray build; pictures given as examples"):
        BlockBuilder(make(**caption_of(folders)))
    BlockBuilder(make(**caption_of(folders), methods=("linear",)))
