"""Probes: the answer after other frames than the model's own, scored like its own answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from covray.config import EvaluateConfig
from covray.evaluation.metrics import OWN, REFERENCE
from covray.evaluation.probes import FRAMES, NATS_ANSWER, NATS_FRAMES, PROBE_METRICS, probe_frames
from covray.evaluation.runner import Runner
from covray.evaluation.scores import score
from covray.io.images import resize
from covray.seeds import seed_of
from covray.tasks import TASKS
from tests.support.datasets import TOKENS
from tests.support.evaluations import Row

Write = Callable[..., Any]
ALL = ("reference", "other", "copy", "dummy", "last_frame", "nats", "gain")


@pytest.fixture
def evaluation(
    write_dataset: Write, write_manifest: Write, write_run: Write, config_of: Write, runner_of: Write
) -> Any:
    """A runner and its rows, of a run with frames and its backbone."""
    data, rows = write_dataset({"depth": 12, "edges": 8})
    write_manifest(rows)
    run = write_run(data, method="diffusion", lengths=(4,))

    def evaluate(**options: Any) -> tuple[Runner, list[Row]]:
        runner, episodes = runner_of(config_of(data, adapters=(run,), **options))
        return runner, runner.run(episodes).to_pylist()

    return evaluate


def values(row: Row) -> dict[str, float | None]:
    return {entry["metric"]: entry["value"] for entry in row["values"]}


def test_probes_add_values_and_change_no_other(evaluation: Any) -> None:
    _, plain = evaluation()
    _, probed = evaluation(probes=ALL)
    names = {metric.name for metric in PROBE_METRICS}
    for before, after in zip(plain, probed, strict=True):
        added = values(after).keys() - values(before).keys()
        assert {key: value for key, value in after.items() if key != "values"} == {
            key: value for key, value in before.items() if key != "values"
        }
        assert {key: value for key, value in values(after).items() if key not in names} == values(before)
        if after["images"] is None:
            assert not added
        elif after["subject"] == "Chain-of-Focus":
            assert added == names - {"after_other"}
        else:
            assert added == names


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "best_of": 2}])
def test_answers_are_those_of_the_decoder_after_the_probe_s_frames(evaluation: Any, sampling: dict[str, Any]) -> None:
    runner, rows = evaluation(probes=ALL, sampling=sampling, baselines=(), untuned=False)
    (subject,) = runner.subjects.values()
    model = runner._model(subject.name)
    chains = {row["pair_id"]: runner.dataset.chain(row, 4, "diffusion") for row in runner.dataset.rows()}
    for row in rows:
        chain = chains[row["pair_id"]]
        examples = [chains[pair_id].reshape(-1) for pair_id in row["examples"]]
        frames = {
            "reference": chain[1:3],
            "copy": np.stack([chain[0], chain[0]]),
            "dummy": np.zeros((2, TOKENS), np.uint16),
        }
        expected = {"last_frame": np.array(row["images"][-2], np.uint16)}
        for probe, pictures in frames.items():
            prompt = np.concatenate([*examples, chain[0], pictures.reshape(-1)])
            seed = seed_of(runner.config.seed, row["pair_id"])
            decoded = model.decoder.decode(prompt[:0], prompt[None], 1, runner.config.sampling, [seed])
            expected[f"after_{probe}"] = decoded.ids[0, 0]
        pair = runner._queries.read([row["pair_id"]])[0]
        label = runner._queries.picture(pair, "label", runner.fit)
        task = TASKS[row["task"]]
        for name, tokens in expected.items():
            answer = resize(runner.tokenizer.decode(tokens[None])[0], *label.shape[:2], task.resample)
            assert values(row)[name] == score(row["task"], answer, label).values[task.metrics[0].name]
        reference = values(row)[REFERENCE]
        assert reference is not None
        assert values(row)[NATS_ANSWER] == pytest.approx(reference * TOKENS)
        before = np.concatenate([*examples, chain[0]])
        assert values(row)[NATS_FRAMES] == pytest.approx(
            TOKENS * (model.answer_nats(before, chain[1]) + model.answer_nats(np.append(before, chain[1]), chain[2])),
            rel=1e-5,
        )


def test_the_frames_of_another_pair_are_of_the_task(evaluation: Any) -> None:
    runner, rows = evaluation(baselines=())
    name = next(iter(runner.subjects))
    episodes, numbers = runner._episodes(name)
    for row in rows:
        query = numbers[row["task"], row["pair_id"]]
        chain = episodes.queries.tokens[query]
        frames = probe_frames("other", chain, episodes.queries, query, 0)
        owners = np.flatnonzero((episodes.queries.tokens[:, 1:-1] == frames).all((1, 2)))
        (owner,) = owners
        assert owner != query
        tasks = np.searchsorted(episodes.queries.starts, [owner, query], side="right")
        assert tasks[0] == tasks[1]


def test_without_probes_an_identity_is_what_it_was() -> None:
    config = EvaluateConfig(data="chains", out="eval")
    assert "probes" not in config.identity()
    probed = EvaluateConfig(data="chains", out="eval", probes=FRAMES)
    assert probed.identity() == config.identity() | {"probes": [*FRAMES]}


def test_gains_are_likelihoods_after_frames_over_those_after_copies(evaluation: Any) -> None:
    runner, rows = evaluation(probes=("gain",), baselines=(), untuned=False)
    (subject,) = runner.subjects.values()
    model = runner._model(subject.name)
    chains = {row["pair_id"]: runner.dataset.chain(row, 4, "diffusion") for row in runner.dataset.rows()}
    for row in rows:
        chain = chains[row["pair_id"]]
        before = np.concatenate([*(chains[pair_id].reshape(-1) for pair_id in row["examples"]), chain[0]])
        *own, answer = np.array(row["images"], np.uint16)
        copies = np.concatenate([before, chain[0], chain[0]])
        label_nats = model.answer_nats(copies, chain[-1])
        expected = {
            "frame_gain": label_nats - values(row)[OWN],
            "frame_gain_reference": label_nats - values(row)[REFERENCE],
            "frame_agreement": model.answer_nats(copies, answer)
            - model.answer_nats(np.concatenate([before, *own]), answer),
        }
        for name, value in expected.items():
            assert values(row)[name] == pytest.approx(value, abs=1e-6)
