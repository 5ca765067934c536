"""Score a vision-language model: facts of captions, accuracy of answers, likelihood, passes and speed.

    a batch of prompts -> answers -> rows, one a prompt -> scores, or differences of two models over the same prompts

A batch is always of the same prompts, so that its answers depend neither on the workers nor on restarts.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from covray.config.vlm import VlmEvaluateConfig
from covray.errors import ConfigError, one_line
from covray.evaluation.bleu import corpus_bleu
from covray.evaluation.caption_facts import right_facts
from covray.evaluation.records import Accuracy, VlmEvaluationRecord, VlmEvaluationResults
from covray.evaluation.statistics import Difference, Mean, mean_interval, paired_difference
from covray.generation.vision_text import load_answerer
from covray.io.storage import Folder
from covray.models.vlm.batch import Blocks, collate
from covray.pairs.exchanges import Exchange
from covray.training.objectives.base import perplexity
from covray.training.objectives.vision_text import parts_of, read_data

ANSWERS_FILE = "answers.jsonl"
PROMPT_SCORES = ("questions", "facts", "captions_with_all_facts", "chrf", "answer_nats")
"""The scores that two models are compared by, prompt by prompt."""


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

    def fact_scores(self) -> tuple[float, float]:
        """Return the share of its facts that the caption states, and 1 where it states all of them, else 0."""
        assert self.facts
        stated = self.facts.values()
        return sum(stated) / len(stated), float(all(stated))


class BatchAnswerer:
    """Answers the prompts of an evaluation, a batch at a time, and scores the answers."""

    def __init__(self, config: VlmEvaluateConfig):
        """Read the data and load the model.

        Raises:
            CovrayError: Data or model cannot be used.
        """
        data = read_data(config.data, config.texts)
        self._config, self._root = config, data.root
        self._exchanges = data.of_split(config.split)[: config.samples]
        self._answerer = load_answerer(config)

    def answer(self, number: int) -> list[Row]:
        """Return the rows of a batch, which follow from its number and the configuration only."""
        # A batch is a range of numbers, so that any worker can answer it.
        first = number * self._config.batch
        part = self._exchanges[first : first + self._config.batch]
        return list(self._rows(part, first))

    def _rows(self, part: Sequence[Exchange], first: int) -> Iterator[Row]:
        """Yield the rows of one batch; they are numbered from ``first``."""
        answerer = self._answerer
        texts, prompts = [], []
        for exchange in part:
            text = exchange.prompt
            if text is None:  # a caption is asked for in the same words everywhere
                text = self._config.texts.instruction
            texts.append(text)
            prompts.append(answerer.vlm.prompter.turn(parts_of(exchange, self._root, text)))
        started = time.monotonic()
        answers = answerer.answer(prompts, self._config.decoding)
        seconds = (time.monotonic() - started) / len(part)
        for place, exchange in enumerate(part):
            text = answerer.text(answers[place])
            # One sample at a time, because the loss is a sum over its tokens.
            sample = answerer.vlm.prompter.sample(prompts[place], exchange.answer)
            with torch.no_grad():
                batch = collate([sample], None, Blocks(1)).to(answerer.vlm.model.device)
                loss, each = answerer.vlm.model(batch)
            yield Row(
                number=first + place,
                kind=exchange.kind,
                prompt=texts[place],
                expected=exchange.answer,
                answer=text,
                right=_is_right(exchange, text),
                facts=_facts(exchange, text),
                log_likelihood=-float(loss),
                likelihood_tokens=len(each),
                tokens=len(answers[place].ids),
                passes=answers[place].passes,
                seconds=seconds,
            )


def _is_right(exchange: Exchange, answer: str) -> bool | None:
    """Return whether a question's answer is the expected one, but for capitals; None for a caption."""
    if exchange.prompt is None:
        return None
    return answer.casefold() == exchange.answer.strip().casefold()


def _facts(exchange: Exchange, answer: str) -> dict[str, bool] | None:
    """Return whether each fact of a portrait is stated; None where the picture is not a portrait."""
    if "solids" not in exchange.attributes:
        return None
    return right_facts(answer, exchange.attributes)


