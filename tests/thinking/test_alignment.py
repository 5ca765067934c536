"""Only the aligner learns; the frozen decoder reads a prefix and nothing after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from covray.models.aligner.aligner import new_aligner
from covray.thinking.alignment import IGNORED, Alignment, AlignmentBatch, collate
from covray.thinking.splits import SplitSeed, split_tokens
from tests.support.language_models import language_model, language_tokenizer

FEATURES = 12
CAPTION = ["the", "red", "ball", "is", "on", "the", "left", "of", "the", "blue", "box"]


@pytest.fixture
def alignment() -> Alignment:
    model = language_model()
    return Alignment(new_aligner(FEATURES, model, "encoder", 0).network, model)


def features_of(seed: int, count: int = len(CAPTION)) -> Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))


def batch_of(features: Tensor, index: int = 0) -> AlignmentBatch:
    split = split_tokens(len(features), "prefix", 128, SplitSeed(0, 0, index))
    target = " ".join(CAPTION[place] for place in split.targets)
    return collate([features[split.features]], [target], language_tokenizer(), 128)


def test_the_loss_is_transformers_own(alignment: Alignment) -> None:
    batch = collate(
        [features_of(0, 3), features_of(1, 5)], ["a red ball", "it is flat and round"], language_tokenizer(), 128
    )
    each = alignment(batch)
    expected = alignment.language_model(
        encoder_outputs=(alignment.aligner(batch.features),), attention_mask=batch.mask, labels=batch.labels
    )
    assert each.shape == (4 + 6,)
    torch.testing.assert_close(each.mean(), expected.loss)


def test_a_caption_has_the_same_loss_alone_and_beside_a_longer_one(alignment: Alignment) -> None:
    tokenizer = language_tokenizer()
    short, long = features_of(0, 2), features_of(1, 7)
    both = alignment(collate([short, long], ["red ball", "it is flat and round"], tokenizer, 128))
    alone = alignment(collate([short], ["red ball"], tokenizer, 128))
    torch.testing.assert_close(both[: len(alone)], alone)


def test_targets_end_and_are_cut(alignment: Alignment) -> None:
    batch = collate([features_of(0)] * 2, ["red ball", "a b c d e f g"], language_tokenizer(), 4)
    assert batch.labels.shape == (2, 4)
    assert batch.labels[0].tolist()[2:] == [1, IGNORED]
    assert int(batch.labels[1, -1]) == 1


def test_only_the_aligner_learns_and_the_decoder_stays_to_the_bit(alignment: Alignment) -> None:
    model = alignment.language_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    aligned = {name: tensor.clone() for name, tensor in alignment.aligner.state_dict().items()}
    alignment.train()
    assert alignment.aligner.training
    assert not any(module.training for module in model.modules())
    trained = [parameter for parameter in alignment.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in alignment.aligner.parameters()}
    optimizer = torch.optim.AdamW(alignment.parameters(), lr=1e-2)
    batch = batch_of(features_of(0))
    losses = []
    for _ in range(3):
        loss = alignment(batch).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not torch.equal(tensor, aligned[name]) for name, tensor in alignment.aligner.state_dict().items())


def test_a_prefix_never_leaks_the_feature_of_what_is_written(alignment: Alignment) -> None:
    features = features_of(0)
    for index in range(8):
        cut = len(split_tokens(len(features), "prefix", 128, SplitSeed(0, 0, index)).features)
        changed = features.clone()
        changed[cut:] = features_of(9, len(features) - cut)
        loss = alignment(batch_of(features, index))
        assert torch.equal(alignment(batch_of(changed, index)), loss)
        changed = features.clone()
        changed[cut - 1] += 1
        assert not torch.equal(alignment(batch_of(changed, index)), loss)


def test_padding_is_not_read(alignment: Alignment) -> None:
    batch = collate([features_of(0, 3), features_of(1, 5)], ["a red ball", "the box"], language_tokenizer(), 128)
    padded = batch.features.masked_fill(~batch.mask[..., None], 7.0)
    torch.testing.assert_close(alignment(replace(batch, features=padded)), alignment(batch))


def test_words_stand_after_the_picture_and_are_encoded_by_the_frozen_encoder(alignment: Alignment) -> None:
    batch = collate([features_of(0, 4), features_of(1, 4)], ["ball", "box"], language_tokenizer(), 8, ["a red", "the"])
    states, mask = alignment.read(batch)
    assert states.shape[1] == 4 + 3
    assert torch.equal(states[:, :4], alignment.aligner(batch.features))
    encoded = alignment.language_model.encoder(input_ids=batch.words, attention_mask=batch.words_mask)
    assert torch.equal(states[:, 4:], encoded.last_hidden_state)
    assert mask.tolist() == [[True] * 7, [True] * 6 + [False]]
    alignment(batch).sum().backward()
    assert all(parameter.grad is None for parameter in alignment.language_model.parameters())


def test_the_decoder_writes_from_features(alignment: Alignment) -> None:
    batch = collate([features_of(0, 3), features_of(1, 5)], ["a red ball", "the box"], language_tokenizer(), 128)
    both = alignment.write(batch, 6)
    alone = alignment.write(collate([features_of(0, 3)], ["a red ball"], language_tokenizer(), 128), 6)
    assert both.shape[1] <= 7
    assert torch.equal(both[0, : alone.shape[1]], alone[0])
