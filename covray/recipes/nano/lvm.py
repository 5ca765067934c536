"""Recipe of the nano LVM: a LLaMA pre-trained on plain visual sentences, as LVM was, without any chains.

Sentences are pairs of one task, views of a few scenes, or single pictures. Most are short: attention over the whole
context of 16 pictures costs more than it teaches, and in use the model answers after one or two examples. LoRA teaches
chains later; the pre-training teaches pictures, pairs and tasks.

A picture is 256 tokens, which makes training expensive. So most pairs are seen at a quarter of the positions: the model
first reads and writes patches of four tokens, then single tokens (``patch_loss``; Shao et al. 2024, "Patch-Level
Training for Large Language Models", arXiv:2407.12665). A token of the stage of patches costs 4.3 times less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covray.config import BackboneConfig, EngineConfig, TokenizerConfig
from covray.errors import ConfigError
from covray.io.tensor_files import new_folder
from covray.models.lvm.backbone import BackboneFacts, backbone_facts, load_backbone, write_backbone
from covray.models.lvm.model import Batch, Lvm, rotary
from covray.models.lvm.scales import SPECIAL_IDS, llama_config
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer
from covray.recipes.nano.data import CROPS, KINDS, VIEWS, views, whole_file
from covray.recipes.nano.loop import Run, muon_and_adamw, train
from covray.recipes.nano.patches import patch_tokens

TASK_PICTURES = {
    "segmentation": ("colour", "segmentation"), "pose": ("colour", "pose"), "colorization": ("grey", "colour"),
    "normals": ("colour", "normals"), "edges": ("colour", "edges"), "depth": ("colour", "depth"),
    "low_light": ("dark", "colour"),
}  # fmt: skip
"""Image and label of every task, by kind of picture."""
DRAWN = (*TASK_PICTURES, "pose", "pose", "depth")
"""Tasks that a sentence of pairs draws from: poses and depths, which are learned slowest, are drawn more often."""
DRAWN_FOURTH = (*TASK_PICTURES, "edges", "depth", "low_light")
DRAWN_FIFTH = (*TASK_PICTURES, "pose", "normals", "edges", "depth", "low_light")
DRAWN_SIXTH = (*TASK_PICTURES, "segmentation", "pose", "normals", "edges")
"""The same in later stages: tasks whose answers were worst after the stage before are drawn more often."""
PICTURES = 16
"""Pictures that fit in the context."""
PAIRS_OF_A_STEP = (2, 2, 2, 2, 3, 3, 4, 8)
"""Pairs of a sentence: each step draws one of these, so that its sentences are equally long."""
BATCH_TOKENS = 6144
"""Tokens of a step, at most; a step has at least one sentence."""
PAIRS_SHARE, VIEWS_SHARE = 0.9, 0.05
IMAGES_LOSS = 0.25
"""Share of the tokens of images that carry loss; all of a label's do. Most tokens of an image cannot be predicted, and
so small a model does better to learn labels, which follow from what it sees."""
HEADS = 2
"""Heads of 128, as wide as those of LLaMA. On a CPU attention costs more with more heads, as its softmax does:
with two a step is 1.3 times as fast as with four of 64."""
MUON_RATE, ADAMW_RATE = 4e-3, 3e-3
VIEW_SCENES = 1500
KERNEL_DIMENSIONS = 8
"""Distances between codes are scaled to those of vectors of this many dimensions, however many the codebook has."""


@dataclass(frozen=True)
class Stage:
    """A part of the training with optimizers of its own, which ends at a low learning rate.

    Its weights are saved, and the next stage starts from them.
    """

    steps: int
    patch: int
    """Tokens that are read and written as one position; 1 is the model as it is used."""
    rate: float
    """Highest learning rate, as a share of ``MUON_RATE`` and ``ADAMW_RATE``."""
    noisy: float = 0.0
    """Share of labels in which the model reads tokens of other labels among the true ones.

    The next token of a label can be predicted from the label's last tokens, and from the query. A model that always
    reads true tokens relies on them, and then continues its own mistakes; one that cannot trust them learns to read the
    query."""
    own: float = 0.0
    """Share of labels that the model reads as it would write them: its likeliest tokens, each predicted from the tokens
    before it as ``noisy`` left them (two passes; Mihaylova & Martins 2019, "Scheduled Sampling for Transformers",
    arXiv:1906.07651). Its own mistakes agree with one another; tokens of other labels do not."""
    drawn: tuple[str, ...] = DRAWN
    """Tasks that a sentence of pairs draws from."""


STAGES = (
    Stage(2000, 4, 1.0), Stage(900, 1, 0.7), Stage(1200, 1, 0.7, noisy=0.5),
    Stage(1700, 1, 0.7, noisy=0.7, drawn=DRAWN_FOURTH),
    Stage(1700, 1, 0.7, noisy=0.7, own=0.5, drawn=DRAWN_FIFTH),
    Stage(1600, 1, 0.7, noisy=0.7, own=0.5, drawn=DRAWN_SIXTH),
)  # fmt: skip
AVERAGED = 3
"""Stages, the last ones, whose mean weights are the LVM. By chance and by what it draws, a stage is good at other tasks
than the stage before; their mean is about as good in each task as the best of them (Izmailov et al. 2018, "Averaging
Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407)."""


@dataclass(frozen=True)
class Sentence:
    """Pictures one after another, as tokens; each field is [pictures * tokens]."""

    ids: Tensor
    """The true tokens, int64."""
    read: Tensor
    """The tokens that the model reads, int64; in labels with noise they differ from ``ids``."""
    own: Tensor
    """Where the model reads its own likeliest tokens instead, bool; whole labels."""
    counts: Tensor
    """Where ``ids`` carry loss, bool."""


@dataclass(frozen=True)
class Corpus:
    """The pictures that sentences are drawn from, as tokens; uint16, the last axis one picture."""

    scenes: Tensor
    """[scenes, 8 kinds, tokens]."""
    photographs: Tensor
    """[crops, 3 kinds (colour, grey, dark), tokens]."""
    views: Tensor
    """[scenes, 4 views, tokens]."""

    def sentence(self, pairs: int, stage: Stage, generator: torch.Generator) -> Sentence:
        """Draw a sentence of ``pairs`` pairs of pictures for a stage."""
        kind = float(torch.rand((), generator=generator))
        length = 2 * pairs
        noise = None
        if kind < PAIRS_SHARE:
            task = stage.drawn[self._draw(len(stage.drawn), 1, generator)[0]]
            pictures = self.pairs(task, pairs, generator)
            if stage.noisy:
                noise = self.pairs(task, pairs, generator)[1::2]
        elif kind < PAIRS_SHARE + VIEWS_SHARE:
            scenes = self._draw(len(self.views), -(-length // VIEWS), generator)
            pictures = self.views[scenes].flatten(0, 1)[:length]
        else:
            pictures = self.scenes.flatten(0, 1)[self._draw(self.scenes[..., 0].numel(), length, generator)]
        counts = torch.rand(pictures.shape, generator=generator) < IMAGES_LOSS
        if kind < PAIRS_SHARE:
            counts[1::2] = True
        read = pictures
        if noise is not None:
            read = pictures.clone()
            read[1::2] = self._mixed(pictures[1::2], noise, stage.noisy, generator)
        own = torch.zeros(pictures.shape, dtype=torch.bool)
        if kind < PAIRS_SHARE and stage.own:
            own[1::2] = torch.rand(pairs, 1, generator=generator) < stage.own
        return Sentence(pictures.flatten().long(), read.flatten().long(), own.flatten(), counts.flatten())

    def pairs(self, task: str, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` pairs of ``task``, [2 * count, tokens].

        Two in five draws are of photographs where these have the task's pictures.
        """
        image, label = (KINDS.index(kind) for kind in TASK_PICTURES[task])
        of_photographs = len(self.photographs) > 0 and max(image, label) < 3
        photographs = of_photographs and float(torch.rand((), generator=generator)) < 0.4
        source = self.photographs if photographs else self.scenes
        chosen = source[self._draw(len(source), count, generator)]
        return torch.stack((chosen[:, image], chosen[:, label]), 1).flatten(0, 1)

    @staticmethod
    def _mixed(labels: Tensor, noise: Tensor, noisy: float, generator: torch.Generator) -> Tensor:
        """Return ``labels`` [n, tokens], the share ``noisy`` of them with an even share of tokens of ``noise``."""
        shares = torch.rand(len(labels), 1, generator=generator)
        shares = shares * (torch.rand(len(labels), 1, generator=generator) < noisy)
        return torch.where(torch.rand(labels.shape, generator=generator) < shares, noise, labels)

    @staticmethod
    def _draw(population: int, count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(population, (count,), generator=generator).tolist()


def train_lvm(
    pictures: Tensor, validation: Tensor, out: Path, steps: int | None, seed: int, device: torch.device
) -> None:
    """Train the LVM on the tokens of uint8 ``pictures`` (``covray.recipes.nano.data.pictures``) and save ``out``/lvm.

    Needs the VQGAN of ``train_vqgan`` in ``out``/vqgan. The loss is next-token cross-entropy. Muon (Jordan et al. 2024)
    trains the matrices, as it learns more a step than AdamW does; AdamW trains the rest. Every stage of ``STAGES`` is
    saved as ``out``/lvm-<number>; a stage whose folder exists is not trained again. What is saved as ``out``/lvm is the
    mean of the last ``AVERAGED``.

    Args:
        pictures: uint8 [scenes * 8 + CROPS * 3, 64, 64, 3].
        validation: Pictures of ``scene_pictures``, uint8 [n, 64, 64, 3], whose answers are measured at every save.
        out: Folder of the family.
        steps: Optimizer steps of every stage, in place of its own.
        seed: Seed of weights and batches.
        device: Where to train.

    Raises:
        ConfigError: A stage that is there was trained on the codes of another VQGAN.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(out / "vqgan")), EngineConfig())
    for number in range(1, len(STAGES) + 1):
        _require_codebook(out / f"lvm-{number}", tokenizer)
    corpus = _corpus(pictures, tokenizer, out, seed)
    validation_corpus = scenes_alone(_tokens(validation, tokenizer, _tokens_path(out, "held-out", seed)))
    size = tokenizer.tokens_per_image

    def measure(model: Any) -> str:
        perplexities = answer_perplexity(model, validation_corpus, 2, 4, device)
        return "held-out answer perplexity " + ", ".join(f"{task} {value:.1f}" for task, value in perplexities.items())

    model = new_lvm(seed, PICTURES * size, tokenizer.codebook)
    folders = []
    for number, stage in enumerate(STAGES, 1):
        ended = out / f"lvm-{number}"
        if not ended.is_dir():
            run = Run(f"lvm-{number}", out, steps or stage.steps, seed + number, device, ADAMW_RATE)
            model = train(
                model, _loss(corpus, size, stage, device), run, measure=measure,
                optimizers=partial(_optimizers, rate=stage.rate),
            )  # fmt: skip
            save_lvm(model, ended, tokenizer.codebook_fingerprint, size)
        # Read back, rounded to float16: after a kill the next stage starts from the folder, too.
        model = _load(ended, device).requires_grad_(True)
        folders.append(ended)
    save_lvm(_mean(folders[-AVERAGED:], device), out / "lvm", tokenizer.codebook_fingerprint, size)


def _require_codebook(stage: Path, tokenizer: Tokenizer) -> None:
    """Refuse the folder of a stage, if there is one, whose tokens mean other patches. Raises ConfigError."""
    if not stage.is_dir():
        return
    codebook = backbone_facts(BackboneConfig(scale="custom", path=str(stage))).codebook
    if codebook != tokenizer.codebook_fingerprint:
        raise ConfigError(
            f"{stage}: was trained on the codes of another vqgan than the one in {stage.parent}; delete it and its "
            f"{stage.name}.state.pt to train it again, or give another --out"
        )


@torch.no_grad()
def _mean(folders: Sequence[Path], device: torch.device) -> Lvm:
    """Return the LVM whose weights are the mean of those of ``folders``."""
    first, *others = [_load(folder, device) for folder in folders]
    for model in others:
        for total, weight in zip(first.parameters(), model.parameters(), strict=True):
            total.add_(weight)
    for total in first.parameters():
        total.div_(len(folders))
    return first


def _loss(
    corpus: Corpus, size: int, stage: Stage, device: torch.device
) -> Callable[[Any, int, torch.Generator], Tensor]:
    """Return what computes the loss of a step on sentences of ``corpus``, whose pictures are ``size`` tokens."""

    def loss_of(model: Any, step: int, generator: torch.Generator) -> Tensor:
        pairs = PAIRS_OF_A_STEP[int(torch.randint(len(PAIRS_OF_A_STEP), (), generator=generator))]
        number = max(1, BATCH_TOKENS // (2 * pairs * size))
        sentences = [corpus.sentence(pairs, stage, generator) for _ in range(number)]
        counts = torch.stack([sentence.counts for sentence in sentences])
        batch = _batch([sentence.read for sentence in sentences], counts)
        batch = replace(batch, target_ids=torch.cat([sentence.ids for sentence in sentences])).to(device)
        if stage.own:
            own = torch.cat([sentence.own for sentence in sentences]).to(device)
            batch = replace(batch, ids=torch.where(own, written(model, batch), batch.ids))
        total, each = model(batch) if stage.patch == 1 else patch_loss(model, batch, stage.patch)
        return total / len(each)

    return loss_of


def written(model: Lvm, batch: Batch) -> Tensor:
    """Return the likeliest token of ``model`` at every place of ``batch``, given the tokens that it reads, int64 [T].

    The first token of the batch is left as it is: it has none before it to be predicted from.
    """
    with torch.no_grad():
        likeliest = model.logits(batch.ids, batch.lengths).argmax(-1)
    return torch.cat((batch.ids[:1], likeliest[:-1]))


def patch_loss(model: Lvm, batch: Batch, patch: int) -> tuple[Tensor, Tensor]:
    """Return the negative log likelihood of the tokens of patches, each predicted from the patches before its own.

    A patch is embedded as the mean of its tokens, and all its tokens are predicted with the one head from the state of
    the patch before (Shao et al. 2024, section 2). A patch stands at the position of its first token, so that the
    distance from a place of a label to the same place of its image is the same with patches and with tokens.

    Args:
        model: The model, untouched by whether it reads tokens or patches.
        batch: Sentences whose lengths ``patch`` divides.
        patch: Tokens of a patch.

    Returns:
        As ``Lvm.forward``: the sum in nats, and each token's; those of a sentence's first patch carry no loss.
    """
    x = model.embed(batch.ids).unflatten(0, (-1, patch)).mean(1)  # [T / patch, width]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    lengths = tuple(length // patch for length in batch.lengths)
    cosine, sine = rotary(model.config, batch.lengths, x.device, x.dtype)
    rotation = cosine[::patch].contiguous(), sine[::patch].contiguous()
    for layer in model.layers:
        x = layer(x, rotation, lengths)
    first = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # patches with nothing before them
    first[torch.tensor((0, *lengths[:-1]), device=x.device).cumsum(0)] = True
    predicted = batch.positions + 1
    predicted = predicted[~first[predicted // patch]]
    targets = batch.ids if batch.target_ids is None else batch.target_ids
    total, each = model.head(model.norm(x)[predicted // patch - 1], targets[predicted])
    return total, each


def new_lvm(seed: int, context: int, codebook: NDArray[np.float32]) -> Lvm:
    """Return an untrained nano LVM.

    Weights are normal with a deviation of 0.02; those that write to the residual stream are smaller (GPT-2). Embedding
    and head of the codes are ``_code_features`` instead of noise, so that the model does not have to learn which codes
    look alike: one minute of training on patches reached the loss that noise reached after two and a half.

    Args:
        seed: Seed of the weights.
        context: Tokens of the longest sentence.
        codebook: The vector of every code, [codes, dimensions].
    """
    generator = torch.Generator().manual_seed(seed)
    config = llama_config("nano")
    config.max_position_embeddings = context
    config.num_attention_heads = config.num_key_value_heads = HEADS
    config.head_dim = config.hidden_size // HEADS
    model = Lvm(config)
    depth = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                scale = depth if name.endswith(("out.weight", "down.weight")) else 1.0
                parameter.normal_(0.0, 0.02 * scale, generator=generator)
        features = 0.02 * _code_features(torch.from_numpy(codebook.copy()), config.hidden_size, generator)
        model.embed.weight[: len(features)] = features
        model.head.weight[: len(features)] = features
    return model


def _code_features(codebook: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Return features of every code, [codes, width], whose products are large between codes that look alike.

    Random Fourier features (Rahimi & Recht 2007) of a Gaussian kernel whose width is the codebook's standard deviation
    over ``KERNEL_DIMENSIONS`` dimensions; mean 0 and deviation 1.
    """
    dimensions = codebook.shape[1]
    points = (codebook - codebook.mean(0)) / codebook.std() * (KERNEL_DIMENSIONS / dimensions) ** 0.5
    frequencies = torch.randn(dimensions, width, generator=generator)
    phases = 2 * torch.pi * torch.rand(width, generator=generator)
    features = torch.cos(points @ frequencies + phases)
    features = features - features.mean(0)
    return features / features.std()


def measure_lvm(root: Path, held_out: NDArray[np.uint8], training: NDArray[np.uint8]) -> dict[str, dict[str, float]]:
    """Return the perplexity of answers by task: of the LVM after seven examples, and of guesses without a model.

    Args:
        root: Folder of the family.
        held_out: Pictures of ``scene_pictures`` to answer, uint8 [n, 64, 64, 3].
        training: Pictures that ``baselines`` are fitted on, of the same shape.

    Raises:
        WeightsError: A model of the family is missing or incomplete.
    """
    tokenizer = load_tokenizer(TokenizerConfig(path=str(root / "vqgan")), EngineConfig())
    seen, unseen = (scenes_alone(torch.from_numpy(tokenizer.encode(part))) for part in (training, held_out))
    device = torch.device("cpu")
    model = _load(root / "lvm", device)
    return {
        "lvm": answer_perplexity(model, unseen, PICTURES // 2, 32, device),
        "lvm, seen": answer_perplexity(model, seen, PICTURES // 2, 32, device),
        **baselines(seen, unseen),
    }


def answer_perplexity(model: Lvm, corpus: Corpus, pairs: int, sentences: int, device: torch.device) -> dict[str, float]:
    """Return the perplexity by task of the last pair's label, given the pairs before and its image: exp(mean NLL).

    Args:
        model: The LVM.
        corpus: The scenes that pairs are drawn from.
        pairs: Pairs of a sentence, the last of which is answered.
        sentences: Sentences a task.
        device: Where the model is.
    """
    perplexities = {}
    for task in TASK_PICTURES:
        generator = torch.Generator().manual_seed(0)
        pictures = [corpus.pairs(task, pairs, generator).reshape(-1).long() for _ in range(sentences)]
        answer = torch.zeros(sentences, len(pictures[0]), dtype=torch.bool)
        answer[:, -corpus.scenes.shape[-1] :] = True
        batch = _batch(pictures, answer)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            _, each = model(batch.to(device))
        perplexities[task] = float(each.mean().exp())
    return perplexities


def baselines(training: Corpus, held_out: Corpus) -> dict[str, dict[str, float]]:
    """Return the perplexity of the labels' tokens by task, for guesses without a network, fitted on ``training``.

    ``unigram``: how often a code occurs in labels of the task (one added to each count). ``copy``: the query's token at
    the same place with probability c, else the unigram; c is what fits best.
    """
    perplexities: dict[str, dict[str, float]] = {"unigram": {}, "copy": {}}
    codes = llama_config("nano").vocab_size - SPECIAL_IDS
    for task, kinds in TASK_PICTURES.items():
        image, label = (KINDS.index(kind) for kind in kinds)
        (seen_image, seen), (query, answer) = (
            (corpus.scenes[:, image].flatten().long(), corpus.scenes[:, label].flatten().long())
            for corpus in (training, held_out)
        )
        counts = torch.bincount(seen, minlength=codes).double() + 1
        unigram = counts / counts.sum()
        copying = torch.linspace(0, 0.99, 100).double()[:, None]

        def nats(image: Tensor, label: Tensor, copying: Tensor, unigram: Tensor = unigram) -> Tensor:
            return -(copying * (image == label) + (1 - copying) * unigram[label]).log().mean(-1)

        best = copying[nats(seen_image, seen, copying).argmin()]
        perplexities["unigram"][task] = float(nats(query, answer, torch.zeros(1)).exp())
        perplexities["copy"][task] = float(nats(query, answer, best).exp())
    return perplexities


def scenes_alone(tokens: Tensor) -> Corpus:
    """Return tokens [n * 8 kinds, tokens] of ``scene_pictures`` as a corpus without photographs and views."""
    size = tokens.shape[-1]
    return Corpus(
        tokens.reshape(-1, len(KINDS), size), tokens[:0].reshape(0, 3, size), tokens[:0].reshape(0, VIEWS, size)
    )


def save_lvm(model: Lvm, folder: Path, codebook: str, tokens_per_image: int) -> None:
    """Write ``model`` as a Hugging Face folder in float16, with ``covray.json``: whose codes its ids are."""
    codes = model.config.vocab_size - SPECIAL_IDS
    facts = BackboneFacts(model.config, None, "", codes, codebook, tokens_per_image)
    # Whole or not at all: a stage whose folder is there is not trained again.
    with new_folder(folder) as draft:
        write_backbone(draft, facts, model.backbone_tensors().__getitem__, torch.float16)


def _batch(sentences: Sequence[Tensor], counts: Tensor) -> Batch:
    """Return sentences of one length as a batch, with loss on the tokens of ``counts``, bool [sentences, length]."""
    counts = counts.clone()
    counts[:, 0] = False  # there is nothing to predict the first token from
    # A token is predicted at the position before its own.
    places = counts.flatten().nonzero()[:, 0] - 1
    return Batch(torch.cat(tuple(sentences)), (counts.shape[1],) * len(sentences), places)


def _load(folder: Path, device: torch.device) -> Lvm:
    """Return the LVM of a folder that ``save_lvm`` wrote, in float32."""
    config = BackboneConfig(scale="custom", path=str(folder))
    return load_backbone(backbone_facts(config), config, None, dtype=torch.float32, device=device, seed=0)


def _optimizers(model: Lvm, rate: float) -> list[torch.optim.Optimizer]:
    return muon_and_adamw(model, model.layers, rate * MUON_RATE, rate * ADAMW_RATE)


def _corpus(pictures: Tensor, tokenizer: Tokenizer, out: Path, seed: int) -> Corpus:
    tokens = _tokens(pictures, tokenizer, _tokens_path(out, "train", seed))
    size = tokens.shape[-1]
    scenes, photographs = tokens[: -3 * CROPS], tokens[-3 * CROPS :]
    shots = torch.from_numpy(views(out / "data", VIEW_SCENES, seed))
    return Corpus(
        scenes.reshape(-1, len(KINDS), size),
        photographs.reshape(-1, 3, size),
        _tokens(shots, tokenizer, _tokens_path(out, "views", seed)).reshape(-1, VIEWS, size),
    )


def _tokens_path(out: Path, name: str, seed: int) -> Path:
    """Return how the file of the tokens of the pictures ``name`` of a seed begins."""
    # Seed 0 is not named: files of begun trainings, nearly all of that seed, are still found.
    return out / "data" / (f"{name}-{seed}" if seed else name)


def _tokens(pictures: Tensor, tokenizer: Tokenizer, path: Path) -> Tensor:
    """Return the tokens of ``pictures``, uint16 [n, tokens], kept in a file beside ``path`` for a resumed training."""
    kept = path.with_name(f"{path.name}-tokens-{len(pictures)}-{tokenizer.codebook_fingerprint[:12]}.npy")
    if not kept.exists():
        with whole_file(kept) as aside:
            np.save(aside, patch_tokens(pictures.numpy(), tokenizer.codebook))
    return torch.from_numpy(np.load(kept))