def row_lines(rows: Iterable[Row]) -> list[str]:
    """Return the lines of ``answers.jsonl``."""
    return [json.dumps(asdict(row)) for row in rows]


def read_rows(lines: Iterable[str]) -> list[Row]:
    """Return the rows of lines up to the first that is none: the last one of a killed evaluation can be half a line."""
    rows: list[Row] = []
    for line in lines:
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return rows


def summarize_rows(rows: Sequence[Row]) -> VlmEvaluationResults:
    """Return the scores of an evaluation; each mean with its 95% bootstrap interval over prompts."""
    # Questions have an answer that is right or wrong; captions are measured by their facts and their words.
    questions: dict[str, list[Row]] = defaultdict(list)
    facts: dict[str, list[float]] = defaultdict(list)
    captions: list[Row] = []
    for row in rows:
        if row.right is not None:
            questions[row.kind].append(row)
        else:
            captions.append(row)
        for theme, right in (row.facts or {}).items():
            facts[theme].append(float(right))

    answered: list[Row] = []  # kind by kind: the bootstrap of their mean draws by place
    for of_kind in questions.values():
        answered += of_kind
    shares, complete = [], []
    for row in captions:
        if row.facts:
            share, is_complete = row.fact_scores()
            shares.append(share)
            complete.append(is_complete)
    tokens = sum(row.tokens for row in rows)
    log_likelihood = sum(row.log_likelihood for row in rows)
    likelihood_tokens = sum(row.likelihood_tokens for row in rows)
    seconds = sum(row.seconds for row in rows)
    passes = sum(row.passes for row in rows)
    bleu, chrf, lacks_chrf = None, None, False
    if captions:
        written, expected = _texts(captions)
        bleu = corpus_bleu(written, expected)
        of_captions = caption_chrf(written, expected)
        lacks_chrf = of_captions is None
        chrf = mean_interval(of_captions or ())
    results = VlmEvaluationResults(
        prompts=len(rows),
        questions=mean_interval(_right(answered)),
        questions_by_kind={kind: _accuracy(of_kind) for kind, of_kind in sorted(questions.items())},
        facts=mean_interval(shares),
        facts_by_theme={theme: _mean(values) for theme, values in sorted(facts.items())},
        captions_with_all_facts=mean_interval(complete),
        bleu=bleu,
        chrf=chrf,
        answer_perplexity=perplexity(-log_likelihood / likelihood_tokens),
        tokens_per_s=_ratio(tokens, seconds),
        tokens_per_pass=_ratio(tokens, passes),
    )
    # chrF needs a package that is not a requirement; without it its absence is a fact of the results.
    if lacks_chrf:
        absent = {"chrf": "needs torchmetrics: pip install 'covray[captions]'"}
        return results.model_copy(update={"absent": absent})
    return results


