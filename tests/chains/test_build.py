"""Blocks to rows: a pair's row is its own whatever block it is in, and a bad pair is a row with its reason."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from covray.chains import build as building
from covray.chains.build import BlockBuilder, is_checked
from covray.chains.kept_noise import KeptNoise
from covray.chains.prepare import PREPARED_SCHEMA, BuildModels, needs_prior, prepare_block
from covray.chains.records import Audit, DatasetRecord
from covray.chains.shard_rows import shard_schema, union_alphas
from covray.chains.spacing import PROBE_ALPHAS, coarse_label, even_path_alphas
from covray.config import BuildConfig, load_config
from covray.errors import DatasetError
from covray.io import storage
from covray.io.images import decode, encode_png, square
from covray.methods import mix_pixels
from covray.models.diffusion.engine import Request
from covray.models.diffusion.prior import load_prior
from covray.pairs.manifest import MANIFEST_SCHEMA
from covray.tasks import TASKS
from tests.chains.contract import validate_rows
from tests.support.priors import write_prior

PRIOR_PX, SMALL_PX = 32, 16


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module", autouse=True)
def _unverified() -> Iterator[None]:
    """Random weights answer noise like no prediction type."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(building, "load_prior", functools.partial(load_prior, verify=False))
        yield


def _config(prior_folder: Path | str, vqgan_folder: Path, **options: Any) -> BuildConfig:
    base = {
        "pairs": "pairs.parquet", "out": "chains", "prior.path": str(prior_folder), "prior.steps": 4,
        "tokenizer.path": str(vqgan_folder), "engine.device": "cpu", "engine.batch": 5, "engine.image_batch": 3,
        "check_endpoints": 0.5, "lengths": (4,),
    }  # fmt: skip
    return load_config(BuildConfig, None, base | options)


@pytest.fixture(scope="module")
def builder(prior_folder: Path, vqgan_folder: Path) -> BlockBuilder:
    return BlockBuilder(_config(prior_folder, vqgan_folder, keep_noise=True))


