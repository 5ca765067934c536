"""The recipe of the nano LVM: what its sentences hold, what it writes, and the guesses it is compared with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from covray.config import BackboneConfig
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.scales import SPECIAL_IDS
from covray.recipes.nano import autoencoders, lvm
from covray.recipes.nano.data import KINDS

CPU = torch.device("cpu")
TOKENS = 4


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
        sentence, counts = corpus.sentence(8, generator)
        again, counts_again = corpus.sentence(8, torch.Generator().manual_seed(seed))
        assert torch.equal(sentence, again)
        assert torch.equal(counts, counts_again)
        pictures = _pictures(sentence)
        share = counts.reshape(lvm.PICTURES, TOKENS).float().mean(1)
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
        sentence, counts = corpus.sentence(pairs, torch.Generator().manual_seed(seed))
        assert sentence.shape == counts.shape == (2 * pairs * TOKENS,)


def test_what_was_trained_is_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = LlamaConfig(
        vocab_size=64 + SPECIAL_IDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, rope_theta=1e4, bos_token_id=None, eos_token_id=None, pad_token_id=64,
    )  # fmt: skip
    monkeypatch.setattr(autoencoders, "VQGAN_CHANNELS", (8, 8, 8))
    monkeypatch.setattr(autoencoders, "CROPS", 1)
    monkeypatch.setattr(autoencoders, "CODES", 64)
    monkeypatch.setattr(lvm, "llama_config", lambda scale: small)
    monkeypatch.setattr(lvm, "CROPS", 1)
    monkeypatch.setattr(lvm, "VIEW_SCENES", 2)
    monkeypatch.setattr(lvm, "BATCH_TOKENS", 1)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8 * 4 + 3, 64, 64, 3), generator=generator, dtype=torch.uint8)
    autoencoders.train_vqgan(pictures, pictures[:8], tmp_path, 2, 0, CPU)
    (tmp_path / "data").mkdir()
    lvm.train_lvm(pictures, pictures[:8], tmp_path, 2, 0, CPU)
    config = BackboneConfig(scale="custom", path=str(tmp_path / "lvm"))
    facts = backbone_facts(config)
    assert facts.codes == 64
    assert facts.tokens_per_image == 256
    model = load_backbone(facts, config, None, dtype=torch.float32, device=CPU, seed=0)
    ids = torch.randint(0, 64, (40,), generator=generator)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "lvm", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(model.logits(ids, (40,)), theirs(ids[None]).logits[0], atol=1e-5)


def test_an_untrained_lvm_knows_nothing() -> None:
    corpus = lvm.scenes_alone(torch.randint(0, 2048, (2 * len(KINDS), 64)).to(torch.uint16))
    found = lvm.answer_perplexity(lvm.new_lvm(0, 1024), corpus, 1, CPU)
    assert set(found) == set(lvm.TASK_PICTURES)
    vocabulary = lvm.new_lvm(0, 1024).config.vocab_size
    assert all(abs(math.log(value / vocabulary)) < 0.3 for value in found.values())
