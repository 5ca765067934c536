"""The recipe of the nano LVM: what its sentences hold, what it writes, and the guesses it is compared with."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from covray.config import BackboneConfig
from covray.errors import ConfigError
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.model import Batch
from covray.models.lvm.scales import SPECIAL_IDS
from covray.recipes.nano import autoencoders, lvm
from covray.recipes.nano.data import KINDS

CPU = torch.device("cpu")
TOKENS = 4
QUIET, NOISY = lvm.Stage(1, 1, 1.0), lvm.Stage(1, 1, 1.0, noisy=0.5)
CODEBOOK = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)


@pytest.fixture
def corpus() -> lvm.Corpus:
    """Every token says where it is from: source * 10000 + scene * 10 + kind or view."""

    def tokens(source: int, scenes: int, kinds: int) -> torch.Tensor:
        names = source * 10_000 + 10 * torch.arange(scenes)[:, None] + torch.arange(kinds)
        return names[..., None].expand(-1, -1, TOKENS).to(torch.uint16)

    return lvm.Corpus(tokens(0, 30, len(KINDS)), tokens(1, 30, 3), tokens(2, 30, lvm.VIEWS))


def _pictures(sentence: torch.Tensor) -> list[tuple[int, int, int]]:
    """(source, scene, kind or view) of every picture of a sentence."""
    rows = sentence.reshape(lvm.PICTURES, TOKENS)
    assert (rows == rows[:, :1]).all()
    return [(name // 10_000, name % 10_000 // 10, name % 10) for name in rows[:, 0].tolist()]


def test_a_sentence_is_pairs_of_one_task_or_views_or_single_pictures(corpus: lvm.Corpus) -> None:
    tasks = {tuple(KINDS.index(kind) for kind in kinds) for kinds in lvm.TASK_PICTURES.values()}
    kinds_of_sentences = {"pairs": 0, "views": 0, "single": 0}
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        sentence = corpus.sentence(8, QUIET, generator)
        again = corpus.sentence(8, QUIET, torch.Generator().manual_seed(seed))
        assert torch.equal(sentence.ids, again.ids)
        assert torch.equal(sentence.ids, sentence.read)
        assert torch.equal(sentence.counts, again.counts)
        pictures = _pictures(sentence.ids)
        share = sentence.counts.reshape(lvm.PICTURES, TOKENS).float().mean(1)
        pairs = list(zip(pictures[::2], pictures[1::2], strict=True))
        if pictures[0][0] == 2:
            kinds_of_sentences["views"] += 1
            for start in range(0, lvm.PICTURES, lvm.VIEWS):
                group = pictures[start : start + lvm.VIEWS]
                assert [view for _, _, view in group] == list(range(lvm.VIEWS))
                assert len({scene for _, scene, _ in group}) == 1
        elif all(first[:2] == second[:2] for first, second in pairs):
            kinds_of_sentences["pairs"] += 1
            assert (share[1::2] == 1).all()  # every token of a label counts, of images some do
            assert 0 < share[::2].mean() < 0.6
            found = {(first[2], second[2]) for first, second in pairs}
            assert len(found) == 1
            assert found <= tasks
        else:
            kinds_of_sentences["single"] += 1
    assert kinds_of_sentences["pairs"] > 200
    assert min(kinds_of_sentences.values()) > 10


def test_a_stage_draws_from_its_own_tasks(corpus: lvm.Corpus) -> None:
    stage = lvm.Stage(1, 1, 1.0, drawn=("depth",))
    found = set()
    for seed in range(50):
        sentence = corpus.sentence(8, stage, torch.Generator().manual_seed(seed))
        if sentence.counts.reshape(lvm.PICTURES, TOKENS)[1::2].all():
            found |= {kind for _, _, kind in _pictures(sentence.ids)}
    assert {KINDS[kind] for kind in found} == {"colour", "depth"}


def test_labels_read_as_the_model_writes_them_change_what_is_read_alone(corpus: lvm.Corpus) -> None:
    stage = lvm.Stage(1, 1, 1.0, own=0.5)
    shares = []
    for seed in range(200):
        sentence = corpus.sentence(8, stage, torch.Generator().manual_seed(seed))
        own = sentence.own.reshape(lvm.PICTURES, TOKENS)
        assert torch.equal(sentence.ids, sentence.read)
        assert (own == own[:, :1]).all()  # whole labels
        assert not own[::2].any()  # and no image
        shares.append(float(own[1::2].float().mean()))
    assert np.mean(shares) == pytest.approx(0.5 * lvm.PAIRS_SHARE, abs=0.05)


def test_the_loss_after_own_labels_teaches_what_the_label_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "BATCH_TOKENS", 1)
    codes = 64
    generator = torch.Generator().manual_seed(0)
    corpus = lvm.scenes_alone(torch.randint(0, codes, (20 * len(KINDS), 16), generator=generator).to(torch.uint16))
    model = lvm.new_lvm(0, 256, CODEBOOK)
    losses, gradients = [], []
    for own in (0.0, 1.0):
        loss_of = lvm._loss(corpus, 16, lvm.Stage(1, 1, 1.0, own=own, drawn=("depth",)), CPU)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, 0, torch.Generator().manual_seed(1))  # pairs
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(model.layers[0].down.weight.grad.norm())
    assert losses[0] != losses[1]  # another label was read
    assert losses[1] == pytest.approx(losses[0], rel=0.2)  # and the true one was asked for
    assert gradients[1] == pytest.approx(float(gradients[0]), rel=0.5)


def test_what_the_model_writes_is_its_likeliest_token_after_what_it_read() -> None:
    model = lvm.new_lvm(0, 256, CODEBOOK)
    ids = torch.randint(0, 64, (24,), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, (12, 12), torch.tensor([1]))
    own = lvm.written(model, batch)
    assert own[0] == ids[0]
    for place in (1, 7, 15):
        start = place // 12 * 12
        logits = model.logits(ids[start:place], (place - start,))
        assert own[place] == logits[-1].argmax()


def test_guesses_without_a_network() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(0, 8, (400, len(KINDS), 64), generator=generator)
    scenes[:, KINDS.index("depth")] = scenes[:, KINDS.index("colour")]  # a task solved by copying
    scenes[:, KINDS.index("pose")] = 5  # and one that is always the same
    tokens = scenes.to(torch.uint16)
    known, unknown = (lvm.scenes_alone(part.flatten(0, 1)) for part in (tokens[:200], tokens[200:]))
    found = lvm.baselines(known, unknown)
    assert found["unigram"]["edges"] == pytest.approx(8, rel=0.2)  # eight codes alike, and one added to 2,048
    assert found["unigram"]["pose"] == pytest.approx(1, abs=0.2)
    assert found["copy"]["depth"] == pytest.approx(1 / (0.99 + 0.01 / 8), rel=0.01)
    assert found["copy"]["edges"] == pytest.approx(found["unigram"]["edges"], rel=0.01)


@pytest.mark.parametrize("pairs", sorted(set(lvm.PAIRS_OF_A_STEP)))
def test_a_sentence_is_as_long_as_asked_whatever_it_is_of(corpus: lvm.Corpus, pairs: int) -> None:
    for seed in range(60):
        sentence = corpus.sentence(pairs, NOISY, torch.Generator().manual_seed(seed))
        assert sentence.ids.shape == sentence.read.shape == sentence.counts.shape == (2 * pairs * TOKENS,)


def test_noise_is_of_other_labels_and_touches_no_image(corpus: lvm.Corpus) -> None:
    shares = []
    for seed in range(200):
        sentence = corpus.sentence(8, NOISY, torch.Generator().manual_seed(seed))
        said, read = (ids.reshape(lvm.PICTURES, TOKENS) for ids in (sentence.ids, sentence.read))
        assert torch.equal(said[::2], read[::2])
        share = (said != read).float().mean(1)[1::2]
        of_pairs = bool(sentence.counts.reshape(lvm.PICTURES, TOKENS)[1::2].all())
        assert of_pairs or not share.any()
        if of_pairs:
            shares += share.tolist()
            assert (read[1::2] % 10 == said[1::2] % 10).all()  # the same kind of picture
    # Half of the labels have an even share of noise, of which one token in 30 is of the same scene after all.
    assert sum(shares) / len(shares) == pytest.approx(0.5 * 0.5 * 29 / 30, abs=0.03)
    assert shares.count(0) / len(shares) > 0.5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> LlamaConfig:
    """The architecture of the LVM in this test: 64 codes, one layer of 16."""
    config = LlamaConfig(
        vocab_size=64 + SPECIAL_IDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, rope_theta=1e4, bos_token_id=None, eos_token_id=None, pad_token_id=64,
    )  # fmt: skip
    monkeypatch.setattr(lvm, "llama_config", lambda scale: config)
    return config


def _sentences(lengths: tuple[int, ...], seed: int) -> Batch:
    """Random sentences, with loss on about half of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (sum(lengths),), generator=generator)
    counts = torch.rand(sum(lengths), generator=generator) < 0.5
    counts[torch.tensor((0, *lengths[:-1])).cumsum(0)] = False
    return Batch(ids, lengths, counts.nonzero()[:, 0] - 1)