def _picture(seed: int, width: int = 40, height: int = 40) -> np.ndarray:
    """A smooth random picture [h, w, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def _png(seed: int, width: int = 40, height: int = 40) -> dict[str, Any]:
    return {"uri": None, "bytes": encode_png(_picture(seed, width, height))}


def _row(pair_id: int, image: dict[str, Any] | None, label: dict[str, Any] | None, task: str = "depth") -> dict:
    return {"pair_id": pair_id, "task": task, "split": "train", "image": image, "label": label, "meta": "{}"}


def _manifest(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


ROWS = [
    _row(11, _png(1), _png(2)),
    _row(-12, _png(1), _png(3), "normals"),  # shares its image with the first
    _row(13, _png(2), _png(1)),  # the first one backwards
    _row(14, _png(4), _png(4), "colorization"),  # its label is its image
    _row(15, {"uri": None, "bytes": b"nothing"}, _png(5)),  # rejected
    _row(16, _png(6), _png(7), "segmentation"),
]


def _build(
    builder: BlockBuilder, rows: list[dict], noise: KeptNoise | None = None
) -> tuple[pa.Table, building.BlockStats]:
    return builder.build(prepare_block(_manifest(rows), builder.config, builder.models(), None, noise))


@pytest.fixture(scope="module")
def built(builder: BlockBuilder) -> tuple[pa.Table, building.BlockStats]:
    return _build(builder, ROWS)


# --- preparing -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> BuildModels:
    return BuildModels(PRIOR_PX, SMALL_PX, 16, 64, (4, 8, 8), {})


@pytest.fixture(scope="module")
def config(prior_folder: Path, vqgan_folder: Path) -> BuildConfig:
    return _config(prior_folder, vqgan_folder)


def test_hostile_rows_become_reasons(config: BuildConfig, models: BuildModels, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(_png(1)["bytes"])
    (tmp_path / "root" / "good.png").write_bytes(_png(1)["bytes"])
    good, cut = _png(1), {"uri": None, "bytes": _png(1)["bytes"][:-60]}
    cases = [
        (_row(1, None, good), "missing: image: "),
        (_row(2, good, None), "missing: label: "),
        (_row(3, {"uri": None, "bytes": None}, good), "missing: image: "),
        (_row(4, {"uri": "absent.png", "bytes": None}, good), "missing: image: "),
        (_row(5, {"uri": "../secret.png", "bytes": None}, good), "outside_root: image: "),
        (_row(6, {"uri": None, "bytes": b""}, good), "empty: image: "),
        (_row(7, {"uri": None, "bytes": b"text"}, good), "not_an_image: image: "),
        (_row(8, cut, good), "truncated: image: "),
        (_row(9, good, cut), "truncated: label: "),
        (_row(10, good, good, "weather"), "unknown_task: 'weather'"),
        (_row(11, good, good, "Depth"), "unknown_task: "),
        (_row(12, good, _png(2, 60, 40)), "label_shape: label is 60x40 px, image is 40x40 px"),
        (_row(13, _png(1, 40, 60), _png(2, 60, 40)), "label_shape: "),
        (_row(14, {"uri": "good.png", "bytes": None}, good), None),
        (_row(15, _png(1, 60, 40), _png(2, 30, 20)), None),  # another size of the same aspect
        (_row(16, good, None) | {"meta": '{"error": "bad_label: no such class"}'}, "bad_label: label: no such class"),
        (_row(17, good, None) | {"meta": "[no json"}, "missing: label: "),
    ]
    table = _manifest([row for row, _ in cases])
    prepared = prepare_block(table, config, models, str(tmp_path / "root"))
    assert prepared.schema == PREPARED_SCHEMA
    assert prepared["pair_id"].to_pylist() == list(range(1, 18))
    for row, (_, expected) in zip(prepared.to_pylist(), cases, strict=True):
        pictures = [row[name] for name in ("source", "label", "source_small", "label_small")]
        if expected is None:
            assert row["error"] is None
            assert [len(picture) for picture in pictures] == [PRIOR_PX**2 * 3] * 2 + [SMALL_PX**2 * 3] * 2
        else:
            assert row["error"].startswith(expected), row["error"]
            assert pictures == [None] * 4


def test_null_columns_and_no_root_are_reasons_too(config: BuildConfig, models: BuildModels) -> None:
    rows = [_row(1, {"uri": "a.png", "bytes": None}, _png(1)), _row(2, _png(1), _png(1)) | {"task": None}]
    errors = prepare_block(_manifest(rows), config, models, None)["error"].to_pylist()
    assert errors[0].startswith("outside_root: image: ")
    assert errors[1].startswith("unknown_task: ")


def test_no_rows_are_no_rows(builder: BlockBuilder) -> None:
    rows, work = _build(builder, [])
    assert (rows.num_rows, work.rows, work.rejected) == (0, 0, 0)
    assert rows.schema == shard_schema(keep_noise=True)


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_pictures_are_made_square_as_configured(
    prior_folder: Path, vqgan_folder: Path, models: BuildModels, fit: str
) -> None:
    config = _config(prior_folder, vqgan_folder, fit=fit)
    wide = _row(1, _png(1, 60, 40), _png(2, 60, 40), "segmentation")
    row = prepare_block(_manifest([wide]), config, models, None).to_pylist()[0]
    assert row["source"] == square(_picture(1, 60, 40), PRIOR_PX, config.fit).tobytes()
    assert row["source_small"] == square(_picture(1, 60, 40), SMALL_PX, config.fit).tobytes()
    # Colours of classes may not be mixed.
    assert row["label"] == square(_picture(2, 60, 40), PRIOR_PX, config.fit, "nearest").tobytes()


def test_pictures_of_one_size_travel_once(config: BuildConfig) -> None:
    same = BuildModels(PRIOR_PX, PRIOR_PX, 64, 64, (4, 8, 8), {})
    row = prepare_block(_manifest([ROWS[0]]), config, same, None).to_pylist()[0]
    assert row["source_small"] is None
    assert row["label_small"] is None


# --- building ------------------------------------------------------------------------------------------------------


def validate_both_methods(rows: pa.Table, builder: BlockBuilder) -> None:
    validate_rows(
        rows,
        tokens_per_image=16,
        codes=64,
        methods=("diffusion", "linear"),
        alphas=union_alphas(builder.config.lengths),
    )


def test_rows_keep_the_contract_and_their_order(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats]
) -> None:
    rows, work = built
    validate_both_methods(rows, builder)
    assert rows.schema == shard_schema(keep_noise=True)
    for name in ("pair_id", "task", "split"):
        assert rows[name].to_pylist() == [row[name] for row in ROWS]
    assert [error is None for error in rows["error"].to_pylist()] == [True] * 4 + [False, True]
    assert (work.rows, work.rejected) == (6, 1)


def test_a_pair_has_the_same_row_in_any_block(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats]
) -> None:
    expected = {row["pair_id"]: row for row in built[0].to_pylist()}
    for block in (
        [ROWS[0]],
        [ROWS[1]],
        ROWS[::-1],
        [ROWS[5], ROWS[4], ROWS[3]],
        ROWS[1:3],
        [*ROWS, _row(9, _png(8), _png(9))],
    ):
        for row in _build(builder, block)[0].to_pylist():
            if row["pair_id"] in expected:
                assert row == expected[row["pair_id"]]


def test_a_picture_of_several_pairs_is_inverted_once(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats]
) -> None:
    good = [row for row in ROWS if row["pair_id"] != 15]
    pictures = {row[name]["bytes"]: None for row in good for name in ("image", "label")}
    frames = 2 * len(good)
    checked = {row[name]["bytes"] for row in good if is_checked(row["pair_id"], 0.5) for name in ("image", "label")}
    # Pictures 1 and 2 are resampled in two ways (as photograph and as label of depth): up to two inversions each.
    fewest = (len(pictures) + frames + len(checked)) * 4
    assert fewest <= built[1].evaluations <= fewest + 4 * 4
    alone = sum(_build(builder, [row])[1].evaluations for row in good)
    assert built[1].evaluations < alone


def test_frames_are_those_of_the_engine_and_of_mixing(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats]
) -> None:
    prepared = prepare_block(_manifest([ROWS[0]]), builder.config, builder.models(), None).to_pylist()[0]
    pixels = {
        name: np.frombuffer(prepared[name], np.uint8).reshape(-1, size, 3)
        for name, size in (
            ("source", PRIOR_PX),
            ("label", PRIOR_PX),
            ("source_small", SMALL_PX),
            ("label_small", SMALL_PX),
        )
    }
    row = built[0].to_pylist()[0]
    ends = np.stack([pixels["source_small"], pixels["label_small"]])
    assert [row["source"], row["label"]] == builder.tokenizer.encode(ends).tolist()
    assert builder.engine is not None
    images = np.stack([pixels["source"], pixels["label"]])
    interpolation = builder.engine.interpolate(images, [Request(0, 1, builder.alphas)])
    made = {"diffusion": [square(frame, SMALL_PX) for frame in interpolation.frames[0]]}
    made["linear"] = [mix_pixels(*ends, alpha) for alpha in builder.alphas]
    for method, pictures in made.items():
        tokens = [frame["tokens"] for frame in row["frames"] if frame["method"] == method]
        assert tokens == builder.tokenizer.encode(np.stack(pictures)).tolist()
    assert row["source_noise"] == interpolation.noise[0].tobytes()
    assert row["label_noise"] == interpolation.noise[1].tobytes()


def test_quality_tells_what_was_measured(built: tuple[pa.Table, building.BlockStats]) -> None:
    for row in built[0].to_pylist():
        quality = row["quality"]
        if row["error"] is not None:
            assert quality is None
            continue
        for end in ("source", "label"):
            noise = np.frombuffer(row[f"{end}_noise"], "<f4")
            assert quality[f"{end}_noise_rms"] == pytest.approx(np.sqrt(np.mean(noise.astype(float) ** 2)), rel=1e-6)
            assert (quality[f"{end}_psnr"] is not None) == is_checked(row["pair_id"], 0.5)
        if row["pair_id"] == 14:  # no way from a picture to itself
            assert quality["linear_path"] is None
            assert quality["diffusion_path"] is None
        else:
            assert quality["linear_path"] == pytest.approx(1, abs=0.02)  # mixed pixels are rounded
            assert quality["diffusion_path"] > 1


def test_noise_that_is_not_finite_is_a_row_of_its_own(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats]
) -> None:
    prepared = prepare_block(_manifest(ROWS), builder.config, builder.models(), None).to_pylist()
    broken = np.zeros((4, 8, 8), "<f4")
    broken[2, 3, 4] = np.nan
    prepared[5]["source_noise"] = prepared[5]["label_noise"] = broken.tobytes()
    rows, work = builder.build(pa.Table.from_pylist(prepared, PREPARED_SCHEMA))
    validate_both_methods(rows, builder)
    found, expected = rows.to_pylist(), built[0].to_pylist()
    assert found[5]["error"].startswith("not_finite: ")
    assert found[:5] == expected[:5]
    assert work.rejected == 2


def test_a_block_of_rejects_costs_nothing(builder: BlockBuilder) -> None:
    rows, work = _build(builder, [ROWS[4], ROWS[4] | {"pair_id": 99}])
    assert all(rows["error"].is_valid().to_pylist())
    assert (work.rows, work.rejected, work.evaluations) == (2, 2, 0)


def test_the_resolved_configuration_is_complete(builder: BlockBuilder) -> None:
    config, models = builder.config, builder.models()
    assert (config.prior.size_px, config.tokenizer.size_px) == (PRIOR_PX, SMALL_PX)
    assert (config.engine.device, config.engine.dtype, config.engine.batch) == ("cpu", "float32", 5)
    assert (models.prior_px, models.tokenizer_px, models.tokens_per_image, models.codes) == (PRIOR_PX, SMALL_PX, 16, 64)
    assert models.latent_shape == (4, 8, 8)
    assert all(len(fingerprint) == 64 for fingerprint in models.fingerprints.values())


def test_mixing_alone_needs_no_prior(vqgan_folder: Path) -> None:
    config = _config("no-such-folder", vqgan_folder, methods=["linear"])
    builder = BlockBuilder(config)
    assert builder.engine is None
    assert builder.models().prior_px == SMALL_PX
    assert builder.models().latent_shape is None
    rows, work = _build(builder, ROWS)
    validate_rows(rows, tokens_per_image=16, codes=64, methods=("linear",), alphas=builder.alphas)
    assert work.evaluations == 0
    quality = rows["quality"].to_pylist()[0]
    assert quality["linear_path"] == pytest.approx(1, abs=0.02)
    assert quality["source_noise_rms"] is None


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"methods": ["linear"]}, False),
        ({"lengths": [2]}, False),
        ({"lengths": [2], "alphas": [0.5]}, True),
        ({"lengths": [2], "keep_noise": True}, True),
        ({"methods": ["linear"], "keep_noise": True}, True),
    ],
)
def test_the_prior_is_needed_for_frames_and_noise(options: dict[str, Any], needed: bool) -> None:
    assert needs_prior(load_config(BuildConfig, None, {"pairs": "p", "out": "o"} | options)) is needed


# --- kept noise ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A dataset with noise, in two shards."""
    out = str(tmp_path_factory.mktemp("kept"))
    config, models = builder.config, builder.models()
    DatasetRecord(
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        fingerprints=models.fingerprints,
        tokenizer_size_px=models.tokenizer_px,
        tokens_per_image=models.tokens_per_image,
    ).write(out)
    for part, rows in enumerate((built[0].slice(0, 2), built[0].slice(2))):
        folder = Path(out, "shards", "task=depth")
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, folder / f"{part}.parquet")
    Audit(asked=6, written=5, rejected=1, per_task={}).write(out)
    return out