def caption_chrf(written: Sequence[str], expected: Sequence[str]) -> list[float] | None:
    """Return chrF++ of each caption, 0 to 1: the F-score (beta 2) of its n-grams, 6 of characters and 2 of words.

    A score of every caption has intervals and paired differences, needs no tokenizer and no statistics of a corpus, as
    CIDEr does, and goes with human judgement as well as any n-gram score (Popovic 2015, 2017).

    Returns:
        The scores by torchmetrics; None where it is not installed.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        return None
    from torchmetrics.functional.text import chrf_score  # here: it is slow to import

    references = [[text] for text in expected]  # one reference each
    _, each = chrf_score(list(written), references, return_sentence_level_score=True)
    return list(map(float, each))


def compare_rows(first: Sequence[Sequence[Row]], second: Sequence[Sequence[Row]]) -> dict[str, Difference | None]:
    """Return the mean differences of two models over the same prompts, first less second, by score.

    Each has its 95% bootstrap interval and the p value of a sign-flip test; None where no prompt has the score.

    Args:
        first: The rows of the first model, of each of its seeds; a prompt's score is the mean over seeds.
        second: The same of the second model.
    """
    of_first, of_second = _mean_scores(first), _mean_scores(second)
    differences = {}
    for name, values in of_first.items():
        differences[name] = paired_difference(values, of_second[name])
    return differences


def _mean_scores(rows_by_seed: Sequence[Sequence[Row]]) -> dict[str, NDArray[np.float64]]:
    """Return the scores of every prompt, the mean over seeds, by name; NaN where it has none."""
    by_seed = list(map(_prompt_scores, rows_by_seed))
    means = {}
    for name in by_seed[0]:
        values = np.array([scores[name] for scores in by_seed], np.float64)  # [seeds, prompts]
        # NaN where a seed lacks the score: the prompt is left out of the comparison.
        means[name] = values.mean(0)
    return means


def _prompt_scores(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Return the scores of every prompt, by name; None where it has none."""
    captions = [row for row in rows if row.right is None]
    # Scored all together, then dealt out: rows come in one order, captions among questions.
    chrf = None
    if captions:
        chrf = caption_chrf(*_texts(captions))
    of_captions = iter(chrf or ())
    scores: dict[str, list[float | None]] = defaultdict(list)
    for row in rows:
        own: dict[str, float | None] = {"answer_nats": -row.log_likelihood / row.likelihood_tokens}
        if row.right is not None:
            own["questions"] = float(row.right)
        else:
            own["chrf"] = next(of_captions, None)  # nothing follows where torchmetrics is not installed
            if row.facts:
                own["facts"], own["captions_with_all_facts"] = row.fact_scores()
        for name in PROMPT_SCORES:
            scores[name].append(own.get(name))
    return dict(scores)


def _texts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the answers that were written, and those that were expected."""
    answers, expected = [], []
    for row in rows:
        answers.append(row.answer)
        expected.append(row.expected)
    return answers, expected


def compare_evaluations(first: str, second: str) -> dict[str, Difference | None]:
    """Compare two finished evaluations of the same prompts as ``compare_rows`` does.

    Args:
        first: The ``--out`` of a ``covray vlm evaluate``.
        second: Another one.

    Raises:
        ConfigError: One is not finished, or they answered different prompts.
    """
    rows, questions = [], []
    for out in (first, second):
        rows.append(finished_rows(out))
        data = VlmEvaluationRecord.read(Folder(out)).identity["data"]
        prompts = [(row.prompt, row.expected) for row in rows[-1]]
        questions.append((data, prompts))
    # Data, prompts and expected answers: only then is a difference one of the models.
    if questions[0] != questions[1]:
        raise ConfigError(
            f"{first} and {second}: answered different prompts; evaluate both with the same --data, --split, --samples "
            "and texts"
        )
    return compare_rows(rows[:1], rows[1:])


def finished_rows(out: str) -> list[Row]:
    """Return the rows of a finished evaluation. Raises ConfigError."""
    folder = Folder(out)
    if not folder.exists(VlmEvaluationResults.FILE):
        raise ConfigError(f"{folder.path}: holds no finished evaluation; give the --out of covray vlm evaluate")
    where = folder.join(ANSWERS_FILE)
    try:
        lines = folder.read_bytes(ANSWERS_FILE).decode().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read ({one_line(error)}); evaluate again into another folder") from error
    rows = read_rows(lines)
    # Half a line is normal while an evaluation is under way; in a finished one it hides all rows behind it.
    if len(rows) < len(lines):
        raise ConfigError(f"{where}: line {len(rows) + 1} is damaged; evaluate again into another folder")
    return rows


def _accuracy(rows: Sequence[Row]) -> Accuracy:
    """Return the accuracy of one kind of question, and that of always giving the most frequent answer."""
    counts = Counter(row.expected.casefold() for row in rows)
    return Accuracy(**vars(_mean(_right(rows))), most_frequent=counts.most_common(1)[0][1] / len(rows))


def _right(rows: Sequence[Row]) -> list[float]:
    """Return 1 for each question that was answered as expected, else 0."""
    return [float(bool(row.right)) for row in rows]


def _mean(values: Sequence[float]) -> Mean:
    """Return the mean of at least one value, with its interval."""
    mean = mean_interval(values)
    assert mean is not None
    return mean


def _ratio(amount: float, divisor: float) -> float | None:
    if not divisor:
        return None
    return amount / divisor
