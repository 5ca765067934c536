"""Episodes in, answers and scores out: the same for everyone, from the model's own tokens, at the label's own size."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import VQModel
from pydantic import ValidationError
from transformers import LlamaForCausalLM

from covray.chains.dataset import ChainDataset
from covray.config import EvaluateConfig, SamplingConfig
from covray.errors import CovrayError, PairError
from covray.evaluation.baselines import saliency
from covray.evaluation.metrics import OWN, REFERENCE
from covray.evaluation.pair_files import PairFile, choose_pairs
from covray.evaluation.runner import Runner
from covray.evaluation.scores import score
from covray.evaluation.subjects import subjects_of
from covray.io import storage
from covray.io.images import resize, square
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.seeds import seed_of
from covray.tasks import TASKS
from tests.support.backbones import load
from tests.support.datasets import CODES, TOKENS
from tests.support.evaluations import LORA, SPLIT, Row, png, smooth

Evaluation = Callable[..., tuple[Runner, list[Row]]]
Write = Callable[..., Any]


@pytest.fixture
def evaluation(write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write) -> Evaluation:
    """A runner and the rows of all its episodes; of two tasks, three and two queries."""

    def run(per_task: dict[str, int] | None = None, **options: Any) -> tuple[Runner, list[Row]]:
        data, rows = write_dataset(per_task or {"depth": 12, "edges": 8})
        write_manifest(rows)
        runner, episodes = runner_of(config_of(data, **options))
        return runner, runner.run(episodes).to_pylist()

    return run


def values(row: Row) -> dict[str, float | None]:
    return {entry["metric"]: entry["value"] for entry in row["values"]}


def of(rows: list[Row], subject: str) -> list[Row]:
    found = [row for row in rows if row["subject"] == subject]
    assert found, f"no {subject} in {sorted({row['subject'] for row in rows})}"
    return found


def chains_of(runner: Runner, method: str, length: int) -> dict[int, np.ndarray]:
    """Every chain of the dataset, by pair."""
    return {row["pair_id"]: runner.dataset.chain(row, length, method) for row in runner.dataset.rows()}


# --- what models write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "random"},
        {"selection": "similar", "sampling": {"temperature": 1.0, "best_of": 2}},
        {"selection": "focus", "example_split": SPLIT},
        {"sampling": {"temperature": 1.0, "vote": 5}},
    ],
)
def test_a_row_is_the_same_alone_among_others_and_in_any_order(
    options: dict[str, Any], write_dataset: Write, write_manifest: Write, write_run: Write, config_of: Write,
    runner_of: Write,
) -> None:  # fmt: skip
    data, rows = write_dataset({"depth": 12, "edges": 8})
    write_manifest(rows)
    run = write_run(data, method="diffusion", lengths=(4,))
    runner, episodes = runner_of(config_of(data, adapters=(run,), **options))
    together = {row["episode"]: row for row in runner.run(episodes).to_pylist()}
    assert len(together) == len(episodes) == 5 * 7
    assert all(row["error"] is None for row in together.values())

    order = np.random.default_rng(0).permutation(len(episodes))
    shuffled = episodes.take(pa.array(order))
    blocks = [shuffled.slice(start, size) for start, size in [(0, 1), (1, 1), (2, 2), (4, 11), (15, 20)]]
    other, _ = runner_of(config_of(data, adapters=(run,), **options))
    again = [row for block in blocks for row in other.run(block).to_pylist()]
    assert [row["episode"] for row in again] == shuffled["episode"].to_pylist(), "in the order asked for"
    assert all(row == together[row["episode"]] for row in again)


def test_the_pictures_of_a_row_are_the_same_alone_and_among_others(evaluation: Evaluation) -> None:
    runner, rows = evaluation()
    twice = [*rows, *rows]  # as where one episode is the best and the median
    together = runner.pictures_of(twice)
    assert {row["subject"] for row in rows} >= {"VQGAN ceiling", "mean label", "untuned"}
    for row, shown in zip(twice, together, strict=True):
        (alone,) = runner.pictures_of([row])
        assert shown is not None
        assert alone is not None
        for name in ("query", "frames", "answer", "label"):
            np.testing.assert_array_equal(getattr(shown, name), getattr(alone, name))
        if row["images"] is not None:
            np.testing.assert_array_equal(shown.frames, runner.tokenizer.decode(np.array(row["images"]))[:-1])


def test_a_row_whose_pictures_are_gone_shows_none(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, rows = evaluation({"depth": 12})
    read = PairFile.picture

    def read_but_one(self: PairFile, pair: Row, name: Any, fit: Any) -> np.ndarray:
        if pair["pair_id"] == rows[0]["pair_id"]:
            raise PairError("missing", name)
        return read(self, pair, name, fit)

    monkeypatch.setattr(PairFile, "picture", read_but_one)
    for row, shown in zip(rows, runner.pictures_of(rows), strict=True):
        assert (shown is None) == (row["pair_id"] == rows[0]["pair_id"])


@pytest.mark.parametrize("selection", ["random", "similar", "focus"])
def test_examples_are_of_the_query_s_task_and_never_the_query(evaluation: Evaluation, selection: str) -> None:
    runner, rows = evaluation({"depth": 20, "edges": 12}, pairs=2, selection=selection, example_split=SPLIT)
    tasks = {row["pair_id"]: (row["task"], row["split"]) for row in runner.dataset.rows()}
    asked = [row for row in rows if row["examples"] is not None]
    assert {row["subject"] for row in asked} == {"untuned", "Chain-of-Focus"}
    for row in asked:
        assert len(set(row["examples"])) == 2
        assert row["pair_id"] not in row["examples"]
        assert {tasks[pair_id] for pair_id in row["examples"]} == {(row["task"], SPLIT)}


def test_perplexity_is_that_of_transformers(
    llama_folder: Path, write_dataset: Write, write_manifest: Write, write_run: Write, config_of: Write,
    runner_of: Write,
) -> None:  # fmt: skip
    data, rows = write_dataset({"depth": 12})
    write_manifest(rows)
    runs = tuple(write_run(data, name, method=name, lengths=(4,)) for name in ("none", "diffusion"))
    runner, episodes = runner_of(config_of(data, adapters=runs, baselines=()))
    found = runner.run(episodes).to_pylist()
    model = LlamaForCausalLM.from_pretrained(llama_folder).eval()

    @torch.inference_mode()
    def perplexity(before: list[np.ndarray], answer: np.ndarray) -> float:
        ids = torch.from_numpy(np.concatenate([part.ravel() for part in (*before, answer)]).astype(np.int64))
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        return math.exp(-log_p[-TOKENS - 1 : -1].gather(1, ids[-TOKENS:, None]).mean())

    for subject, method, length in (("untuned none", "none", 2), ("untuned diffusion", "diffusion", 4)):
        chains = chains_of(runner, method, length)
        for row in of(found, subject):
            chain = chains[row["pair_id"]]
            examples = [chains[pair_id] for pair_id in row["examples"]]
            assert math.exp(values(row)[REFERENCE] or 0) == pytest.approx(
                perplexity([*examples, chain[:-1]], chain[-1]), rel=1e-4
            )
            own = [*examples, chain[0], *(np.array(tokens, np.uint16) for tokens in row["images"][:-1])]
            assert math.exp(values(row)[OWN] or 0) == pytest.approx(perplexity(own, chain[-1]), rel=1e-4)
            assert (values(row)[OWN] == values(row)[REFERENCE]) == (method == "none"), "without frames there is one"
            assert ("frame_psnr" in values(row)) == (method == "diffusion")


def test_answers_are_the_decoder_s_after_the_same_prompt(
    llama_folder: Path, write_dataset: Write, write_manifest: Write, write_run: Write, config_of: Write,
    runner_of: Write,
) -> None:  # fmt: skip
    data, rows = write_dataset({"depth": 12})
    write_manifest(rows)
    run = write_run(data, method="linear", lengths=(4,), pairs=(1, 2))
    runner, episodes = runner_of(config_of(data, adapters=(run,)))
    found = runner.run(episodes).to_pylist()
    chains = chains_of(runner, "linear", 4)
    plain, tuned = (LvmDecoder(load(llama_folder, lora), CODES, TOKENS, batch=3) for lora in (None, LORA))
    differ = False
    for first, second in zip(of(found, "untuned"), of(found, "tuned"), strict=True):
        for row, decoder in ((first, plain), (second, tuned)):
            assert len(row["examples"]) == 2, "as many as the run was trained with, at most"
            prompt = [chains[pair_id].ravel() for pair_id in row["examples"]]
            written = decoder.decode(np.concatenate(prompt), chains[row["pair_id"]][:1], 3)
            assert row["images"] == written.ids[0].tolist()
            assert row["log_likelihood"] == pytest.approx(written.image_log_likelihood[0, -1], rel=1e-5)
        differ |= first["images"] != second["images"]
    assert differ, "the adapter changes something"


def test_expected_tokens_are_of_continuous_labels_and_not_of_votes(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 12, "segmentation": 12})
    write_manifest(rows)
    images: dict[float | None, dict[tuple[str, str, str], Any]] = {}
    for expected in (None, 100.0):  # so hot that every token is the most central code
        config = config_of(data, sampling={"expected": expected}, votes={"samples": (3,)}, baselines=())
        runner, episodes = runner_of(config)
        images[expected] = {
            (row["task"], row["subject"], row["pair_id"]): row["images"] for row in runner.run(episodes).to_pylist()
        }
    changed = {key[:2] for key, written in images[None].items() if images[100.0][key] != written}
    assert {task for task, _ in changed} == {"depth"}
    votes = {subject.name for subject in runner.subjects.values() if subject.votes > 1}
    assert votes
    assert not votes & {name for _, name in changed}


def test_a_vote_is_scored_as_the_joined_answer_of_all_candidates(
    llama_folder: Path, write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 12})
    write_manifest(rows)
    sampling = {"temperature": 1.0, "vote": 5}
    options: dict[str, Any] = {"forms": [{"method": "linear", "length": 4, "pairs": 1}], "baselines": ("copy",)}
    config = config_of(data, sampling=sampling, **options)
    assert {subject.samples for subject in subjects_of(config, ChainDataset(data))} == {1, 5}
    runner, episodes = runner_of(config)
    alone, _ = runner_of(config_of(data, sampling={"temperature": 1.0}, **options))
    chains = chains_of(runner, "linear", 4)
    decoder = LvmDecoder(load(llama_folder), CODES, TOKENS, batch=3)
    first = {row["pair_id"]: row for row in alone.run(episodes).to_pylist() if row["images"] is not None}
    voted = [row for row in runner.run(episodes).to_pylist() if row["images"] is not None]
    assert voted
    for row in voted:
        prompt = np.concatenate([*(chains[pair_id].ravel() for pair_id in row["examples"]), chains[row["pair_id"]][0]])
        seed = seed_of(0, row["pair_id"])
        decoded = decoder.decode(
            np.empty(0, np.uint16), prompt[None], 3, SamplingConfig.model_validate(sampling), [seed]
        )
        images = np.array(row["images"]).reshape(5, 3, TOKENS)
        assert np.array_equal(images[0], decoded.ids[0]), "the likeliest candidate first"
        assert sorted(images.tolist()) == sorted(decoded.candidate_ids[0].tolist())
        assert first[row["pair_id"]]["images"] in images.tolist(), "the candidate that is written without a vote"
        assert row["log_likelihood"] == pytest.approx(decoded.candidate_log_likelihood[0, :, -1].mean(), rel=1e-5)
        answers = runner.tokenizer.decode(decoded.candidate_ids[0, :, -1])
        joined = resize(TASKS["depth"].mean(answers, robust=True), 20, 24, "nearest")
        _, frames, answer, label = runner.pictures_of([row])[0]
        assert len(frames) == 2
        assert np.array_equal(answer, joined)
        expected = score("depth", joined, label).values
        assert {metric: values(row)[metric] for metric in expected} == expected
        assert values(row)[OWN] != values(row)[REFERENCE]


def test_chain_of_focus_prompts_with_image_saliency_map_and_label(evaluation: Evaluation, llama_folder: Path) -> None:
    runner, rows = evaluation({"depth": 12}, pairs=2)
    decoder = LvmDecoder(load(llama_folder), CODES, TOKENS, batch=3)
    plain = chains_of(runner, "none", 2)

    def chain(pair_id: int) -> np.ndarray:
        image, label = plain[pair_id]
        mapped = saliency(runner.tokenizer.decode(image[None])[0])
        return np.stack([image, runner.tokenizer.encode(mapped[None])[0], label])

    for row in of(rows, "Chain-of-Focus"):
        prompt = np.concatenate([chain(pair_id).ravel() for pair_id in row["examples"]])
        written = decoder.decode(prompt, chain(row["pair_id"])[:1], 2)
        assert row["images"] == written.ids[0].tolist()
        assert values(row)["frame_psnr"] is not None


# --- baselines -----------------------------------------------------------------------------------------------------


def test_the_copy_answers_with_the_query(evaluation: Evaluation) -> None:
    runner, rows = evaluation()
    for row in of(rows, "copy of the query"):
        query, frames, answer, label = runner.pictures_of([row])[0]
        assert not len(frames)
        assert np.array_equal(answer, query)
        assert values(row) == score(row["task"], query, label).values
        assert row["images"] is row["log_likelihood"] is row["examples"] is None


def test_the_ceiling_is_the_label_written_as_tokens_and_read_back(evaluation: Evaluation) -> None:
    runner, rows = evaluation()
    for row in of(rows, "VQGAN ceiling"):
        _, _, answer, label = runner.pictures_of([row])[0]
        resample = "nearest" if row["task"] == "depth" else "bicubic"
        tokens = runner.tokenizer.encode(square(label, 16, "stretch", resample)[None])
        assert np.array_equal(answer, resize(runner.tokenizer.decode(tokens)[0], 20, 24, resample))
        assert values(row) == score(row["task"], answer, label).values


def test_the_ceiling_of_a_label_that_the_tokenizer_keeps_is_perfect(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write, vqgan_folder: Path, tmp_path: Path
) -> None:
    model = VQModel.from_pretrained(vqgan_folder)
    with torch.no_grad():  # it paints grey, whatever it reads
        model.decoder.conv_out.weight.zero_()
        model.decoder.conv_out.bias.fill_(0.5)
    model.save_pretrained(tmp_path / "grey")
    data, rows = write_dataset({"low_light": 8})
    write_manifest(rows, labels={row["pair_id"]: png(np.full((20, 24, 3), 128, np.uint8)) for row in rows})
    tokenizer = {"path": str(tmp_path / "grey")}
    runner, episodes = runner_of(config_of(data, baselines=("copy", "ceiling"), untuned=False, tokenizer=tokenizer))
    found = runner.run(episodes).to_pylist()
    for row in of(found, "VQGAN ceiling"):
        assert values(row) == {"psnr": pytest.approx(100), "ssim": pytest.approx(1)}
    assert all((values(row)["psnr"] or 0) < 60 for row in of(found, "copy of the query"))


def test_the_nearest_label_of_a_query_that_is_among_the_examples_is_its_own(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 12})
    query = next(row["pair_id"] for row in rows if row["split"] == SPLIT)
    twin = [row["pair_id"] for row in rows if row["split"] == "train"][4]
    same, label = png(smooth(99, 20, 24)), smooth(77, 16, 16)
    write_manifest(rows, images={query: same, twin: same}, labels={twin: png(label)})
    runner, episodes = runner_of(config_of(data, baselines=("mean", "nearest"), untuned=False))
    (row,) = [row for row in of(runner.run(episodes).to_pylist(), "nearest label") if row["pair_id"] == query]
    _, _, answer, truth = runner.pictures_of([row])[0]
    assert np.array_equal(answer, resize(label, 20, 24, "nearest"))
    assert values(row) == score("depth", answer, truth).values


def test_a_query_is_not_an_example_of_its_own_baselines(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 12})
    mine = [row["pair_id"] for row in rows if row["split"] == SPLIT]
    flat = {pair_id: np.full((16, 16, 3), 40 * place, np.uint8) for place, pair_id in enumerate(mine, 1)}
    write_manifest(rows, labels={pair_id: png(label) for pair_id, label in flat.items()})
    config = config_of(data, baselines=("mean", "nearest"), untuned=False, example_split=SPLIT)
    runner, episodes = runner_of(config)
    for row in runner.run(episodes).to_pylist():
        answer = runner.pictures_of([row])[0][2]
        own = flat[row["pair_id"]][0, 0, 0]
        others = [flat[pair_id][0, 0, 0] for pair_id in mine if pair_id != row["pair_id"]]
        expected = [np.mean(others)] if row["subject"] == "mean label" else others
        assert min(abs(float(answer[0, 0, 0]) - value) for value in expected) <= 1
        assert answer[0, 0, 0] != own or own in expected


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fit", "side"), [("stretch", (20, 24)), ("crop", (20, 20))])
def test_answers_are_scored_at_the_label_s_own_size(
    fit: str, side: tuple[int, int], write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 8})
    description = storage.read_json(f"{data}/_dataset.json")
    description["config"]["fit"] = fit
    storage.write_json(f"{data}/_dataset.json", description)
    write_manifest(rows)
    runner, episodes = runner_of(config_of(data))
    numbers = {row["pair_id"]: number for number, row in enumerate(rows)}
    for row in runner.run(episodes).to_pylist():
        query, _, answer, label = runner.pictures_of([row])[0]
        assert query.shape == answer.shape == label.shape == (*side, 3)
        image, truth = (smooth(2 * numbers[row["pair_id"]] + which, 20, 24) for which in (0, 1))
        if fit == "crop":
            image, truth = (square(picture, 20, "crop") for picture in (image, truth))
        assert np.array_equal(query, image)
        assert np.array_equal(label, truth)
        expected = score("depth", answer, truth).values
        assert {metric: values(row)[metric] for metric in expected} == expected
        if row["images"] is not None:
            written = runner.tokenizer.decode(np.array(row["images"]))[-1]
            assert np.array_equal(answer, resize(written, *side, "nearest"))


def test_a_picture_that_cannot_be_read_is_a_row_with_its_reason(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 16, "edges": 8})
    no_label, no_image, *_ = [row["pair_id"] for row in rows if row["split"] == SPLIT and row["task"] == "depth"]
    no_example = next(row["pair_id"] for row in rows if row["split"] == "train")
    write_manifest(rows, images={no_image: b"GIF8"}, labels={no_label: b"no picture", no_example: b"nothing"})
    runner, episodes = runner_of(config_of(data))
    found = runner.run(episodes).to_pylist()
    assert len(found) == len(episodes)
    asks_image = {"copy of the query", "nearest label"}
    for row in found:
        if row["pair_id"] == no_label:
            assert row["error"].startswith("not_an_image: label: ")
        elif row["pair_id"] == no_image and row["subject"] in asks_image:
            assert ": image: " in row["error"]
        else:
            assert row["error"] is None
        assert (row["values"] is None) == (row["error"] is not None)


def test_without_a_readable_example_the_baselines_say_so(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 8})
    write_manifest(rows, labels={row["pair_id"]: b"nothing" for row in rows if row["split"] == "train"})
    runner, episodes = runner_of(config_of(data, baselines=("mean", "nearest"), untuned=False))
    assert {row["error"].partition(":")[0] for row in runner.run(episodes).to_pylist()} == {"no_examples"}


@pytest.mark.parametrize("meta", [None, "null", "[1]", "7", "{", "[" * 100_000])
def test_meta_that_is_no_object_says_nothing(
    meta: str | None, write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"segmentation": 8})
    config = config_of(data, baselines=("mean", "ceiling"), untuned=False)
    found = []
    for each in (meta, "{}"):
        write_manifest(rows, meta=each)
        runner, episodes = runner_of(config)
        found.append(runner.run(episodes))
    assert found[0].equals(found[1])
    assert not found[0]["error"].drop_null()


def test_a_label_with_nothing_to_score_is_undefined_and_no_warning(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 8, "normals": 8, "pose": 8, "edges": 8})
    black = png(np.zeros((20, 24, 3), np.uint8))
    write_manifest(rows, labels={row["pair_id"]: black for row in rows})
    runner, episodes = runner_of(config_of(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = runner.run(episodes).to_pylist()
    for row in found:
        assert row["error"] is None
        assert values(row)[TASKS[row["task"]].metrics[0].name] is None
        assert (OWN in values(row)) == (row["images"] is not None)


# --- choosing pairs ------------------------------------------------------------------------------------------------


def test_fewer_episodes_are_some_of_the_more(write_dataset: Write) -> None:
    data, rows = write_dataset({"depth": 24, "edges": 8}, rejects={3: "truncated: x"})
    dataset = ChainDataset(data)

    def chosen(count: int | None, seed: int = 0) -> list[tuple[str, int]]:
        table = choose_pairs(dataset, None, SPLIT, count, seed, "split")
        return [(row["task"], row["pair_id"]) for row in table.to_pylist()]

    good = {(row["task"], row["pair_id"]) for row in rows if row["split"] == SPLIT and "error" not in row}
    assert chosen(None) == chosen(99) == sorted(good)
    assert len(chosen(2)) == 4
    assert set(chosen(1)) < set(chosen(2)) < good
    assert any(chosen(1, seed) != chosen(1) for seed in range(1, 9)), "the seed decides"


def test_tokens_of_another_tokenizer_are_refused(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, rows = write_dataset({"depth": 8})
    write_manifest(rows)
    config: EvaluateConfig = config_of(data, tokenizer={"path": "nano"})
    with pytest.raises(CovrayError, match="tokens of different tokenizers do not mix"):
        runner_of(config)


def test_pairs_come_back_as_the_manifest_has_them(
    tmp_path: Path,
    write_dataset: Write,
    write_manifest: Write,
    config_of: Write,
    runner_of: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("covray.evaluation.pair_files._ROWS_AT_ONCE", 3)
    data, rows = write_dataset({"depth": 40})
    # A folder, of whose files one has wider strings, beside the list they were made of.
    folder = tmp_path / "manifest"
    folder.mkdir()
    table = pq.read_table(write_manifest(rows))
    wide = table.schema.set(1, pa.field("task", pa.large_string())).set(5, pa.field("meta", pa.large_string()))
    pq.write_table(table.slice(0, 20).cast(wide), folder / "a.parquet")
    pq.write_table(table.slice(20), folder / "b.parquet")
    (folder / "list.csv").write_text("image,label\n")
    runner, _ = runner_of(config_of(data, baselines=("copy",), untuned=False, manifest=str(folder)))
    expected = {row["pair_id"]: row for row in table.to_pylist()}
    ids = runner._queries.ids_of("depth")
    assert len(ids) == 10
    for pair_id, found in zip(reversed(ids), runner._queries.read(reversed(ids)), strict=True):
        assert found == {key: expected[pair_id][key] for key in found}
        assert json.loads(found["meta"]) == {}


def test_candidates_are_kept_with_their_own_scores(
    write_dataset: Write, write_manifest: Write, config_of: Write, runner_of: Write
) -> None:
    data, pairs = write_dataset({"depth": 12, "edges": 8})
    write_manifest(pairs)
    options: dict[str, Any] = {"forms": [{"method": "linear", "length": 4, "pairs": 1}], "baselines": ("copy",)}
    options["sampling"] = {"temperature": 1.0, "best_of": 3}
    simple, episodes = runner_of(config_of(data, **options))
    plain = simple.run(episodes).to_pylist()
    assert all(row["candidates"] is None and row["before"] is None for row in plain)
    runner, episodes = runner_of(config_of(data, score_candidates=True, **options))
    rows = runner.run(episodes).to_pylist()
    written = [row for row in rows if row["images"] is not None]
    assert written
    for row in written:
        assert len(row["before"]) == 5 * TOKENS, "an example of four pictures, and the query"
        candidates = row["candidates"]
        assert len(candidates) == 3
        chosen = [candidate for candidate in candidates if candidate["images"] == row["images"]]
        primary = TASKS[row["task"]].metrics[0].name
        assert chosen[0]["score"] == values(row)[primary], "that of the answer, where it is the answer"
        _, _, _, label = runner.pictures_of([row])[0]
        for candidate in candidates:
            answer = runner.tokenizer.decode(np.array(candidate["images"][-1:], np.uint16))[0]
            resized = resize(answer, *label.shape[:2], TASKS[row["task"]].resample)
            assert candidate["score"] == score(row["task"], resized, label).values[primary]
    without = [{key: row[key] for key in row if key not in ("candidates", "before")} for row in rows]
    assert without == [{key: row[key] for key in row if key not in ("candidates", "before")} for row in plain]
    assert all(row["candidates"] is None for row in rows if row["images"] is None)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "best_of": 4, "keep": 0.5}])
def test_scores_of_candidates_that_are_not_written_are_refused(config_of: Write, sampling: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="score_candidates: scores all candidates"):
        config_of("chains", sampling=sampling, score_candidates=True)