def test_kept_noise_gives_the_same_rows_without_inversions(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats], kept: str
) -> None:
    noise = KeptNoise.of(kept, builder.config, builder.models().fingerprints["prior"])
    rows, work = _build(builder, ROWS, noise)
    assert rows.equals(built[0])
    denoisings = 2 * 5 + len(
        {
            row[name]["bytes"]
            for row in ROWS
            if row["pair_id"] != 15 and is_checked(row["pair_id"], 0.5)
            for name in ("image", "label")
        }
    )
    assert work.evaluations <= denoisings * 4 + 2 * 4
    assert work.evaluations < built[1].evaluations
    unknown = noise.read(np.array([11, 15, 999, -(2**63)]))
    assert set(unknown) == {11}  # 15 was rejected, the others are nobody's


def test_a_pair_without_kept_noise_is_inverted(builder: BlockBuilder, kept: str) -> None:
    noise = KeptNoise.of(kept, builder.config, builder.models().fingerprints["prior"])
    new = _row(99, _png(8), _png(9))
    assert _build(builder, [ROWS[0], new], noise)[0].slice(1).equals(_build(builder, [new])[0])


def test_kept_noise_of_a_picture_that_changed_is_not_used(builder: BlockBuilder, kept: str) -> None:
    noise = KeptNoise.of(kept, builder.config, builder.models().fingerprints["prior"])
    changed = ROWS[0] | {"label": _png(9)}
    rows, work = _build(builder, [changed], noise)
    fresh, all_work = _build(builder, [changed])
    assert rows.equals(fresh)
    assert work.evaluations < all_work.evaluations, "its other end's noise is"