def test_patches_of_one_token_are_tokens(small: LlamaConfig) -> None:
    model, batch = lvm.new_lvm(0, 64, CODEBOOK), _sentences((32, 16), 0)
    with torch.inference_mode():
        expected, each = model(batch)
        total, each_of_patch = lvm.patch_loss(model, batch, 1)
    assert torch.equal(total, expected)
    assert torch.equal(each, each_of_patch)


def test_a_patch_is_foretold_from_those_before_it_alone(small: LlamaConfig) -> None:
    model = lvm.new_lvm(0, 64, CODEBOOK)
    model.embed.weight.data.normal_()  # as untrained embeddings, all states are nearly alike
    batch = _sentences((32, 16), 1)
    with torch.inference_mode():
        _, before = lvm.patch_loss(model, batch, 4)
        # Tokens of the first patch of a sentence have nothing to be predicted from.
        patches = (batch.positions + 1) // 4
        predicted = batch.positions[(patches != 0) & (patches != 8)] + 1
        assert len(before) == len(predicted)
        changed = batch.ids.clone()
        changed[20:24] = (changed[20:24] + 1) % 64
        _, after = lvm.patch_loss(model, Batch(changed, batch.lengths, batch.positions), 4)
    same = before == after
    assert same[predicted < 20].all(), "what stands before the change"
    assert same[predicted >= 32].all(), "another sentence"
    assert not same[(predicted >= 24) & (predicted < 32)].any(), "what follows it in its sentence"


