"""Score a vision-language model: facts of captions, accuracy of answers, likelihood, passes and speed.

Answers are written to ``answers.jsonl`` batch by batch; the same command continues behind the last whole batch.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from covray.config import differences
from covray.config.vlm import VlmEvaluateConfig
from covray.errors import ConfigError, DatasetError, one_line
from covray.evaluation.bleu import corpus_bleu
from covray.evaluation.caption_facts import right_facts
from covray.evaluation.statistics import mean_interval
from covray.generation.vision_text import Answerer, load_answerer
from covray.io import storage
from covray.models.vlm.batch import Blocks, collate
from covray.models.vlm.decoding import decoding_blocks
from covray.pairs.exchanges import Exchange
from covray.progress import stage
from covray.training.objectives.vision_text import pictures_of, read_data

ANSWERS_FILE = "answers.jsonl"
RESULTS_FILE = "results.json"
_ABOUT_FILE = "_evaluation.json"
_NOT_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(("out", "device", "data", "model", "revision"), True), "texts": {"root"},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One answer and its scores."""

    number: int
    kind: str
    prompt: str
    expected: str
    answer: str
    right: bool | None
    """Of a question: whether the answer is the expected one, but for capitals."""
    facts: dict[str, bool] | None
    """Of a portrait's caption: whether each fact is stated."""
    log_likelihood: float
    """Of the expected answer with its end, token by token, in nats."""
    likelihood_tokens: int
    tokens: int
    """Of the answer that was written."""
    passes: int
    seconds: float
    """The share of the batch's time for writing."""


def evaluate_vision_text(config: VlmEvaluateConfig) -> dict[str, Any]:
    """Answer the prompts of a split and return the scores, which are also written to ``results.json``.

    Raises:
        CovrayError: Data or model cannot be used, or the folder holds another evaluation.
    """
    out = Path(config.out).expanduser()
    with stage("reading data and model"):
        data = read_data(config.data, config.texts)
        exchanges = data.of_split(config.split)[: config.samples]
        answerer = load_answerer(config)
        decoding_blocks(config.decoding, answerer.trained)
    identity = config.model_dump(mode="json", exclude=_NOT_IDENTITY)
    identity |= {"data": data.fingerprint(), "model": answerer.fingerprint}
    _begin(out, identity)
    rows = _read_rows(out / ANSWERS_FILE, config.batch)
    with stage("answering") as shown, (out / ANSWERS_FILE).open("w", encoding="utf-8") as file:
        _write_rows(file, rows)
        while len(rows) < len(exchanges):
            part = exchanges[len(rows) : len(rows) + config.batch]
            new = list(_answer(config, answerer, part, len(rows), data.root))
            _write_rows(file, new)
            rows += new
            shown.say(f"{len(rows)}/{len(exchanges)} answered")
    results = summarize_rows(rows)
    storage.write_json(str(out / RESULTS_FILE), results)
    return results


def _begin(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder, or continue the same evaluation in it."""
    about = out / _ABOUT_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        begun = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {out}: cannot be used ({one_line(error)}); give another folder") from error
    if begun is None and any(out.iterdir()):
        raise DatasetError(f"{out}: holds files that covray vlm evaluate did not write; give another --out")
    if begun is not None:
        differing = differences(begun["identity"], identity)
        if differing:
            raise DatasetError(
                f"{out}: was begun with another configuration: {'; '.join(differing)}; give the same, or another --out"
            )
    storage.write_json(str(about), {"version": 1, "identity": identity})


def _read_rows(file: Path, batch: int) -> list[Row]:
    """Return the rows of whole batches; the last line of a killed evaluation can be half a line."""
    rows: list[Row] = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(Row(**json.loads(line)))
            except (ValueError, TypeError):
                break
    return rows[: len(rows) // batch * batch]


def _write_rows(file: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        file.write(json.dumps(asdict(row)) + "\n")
    file.flush()


def _answer(
    config: VlmEvaluateConfig, answerer: Answerer, part: Sequence[Exchange], first: int, root: str | None
) -> Iterator[Row]:
    """Yield the rows of one batch; they are numbered from ``first``."""
    texts = [config.texts.instruction if exchange.prompt is None else exchange.prompt for exchange in part]
    prompts = []
    for exchange, text in zip(part, texts, strict=True):
        prompts.append(answerer.prompt(pictures_of(exchange, root), text))
    started = time.monotonic()
    answers = answerer.answer(prompts, config.decoding)
    seconds = (time.monotonic() - started) / len(part)
    for place, exchange in enumerate(part):
        text = answerer.text(answers[place])
        sample = answerer.vlm.prompter.sample(prompts[place], exchange.answer)
        with torch.no_grad():
            batch = collate([sample], None, Blocks(1)).to(answerer.vlm.model.device)
            loss, each = answerer.vlm.model(batch)
        is_caption = exchange.prompt is None
        yield Row(
            number=first + place,
            kind=exchange.kind,
            prompt=texts[place],
            expected=exchange.answer,
            answer=text,
            right=None if is_caption else text.casefold() == exchange.answer.strip().casefold(),
            facts=right_facts(text, exchange.attributes) if "solids" in exchange.attributes else None,
            log_likelihood=-float(loss),
            likelihood_tokens=len(each),
            tokens=len(answers[place].ids),
            passes=answers[place].passes,
            seconds=seconds,
        )


def summarize_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the scores of an evaluation; each mean with its 95% bootstrap interval over prompts."""
    questions: dict[str, list[Row]] = defaultdict(list)
    facts: dict[str, list[float]] = defaultdict(list)
    captions = []
    for row in rows:
        if row.right is not None:
            questions[row.kind].append(row)
        else:
            captions.append(row)
        for theme, right in (row.facts or {}).items():
            facts[theme].append(float(right))
    seconds = sum(row.seconds for row in rows)
    tokens, passes = sum(row.tokens for row in rows), sum(row.passes for row in rows)
    likelihood_tokens = sum(row.likelihood_tokens for row in rows)
    answered = [row for own in questions.values() for row in own]
    results: dict[str, Any] = {
        "prompts": len(rows),
        "questions": _mean([float(bool(row.right)) for row in answered]),
        "questions_by_kind": {kind: _accuracy(own) for kind, own in sorted(questions.items())},
        "facts": _mean([sum(row.facts.values()) / len(row.facts) for row in captions if row.facts]),
        "facts_by_theme": {theme: _mean(values) for theme, values in sorted(facts.items())},
        "captions_with_all_facts": _mean([float(all(row.facts.values())) for row in captions if row.facts]),
        "bleu": None,
        "answer_perplexity": math.exp(-sum(row.log_likelihood for row in rows) / likelihood_tokens),
        "tokens_per_s": tokens / seconds if seconds else None,
        "tokens_per_pass": tokens / passes if passes else None,
    }
    if captions:
        results["bleu"] = corpus_bleu([row.answer for row in captions], [row.expected for row in captions])
    return results


def _accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the accuracy of one kind of question, and that of always giving the most frequent answer."""
    counts = Counter(row.expected.casefold() for row in rows)
    accuracy = _mean([float(bool(row.right)) for row in rows])
    assert accuracy is not None
    return accuracy | {"most_frequent": counts.most_common(1)[0][1] / len(rows)}


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    result = mean_interval(values)
    return None if result is None else asdict(result)