def test_kept_noise_of_another_inversion_is_refused(
    builder: BlockBuilder, kept: str, prior_folder: Path, vqgan_folder: Path
) -> None:
    models = builder.models()
    other = BuildModels(**{**vars(models), "fingerprints": models.fingerprints | {"prior": "f" * 64}})
    with pytest.raises(DatasetError, match=r"noise_from: .* use the same prior"):
        KeptNoise.of(kept, builder.config, other.fingerprints["prior"])
    config = builder.config
    changed = {
        "prior.steps": config.model_copy(update={"prior": config.prior.model_copy(update={"steps": 5})}),
        "prior.solver": config.model_copy(update={"prior": config.prior.model_copy(update={"solver": "dpm"})}),
        "prior.evaluations": config.model_copy(update={"prior": config.prior.model_copy(update={"evaluations": 3})}),
        "engine.batch": config.model_copy(update={"engine": config.engine.model_copy(update={"batch": 6})}),
        "engine.dtype": config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": "bfloat16"})}),
        "fit": config.model_copy(update={"fit": "crop"}),
    }
    for key, other_config in changed.items():
        with pytest.raises(DatasetError, match=f"another {key}"):
            KeptNoise.of(kept, other_config, models.fingerprints["prior"])
    # What does not decide the noise may differ.
    longer = config.model_copy(update={"lengths": (8,), "keep_noise": False, "check_endpoints": 0.0, "out": "x"})
    assert len(KeptNoise.of(kept, longer, models.fingerprints["prior"]).pair_ids) == 6