def test_a_stage_goes_on_from_the_weights_of_the_one_before(
    tmp_path: Path, small: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare_family(tmp_path, monkeypatch)
    pictures = _random_pictures()
    lvm.train_lvm(pictures, pictures[:8], tmp_path, 2, 0, CPU)
    folders = [tmp_path / name for name in ("lvm-1", "lvm-2", "lvm")]
    first, second, last = ((folder / "model.safetensors").read_bytes() for folder in folders)
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for name, of_last in weights[2].items():
        assert torch.equal(of_last, ((weights[0][name].float() + weights[1][name].float()) / 2).half())
    assert not torch.equal(weights[0]["lm_head.weight"], weights[1]["lm_head.weight"])
    for folder in folders[1:]:
        shutil.rmtree(folder)
    (tmp_path / "lvm-1.state.pt").unlink()  # what is kept of a stage is its weights
    (tmp_path / "lvm-2.state.pt").unlink()
    lvm.train_lvm(pictures, pictures[:8], tmp_path, 2, 0, CPU)
    again = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert again == [first, second, last]


def test_a_stage_of_another_codebook_is_not_gone_on_from(
    tmp_path: Path, small: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare_family(tmp_path, monkeypatch)
    lvm.save_lvm(lvm.new_lvm(0, 64, CODEBOOK), tmp_path / "lvm-2", "0" * 64, 256)
    monkeypatch.setattr(lvm, "_corpus", lambda *_: pytest.fail("pictures were tokenized"))
    pictures = _random_pictures()
    with pytest.raises(ConfigError, match=r"lvm-2: was trained on the codes of another vqgan"):
        lvm.train_lvm(pictures, pictures[:8], tmp_path, 2, 0, CPU)


def test_another_seed_learns_from_its_own_pictures(
    tmp_path: Path, small: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepare_family(tmp_path, monkeypatch)
    learned: list[lvm.Corpus] = []
    monkeypatch.setattr(lvm, "_loss", lambda corpus, *_: learned.append(corpus))
    monkeypatch.setattr(lvm, "train", lambda model, *_, **__: model)
    pictures = _random_pictures()
    for seed, own in ((0, pictures), (1, pictures.flip(1))):
        for folder in tmp_path.glob("lvm*"):
            shutil.rmtree(folder)
        lvm.train_lvm(own, own[:8], tmp_path, 2, seed, CPU)
    first, other = learned[0], learned[-1]
    assert not torch.equal(first.scenes, other.scenes)
    assert not torch.equal(first.photographs, other.photographs)
    assert not torch.equal(first.views, other.views)


def _random_pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8 * 4 + 3, 64, 64, 3), generator=generator, dtype=torch.uint8)


def _prepare_family(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a tiny VQGAN into ``out``, and make the stages of the LVM small."""
    monkeypatch.setattr(autoencoders, "VQGAN_CHANNELS", (16, 48, 112))
    monkeypatch.setattr(autoencoders, "CROPS", 1)
    monkeypatch.setattr(autoencoders, "CODES", 64)
    monkeypatch.setattr(lvm, "CROPS", 1)
    monkeypatch.setattr(lvm, "VIEW_SCENES", 2)
    monkeypatch.setattr(lvm, "BATCH_TOKENS", 1)
    monkeypatch.setattr(lvm, "PICTURES", 4)
    monkeypatch.setattr(lvm, "STAGES", (lvm.Stage(2, 4, 1.0), lvm.Stage(2, 1, 0.5)))
    pictures = _random_pictures()
    autoencoders.train_vqgan(pictures, pictures[:8], out, 2, 0, CPU)
    (out / "data").mkdir()


def test_what_was_trained_is_a_backbone(tmp_path: Path, small: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare_family(tmp_path, monkeypatch)
    pictures = _random_pictures()
    lvm.train_lvm(pictures, pictures[:8], tmp_path, 2, 0, CPU)
    config = BackboneConfig(scale="custom", path=str(tmp_path / "lvm"))
    facts = backbone_facts(config)
    assert facts.codes == 64
    assert facts.tokens_per_image == 256
    model = load_backbone(facts, config, None, dtype=torch.float32, device=CPU, seed=0)
    ids = torch.randint(0, 64, (40,))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "lvm", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(model.logits(ids, (40,)), theirs(ids[None]).logits[0], atol=1e-5)


def test_an_untrained_lvm_knows_nothing() -> None:
    corpus = lvm.scenes_alone(torch.randint(0, 2048, (2 * len(KINDS), 64)).to(torch.uint16))
    model = lvm.new_lvm(0, 1024, np.random.default_rng(0).normal(size=(2048, 8)).astype(np.float32))
    found = lvm.answer_perplexity(model, corpus, 8, 1, CPU)
    assert set(found) == set(lvm.TASK_PICTURES)
    vocabulary = model.config.vocab_size
    assert all(abs(math.log(value / vocabulary)) < 0.3 for value in found.values())


def test_the_lvm_of_the_recipe_is_read_as_it_was_saved(tmp_path: Path) -> None:
    model = lvm.new_lvm(0, 4096, np.random.default_rng(0).normal(size=(2048, 8)).astype(np.float32))
    lvm.save_lvm(model, tmp_path, "0" * 64, 256)
    loaded = lvm._load(tmp_path, CPU)
    ids = torch.randint(0, 2048, (40,))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(loaded.logits(ids, (40,)), theirs(ids[None]).logits[0], atol=1e-5)


def test_codes_that_look_alike_begin_with_like_embeddings() -> None:
    codebook = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    codebook[1] = codebook[0] + 0.01
    features = lvm._code_features(torch.from_numpy(codebook), 256, torch.Generator().manual_seed(0))
    likeness = torch.nn.functional.cosine_similarity(features[:1], features[1:])
    assert likeness[0] > 0.99
    assert likeness[1:].abs().max() < 0.8
    assert float(features.std()) == pytest.approx(1)
