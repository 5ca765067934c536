"""One worker of an evaluation: episodes in, answers and their scores out. Knows no ray.

    query, example chains --LVM--> frames, answer --VQGAN--> pictures, at the label's own size --task--> scores

An episode's row follows from the configuration, its subject and its pair alone, not from its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.chains.loading import Chains
from covray.config import EvaluateConfig, SamplingConfig, SentencesConfig
from covray.errors import DatasetError, PairError
from covray.evaluation.answers import (
    NOTHING_WRITTEN,
    RESULT_SCHEMA,
    AnswerPictures,
    Asked,
    EpisodeResult,
    ResultRow,
    Strip,
    Tokens,
    answer_candidates,
)
from covray.evaluation.baselines import saliency
from covray.evaluation.episodes import Episodes
from covray.evaluation.example_labels import ExampleLabels
from covray.evaluation.frames import candidate_figures
from covray.evaluation.likelihoods import label_nats
from covray.evaluation.lpips import LEAST_PX, load_lpips
from covray.evaluation.metrics import REFERENCE
from covray.evaluation.pair_files import PairFile
from covray.evaluation.probes import FRAMES, GAIN, LAST_FRAME, NATS, frame_gains, picture_nats, probe_frames
from covray.evaluation.scores import score
from covray.evaluation.subjects import SALIENCY, Subject
from covray.generation.models import LoadedModel, ModelSource
from covray.generation.votes import join_answers
from covray.io.images import resize, square
from covray.io.pixels import Picture
from covray.models.lvm.adapter import read_run_adapter
from covray.models.lvm.backbone import backbone_facts
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.pairs.manifest_reading import read_meta
from covray.seeds import seed_of
from covray.tasks import TASKS
from covray.tasks.metrics import added_values


class Runner:
    """Evaluates ``subjects`` on the pairs of ``queries``; ``examples`` are those that baselines look at."""

    def __init__(self, config: EvaluateConfig, subjects: Sequence[Subject], queries: str, examples: str):
        """Load the tokenizer; models are loaded when their episodes come.

        Args:
            config: Resolved.
            subjects: Rows of the table.
            queries: File of ``write_pairs``.
            examples: File of ``write_pairs``.

        Raises:
            CovrayError: The tokenizer is not the dataset's.
        """
        assert config.tokenizer is not None
        self.config, self.subjects = config, {subject.name: subject for subject in subjects}
        self.dataset = ChainDataset(config.data)
        self.tokenizer = load_tokenizer(config.tokenizer, config.engine)
        require_same_tokens(self.dataset, self.tokenizer, config.tokenizer.path)
        self._lpips = None
        if config.lpips is not None:
            self._lpips = load_lpips(Path(config.lpips))
        self.fit = self.dataset.config.get("fit", "stretch")
        self._queries = PairFile(queries)
        self._labels = ExampleLabels(PairFile(examples), self.tokenizer.size_px, self.fit)
        # One at a time: episodes come sorted by subject and task, and a large model fills a GPU.
        self._model = functools.lru_cache(maxsize=1)(self._load_model)
        self._chains = functools.lru_cache(maxsize=1)(self._load_chains)
        self._episodes = functools.lru_cache(maxsize=1)(self._load_episodes)

    def run(self, table: pa.Table) -> pa.Table:
        """Return the rows (``RESULT_SCHEMA``) of the episodes of ``table`` (``EPISODE_SCHEMA``), in its order."""
        results = [EpisodeResult(**row) for row in table.to_pylist()]

        # A subject's model serves all of its episodes of a task; groups are formed again, whatever the table's order.
        groups: dict[tuple[str, str], list[EpisodeResult]] = {}
        for result in results:
            groups.setdefault((result.subject, result.task), []).append(result)
        # Answers are written for all episodes of a group together, and only then read and scored.
        for (name, _), group in groups.items():
            subject = self.subjects[name]
            if subject.method is not None:
                self._write(subject, group)
            self._score(group)
        return pa.Table.from_pylist([vars(result) for result in results], RESULT_SCHEMA)

    def pictures_of(self, rows: Sequence[ResultRow]) -> list[Strip | None]:
        """Return the pictures of rows of ``run``, for people to look at; None where a picture cannot be read."""
        # Rows have no pictures: these are decoded again from the tokens.
        results = []
        for row in rows:
            episode = EpisodeResult(row["episode"], row["subject"], row["task"], row["pair_id"], images=row["images"])
            results.append(episode)
        strips: list[Strip | None] = []
        answers = self._answers(results)
        for result in results:
            try:
                query = self._queries.picture(self._queries.read([result.pair_id])[0], "image", self.fit)
            except PairError as error:
                result.error = str(error)
            if result.error is not None:
                strips.append(None)
                continue
            asked, pictures = answers[result.episode]
            frames = np.empty((0, 0, 0, 3), np.uint8)
            if len(pictures.written):
                frames = pictures.written[0, :-1]  # of a vote, the likeliest candidate's
            strips.append(Strip(query, frames, pictures.answer, asked.label))
        return strips

    # --- what models write ---

    def _write(self, subject: Subject, group: Sequence[EpisodeResult]) -> None:
        """Fill in tokens, likelihoods and perplexities of one subject's episodes of one task."""
        assert subject.length is not None
        model = self._model(subject.name)
        episodes, rows = self._episodes(subject.name)
        # Prompts of one subject and task are equally long: they are one batch.
        prompts, seeds = [], []
        for result in group:
            query = rows[result.task, result.pair_id]
            chosen = episodes.rows(query)
            result.examples = episodes.examples.pair_ids[chosen].tolist()
            chains = self._with_frames(subject, episodes.examples, chosen)
            result.chain = self._with_frames(subject, episodes.queries, np.array([query]))[0]
            result.prompt = np.concatenate([chains.reshape(-1), result.chain[0]])
            prompts.append(result.prompt)
            seeds.append(seed_of(self.config.seed, result.pair_id))

        sampling, images = self._sampling(subject, group[0].task), subject.length - 1
        # The query belongs to the prompt, so nothing is shared by all rows.
        shared = np.empty(0, np.uint16)
        decoded = model.decoder.decode(shared, np.stack(prompts), images, sampling, seeds)
        # Results follow their place in the group, so that a row does not depend on its neighbours.
        for number, result in enumerate(group):
            candidates, likelihood = answer_candidates(decoded, number, sampling)
            result.images = candidates.reshape(-1, candidates.shape[-1]).tolist()
            if self.config.score_candidates and subject.votes == 1:
                assert result.prompt is not None
                result.before = result.prompt.tolist()
                result.candidates = []
                for written in decoded.candidate_ids[number]:
                    result.candidates.append({"images": written.tolist()})
            # Of a vote the candidates' mean.
            result.log_likelihood = float(likelihood.mean())
            result.nats = label_nats(model, result, candidates)
            # Without frames there is nothing to probe.
            if candidates.shape[1] > 1:
                if LAST_FRAME in self.config.probes:
                    result.probes[LAST_FRAME] = candidates[:, -2]
                if NATS in self.config.probes:
                    result.nats |= picture_nats(model, result, result.nats[REFERENCE])
                if GAIN in self.config.probes:
                    result.nats |= frame_gains(model, result, candidates[0], result.nats[REFERENCE])
        # These write new answers, which takes as long as the answers themselves.
        if subject.length > 2:
            for probe in FRAMES:
                if probe in self.config.probes:
                    self._write_after(probe, model, subject, group)

    def _write_after(self, probe: str, model: LoadedModel, subject: Subject, group: Sequence[EpisodeResult]) -> None:
        """Write the answers of one subject's episodes of one task after the frames of a probe.

        Args:
            probe: One of ``FRAMES``.
            model: The subject's.
            subject: With frames.
            group: With their chains and prompts.
        """
        episodes, rows = self._episodes(subject.name)
        prompts, asked, seeds = [], [], []
        for result in group:
            assert result.chain is not None
            assert result.prompt is not None
            row = rows[result.task, result.pair_id]
            frames = probe_frames(probe, result.chain, episodes.queries, row, self.config.seed)
            # Chain-of-Focus has no frames in the dataset: another pair's are not known.
            if frames is not None and len(frames) == len(result.chain) - 2:
                prompts.append(np.concatenate([result.prompt, frames.reshape(-1)]))
                asked.append(result)
                seeds.append(seed_of(self.config.seed, result.pair_id))
        if not asked:
            return
        sampling = self._sampling(subject, asked[0].task)
        decoded = model.decoder.decode(np.empty(0, np.uint16), np.stack(prompts), 1, sampling, seeds)
        for number, result in enumerate(asked):
            candidates, _ = answer_candidates(decoded, number, sampling)
            result.probes[f"after_{probe}"] = candidates[:, 0]

    def _sampling(self, subject: Subject, task: str) -> SamplingConfig:
        sampling = self.config.sampling_of(subject.votes, has_adapter=subject.adapter is not None)
        return sampling.for_labels(continuous=TASKS[task].continuous)

    def _load_episodes(self, name: str) -> tuple[Episodes, dict[tuple[str, int], int]]:
        """Return the episodes of a subject, and which row of the queries each (task, pair) is."""
        subject = self.subjects[name]
        method, length, selection = str(subject.method), subject.length, self.config.selection
        if subject.method == SALIENCY:
            # Its frame is a map that the runner computes: of the dataset it needs the two ends only.
            method, selection = "none", "focus"
        if method == "none":
            length = 2
        queries, examples = self._chains(method, length)
        episodes = Episodes(queries, examples, subject.pairs or 0, selection, self.config.seed, self.tokenizer.codebook)
        # Which row a query is: pair ids are unique in a task only.
        tasks = np.repeat(np.array(queries.tasks, object), np.diff(queries.starts))
        keys = zip(tasks, queries.pair_ids.tolist(), strict=True)
        return episodes, {key: row for row, key in enumerate(keys)}

    def _load_chains(self, method: str, length: int) -> tuple[Chains, Chains]:
        """Return the chains of the queries' split and of the examples' split."""
        # Which examples stand before a query is chosen later, so that no pairs are asked for here.
        sentences = SentencesConfig.model_validate(
            {"method": method, "lengths": (length,), "pairs": (0,), "tasks": self.config.tasks}
        )
        queries = Chains.load(self.dataset, sentences, self.config.split)
        return queries, Chains.load(self.dataset, sentences, self.config.example_split)

    def _with_frames(self, subject: Subject, chains: Chains, rows: NDArray[np.int64]) -> Tokens:
        """Return the chains of ``rows``, uint16 [rows, length, tokens]; Chain-of-Focus has its map in the middle."""
        tokens: Tokens = chains.tokens[rows]
        if subject.method != SALIENCY or not len(rows):
            return tokens
        maps = [saliency(picture) for picture in self.tokenizer.decode(tokens[:, 0])]
        return np.stack([tokens[:, 0], self.tokenizer.encode(np.stack(maps)), tokens[:, 1]], axis=1)

    def _load_model(self, name: str) -> LoadedModel:
        subject = self.subjects[name]
        assert subject.backbone is not None
        facts = backbone_facts(subject.backbone)
        # Nodes of a cluster may have other files under the same path: the scores would be of two models.
        if facts.fingerprint != subject.fingerprint:
            raise DatasetError(
                f"{name}: this node's backbone is {facts.fingerprint[:12]}, not {subject.fingerprint[:12]}; give every "
                "node the same weights"
            )
        adapter = None
        if subject.adapter is not None:
            adapter = read_run_adapter(subject.adapter)
        source = ModelSource(facts, subject.backbone, adapter, self.config.seed)
        return LoadedModel.load(source, self.config.engine, self.tokenizer, self.config.batch)

    # --- pictures and scores ---

    def _score(self, results: Sequence[EpisodeResult]) -> None:
        """Fill in ``values`` and ``counts`` of the results, or ``error``."""
        answers = self._answers(results)
        # All reference frames are decoded together, and all answers to probes: the tokenizer computes whole batches.
        chains = {}
        for episode, (asked, pictures) in answers.items():
            if asked.result.chain is not None and pictures.frames:
                chains[episode] = asked.result.chain[:-1]
        all_asked = [asked for asked, _ in answers.values()]
        probes = self._probe_answers(all_asked)
        references = dict(zip(chains, self._decode_each(list(chains.values())), strict=True))
        for episode, (asked, pictures) in answers.items():
            result = asked.result
            lpips = None
            if min(asked.label.shape[:2]) >= LEAST_PX:  # the network has nothing left of a smaller picture
                lpips = self._lpips
            scored = score(result.task, pictures.answer, asked.label, asked.meta, lpips)
            added = added_values(result.task, self.config.metrics, pictures.answer, asked.label, asked.meta)
            # Of one name the task's own score counts, before what the configuration adds.
            values = added | dict(scored.values) | result.nats
            # An answer to a probe is compared by the task's first metric alone.
            primary = TASKS[result.task].metrics[0].name
            for metric, answer in probes[episode].items():
                values[metric] = score(result.task, answer, asked.label, asked.meta).values.get(primary)
            if episode in references:
                values |= candidate_figures(references[episode], pictures.written)
            result.values = []
            for metric, value in values.items():
                result.values.append({"metric": metric, "value": value})
            if scored.counts is not None:
                result.counts = scored.counts.tolist()
        self._score_candidates(all_asked)

    def _score_candidates(self, asked: Sequence[Asked]) -> None:
        """Fill in the primary score of every candidate that is kept with its tokens."""
        with_candidates, tokens = [], []
        for each in asked:
            candidates = each.result.candidates
            if candidates is not None:
                with_candidates.append(each)
                answers = [candidate["images"][-1] for candidate in candidates]
                tokens.append(np.array(answers, np.uint16))
        for each, pictures in zip(with_candidates, self._decode_each(tokens), strict=True):
            task = each.result.task
            height_px, width_px = each.label.shape[:2]
            primary = TASKS[task].metrics[0].name
            assert each.result.candidates is not None
            for candidate, picture in zip(each.result.candidates, pictures, strict=True):
                # A score needs the label's size; what was written has the tokenizer's.
                answer = resize(picture, height_px, width_px, TASKS[task].resample)
                candidate["score"] = score(task, answer, each.label, each.meta).values.get(primary)

    def _probe_answers(self, asked: Sequence[Asked]) -> dict[int, dict[str, Picture]]:
        """Return the answers to probes at the labels' sizes, by episode and metric."""
        # All are decoded together, as the tokenizer computes whole batches, and then dealt out in the same order.
        tokens: list[Tokens] = []
        for each in asked:
            tokens += each.result.probes.values()
        decoded = iter(self._decode_each(tokens))
        answers: dict[int, dict[str, Picture]] = {}
        for each in asked:
            height_px, width_px = each.label.shape[:2]
            task = each.result.task
            answers[each.result.episode] = {}
            for metric in each.result.probes:
                answer = join_answers(task, list(next(decoded)), each.meta)
                answers[each.result.episode][metric] = resize(answer, height_px, width_px, TASKS[task].resample)
        return answers

    def _answers(self, results: Sequence[EpisodeResult]) -> dict[int, tuple[Asked, AnswerPictures]]:
        """Return what is asked and answered in every episode, by its number; where that fails, set ``error``.

        The tokenizer computes whole batches of a fixed size, however few pictures it is given. So all pictures are
        decoded together, before they are looked at one by one.
        """
        asked = []
        # Reading a label can fail for one pair only: the others are decoded without it.
        for result in results:
            try:
                pair = self._queries.read([result.pair_id])[0]
                asked.append(Asked(result, self._queries.picture(pair, "label", self.fit), read_meta(pair["meta"])))
            except PairError as error:
                result.error = str(error)

        written = self._written(asked)
        ceilings = self._ceilings(asked)
        answers = {}
        for each in asked:
            episode = each.result.episode
            try:
                # A model's answer, the ceiling's, or one without a model: a subject has exactly one of them.
                if episode in written:
                    answer = join_answers(each.result.task, list(written[episode][:, -1]), each.meta)
                elif episode in ceilings:
                    answer = ceilings[episode]
                else:
                    answer = self._answer_without_model(each)
            except PairError as error:
                each.result.error = str(error)
                continue
            height_px, width_px = each.label.shape[:2]
            resample = TASKS[each.result.task].resample
            if self.subjects[each.result.subject].baseline == "copy":
                resample = "bicubic"  # the answer is an image, not a label
            resized = resize(answer, height_px, width_px, resample)
            answers[episode] = each, AnswerPictures(resized, written.get(episode, NOTHING_WRITTEN))
        return answers

    def _written(self, asked: Sequence[Asked]) -> dict[int, NDArray[np.uint8]]:
        """Return what models wrote, [candidates, images, s, s, 3], by episode; other subjects are left out."""
        tokens, images = {}, {}
        for each in asked:  # an episode may be there twice: the best of a task may be its median, too
            length = self.subjects[each.result.subject].length
            if each.result.images is not None and length is not None:
                tokens[each.result.episode] = np.asarray(each.result.images, np.uint16)
                images[each.result.episode] = length - 1
        written = {}
        for episode, pictures in zip(tokens, self._decode_each(list(tokens.values())), strict=True):
            written[episode] = pictures.reshape(-1, images[episode], *pictures.shape[1:])
        return written

    def _ceilings(self, asked: Sequence[Asked]) -> dict[int, Picture]:
        """Return labels after the tokenizer, [s, s, 3], by episode of the subject whose answer they are."""
        labels = {}
        for each in asked:
            if self.subjects[each.result.subject].baseline == "ceiling":
                resample = TASKS[each.result.task].resample
                labels[each.result.episode] = square(each.label, self.tokenizer.size_px, self.fit, resample)
        if not labels:
            return {}
        # To tokens and back: what is lost here no answer in tokens can have.
        through = self.tokenizer.decode(self.tokenizer.encode(np.stack(list(labels.values()))))
        return dict(zip(labels, through, strict=True))

    def _decode_each(self, tokens: Sequence[Tokens]) -> list[NDArray[np.uint8]]:
        """Return the pictures [n, s, s, 3] of each of ``tokens`` [n, tokens], decoded all in one go."""
        if not tokens:
            return []
        ends = np.cumsum([len(each) for each in tokens])
        return np.split(self.tokenizer.decode(np.concatenate(tokens)), ends[:-1])

    def _answer_without_model(self, asked: Asked) -> Picture:
        """Return the query itself, the mean label or the nearest label."""
        result = asked.result
        baseline = self.subjects[result.subject].baseline
        if baseline == "mean":
            return self._labels.mean(result.task, result.pair_id, asked.meta)
        image = self._queries.picture(self._queries.read([result.pair_id])[0], "image", self.fit)
        if baseline == "copy":
            return image
        return self._labels.nearest(result.task, result.pair_id, image)