def test_a_dataset_without_noise_is_refused(builder: BlockBuilder, kept: str, tmp_path: Path) -> None:
    description = storage.read_json(f"{kept}/_dataset.json")
    description["identity"]["keep_noise"] = False
    storage.write_json(f"{tmp_path}/_dataset.json", description)
    Audit(asked=0, written=0, rejected=0, per_task={}).write(str(tmp_path))
    with pytest.raises(DatasetError, match="without --keep-noise"):
        KeptNoise.of(str(tmp_path), builder.config, builder.models().fingerprints["prior"])
    with pytest.raises(DatasetError, match=r"no _dataset\.json"):
        KeptNoise.of(str(tmp_path / "absent"), builder.config, builder.models().fingerprints["prior"])


# --- figures -------------------------------------------------------------------------------------------------------


def test_the_checked_are_a_share_of_the_pairs_and_nested() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 20_000).tolist()
    for ids_of in (ids, range(20_000)):
        few, more = ({pair for pair in ids_of if is_checked(pair, share)} for share in (0.05, 0.5))
        assert len(few) / 20_000 == pytest.approx(0.05, abs=0.01)
        assert len(more) / 20_000 == pytest.approx(0.5, abs=0.02)
        assert few <= more
    assert not any(is_checked(pair, 0.0) for pair in ids)
    assert all(is_checked(pair, 1.0) for pair in ids)


def test_mixing_goes_straight_from_one_end_to_the_other() -> None:
    source, label = _picture(1), _picture(2)
    assert np.array_equal(mix_pixels(source, label, 0), source)
    assert np.array_equal(mix_pixels(source, label, 1), label)
    assert np.array_equal(mix_pixels(source, label, 0.25), mix_pixels(label, source, 0.75))
    assert mix_pixels(np.uint8([[[0, 10, 255]]]), np.uint8([[[255, 20, 255]]]), 0.5).tolist() == [[[128, 15, 255]]]


def test_jpegs_are_pictures_too(config: BuildConfig, models: BuildModels) -> None:
    buffer = io.BytesIO()
    Image.fromarray(_picture(1)).save(buffer, "JPEG")
    row = _row(1, {"uri": None, "bytes": buffer.getvalue()}, _png(2))
    assert prepare_block(_manifest([row]), config, models, None)["error"].to_pylist() == [None]


# --- spacing and controls --------------------------------------------------------------------------------------------


def frames_of(rows: pa.Table, method: str) -> dict[int, list[list[int]]]:
    """The tokens of every good pair's frames by a method."""
    frames = {}
    for row in rows.to_pylist():
        if row["error"] is None:
            frames[row["pair_id"]] = [frame["tokens"] for frame in row["frames"] if frame["method"] == method]
    return frames


def test_controls_are_the_image_and_the_label_in_cells(prior_folder: Path, vqgan_folder: Path) -> None:
    builder = BlockBuilder(_config(prior_folder, vqgan_folder, methods=("copy", "coarse")))
    assert builder.engine is None, "no prior is needed"
    rows, _ = _build(builder, ROWS)
    copies, coarse = frames_of(rows, "copy"), frames_of(rows, "coarse")
    for row, given in zip(rows.to_pylist(), ROWS, strict=True):
        if row["error"] is not None:
            continue
        assert copies[row["pair_id"]] == [row["source"]] * 2
        resample = TASKS[given["task"]].resample
        label = square(decode(given["label"]["bytes"]), SMALL_PX, "stretch", resample)
        cells = np.stack([coarse_label(label, alpha, resample) for alpha in union_alphas((4,))])
        assert coarse[row["pair_id"]] == builder.tokenizer.encode(cells).tolist()


def test_frames_are_made_at_the_alphas_of_a_list(
    prior_folder: Path, vqgan_folder: Path, built: tuple[pa.Table, building.BlockStats]
) -> None:
    even = frames_of(built[0], "diffusion")
    _, two_thirds = union_alphas((4,))
    builder = BlockBuilder(_config(prior_folder, vqgan_folder, lengths=(3,), spacing=(two_thirds,)))
    rows, _ = _build(builder, ROWS)
    assert {pair: frames[1:] for pair, frames in even.items()} == frames_of(rows, "diffusion")
    assert {frame["alpha"] for frame in rows["frames"].to_pylist()[0]} == {0.5}, "called by its place in the chain"
    linear = {pair: frames[1:] for pair, frames in frames_of(built[0], "linear").items()}
    assert linear == frames_of(rows, "linear")


def test_frames_of_a_path_are_those_of_its_own_alphas(
    builder: BlockBuilder, built: tuple[pa.Table, building.BlockStats], prior_folder: Path, vqgan_folder: Path
) -> None:
    measured = BlockBuilder(_config(prior_folder, vqgan_folder, spacing="path", keep_noise=True))
    rows, stats = _build(measured, ROWS)
    for name in ("source", "label", "source_noise", "label_noise"):
        assert rows[name] == built[0][name]
    assert frames_of(rows, "linear") == frames_of(built[0], "linear"), "pixels are mixed evenly as it is"
    (alone, _) = _build(measured, [ROWS[0]])
    assert alone.to_pylist() == rows.to_pylist()[:1]
    assert stats.evaluations > built[1].evaluations
    # By hand: the pair's path through the probes, the alphas of even steps, and the frames there.
    assert builder.engine is not None
    label = square(_picture(2), PRIOR_PX, "stretch", TASKS[ROWS[0]["task"]].resample)
    images = np.stack([square(_picture(1), PRIOR_PX, "stretch", "bicubic"), label])
    path = builder.engine.interpolate(images, [Request(0, 1, PROBE_ALPHAS)])
    alphas = even_path_alphas([images[0], *path.frames[0], images[1]], (0.0, *PROBE_ALPHAS, 1.0), union_alphas((4,)))
    chain = builder.engine.interpolate(images, [Request(0, 1, tuple(alphas))])
    small = np.stack([square(frame, SMALL_PX) for frame in chain.frames[0]])
    assert frames_of(rows, "diffusion")[ROWS[0]["pair_id"]] == builder.tokenizer.encode(small).tolist()
