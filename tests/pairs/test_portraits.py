"""Portraits: words are true of the pixels, values can be told apart, and held-out cells stay out of training."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from covray.io.images import decode
from covray.io.pixels import to_srgb
from covray.pairs.manifest import Pair
from covray.pairs.scenes import render_scene, scene_pairs
from covray.pairs.scenes.portrait_values import (
    ARRANGEMENTS,
    BACKGROUNDS,
    BESIDE,
    COLOURS,
    OBJECTS,
    OTHER_COLOURS,
    STYLES,
    TEXTURES,
    THEMES,
    held_out,
    hidden_themes,
)  # fmt: skip
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import (
    SUBJECT_CLASSES,
    Portrait,
    Solid,
    portrait_pairs,
    render_portrait,
    sample_portrait,
)  # fmt: skip

PLAIN = Portrait((Solid("ball", "red", "plain"),), "studio", "photo", "standing")


def _generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def sampled() -> list[Portrait]:
    return [sample_portrait(_generator(seed)) for seed in range(3000)]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(portrait_pairs(200, size_px=32, seed=3))


def test_scenes_are_to_the_bit_as_before_words() -> None:
    expected = ("29121ab6bd56e4da", "021f7ada42e92981", "3b14687cd0e9369d")
    for seed, digest in enumerate(expected):
        hashed = hashlib.sha256()
        for view in render_scene(seed, 64, views=2):
            for field in vars(view).values():
                hashed.update(np.ascontiguousarray(field).tobytes())
        assert hashed.hexdigest()[:16] == digest
    hashed = hashlib.sha256()
    for pair in scene_pairs(3, size_px=32, seed=5):
        assert pair.image.bytes is not None
        assert pair.label.bytes is not None
        meta = repr(sorted(pair.meta.items())) + str(pair.pair_id)
        hashed.update(pair.image.bytes + pair.label.bytes + meta.encode())
    assert hashed.hexdigest()[:16] == "4f681d8d1c66a468"


def test_a_seed_gives_the_same_bits() -> None:
    first, second = list(portrait_pairs(12, 32, 7)), list(portrait_pairs(12, 32, 7))
    assert first == second
    assert all(a.pair_id != b.pair_id for a, b in zip(first, portrait_pairs(12, 32, 8), strict=True))


def test_each_theme_holds_out_fifteen_cells_one_or_two_a_row() -> None:
    assert all(len(values) == 10 for values in (*THEMES.values(), OBJECTS))
    for theme, values in THEMES.items():
        grid = np.array([[held_out(theme, value, thing) for thing in OBJECTS] for value in values])
        assert grid.sum() == 15
        for axis in (0, 1):
            assert set(grid.sum(axis=axis)) <= {1, 2}


def test_held_out_cells_are_in_test_and_nowhere_else(pairs: list[Pair]) -> None:
    assert Counter(pair.split for pair in pairs) == {"train": 160, "val": 20, "test": 20}
    for pair in pairs:
        assert pair.words is not None
        attributes = pair.words.attributes
        cells = set()
        for solid in attributes["solids"]:
            values = {**attributes, **solid}
            for theme in THEMES:
                if held_out(theme, values[theme], solid["object"]):
                    cells.add(theme)
        if pair.split == "test":
            assert cells & set(attributes["visible"])
            assert set(pair.meta["held_out"]) == cells & set(attributes["visible"])
        else:
            assert not cells


def test_every_value_occurs_in_training(sampled: list[Portrait]) -> None:
    solids = [solid for portrait in sampled for solid in portrait.solids]
    for values, present in (
        (OBJECTS, [solid.thing for solid in solids]),
        (COLOURS, [solid.colour for solid in solids]),
        (TEXTURES, [solid.texture for solid in solids]),
        (BACKGROUNDS, [portrait.background for portrait in sampled]),
        (STYLES, [portrait.style for portrait in sampled]),
        ({*ARRANGEMENTS, BESIDE}, [portrait.arrangement for portrait in sampled]),
    ):
        counts = Counter(present)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.02 * len(present)


def test_the_colour_that_is_named_is_the_nearest_to_the_pixels() -> None:
    """Every colour on every object with every texture: the lighter half of the pixels has the named colour."""
    names = list(COLOURS)
    right, cases = 0, 0
    cells = list(itertools.product(COLOURS, OBJECTS, TEXTURES))
    for index in _generator().choice(len(cells), 200, replace=False):
        colour, thing, texture = cells[index]
        portrait = dataclasses.replace(PLAIN, solids=(Solid(thing, colour, texture),))
        picture, view = render_portrait(portrait, _generator(int(index)), 48)
        pixels = picture[view.classes == SUBJECT_CLASSES[0]].astype(float)
        light = pixels.sum(axis=1)
        kept = (
            pixels[light >= np.quantile(light, 0.5)] if colour != "black" else pixels[light <= np.quantile(light, 0.5)]
        )
        mean = kept.mean(axis=0)
        # Compared by direction and, for white and black, by brightness: light changes how bright a colour is.
        distances = []
        for name in names:
            reference = to_srgb(np.array(COLOURS[name]) * 0.75) * 255
            distances.append(np.linalg.norm(reference - mean))
        right += names[int(np.argmin(distances))] == colour
        cases += 1
    assert right / cases > 0.9


def test_left_is_left_and_colours_are_each_solids_own() -> None:
    seen = 0
    for seed in range(60):
        portrait = sample_portrait(_generator(seed))
        if len(portrait.solids) != 2:
            continue
        seen += 1
        _, view = render_portrait(portrait, _generator(seed), 48)
        middles = [np.nonzero(view.classes == number)[1].mean() for number in SUBJECT_CLASSES]
        assert middles[0] < 20 < 28 < middles[1]
    assert seen > 5


def _parts(mask: np.ndarray) -> int:
    """Columns that a mask fills, counted in connected stretches."""
    filled = mask.any(axis=0).astype(int)
    return int((np.diff(np.concatenate([[0], filled])) == 1).sum())


def test_arrangements_are_what_the_masks_say() -> None:
    for thing in ("box", "ball", "cone"):
        masks, floors, props = {}, {}, {}
        for arrangement in ARRANGEMENTS:
            portrait = dataclasses.replace(PLAIN, arrangement=arrangement, solids=(Solid(thing, "red", "plain"),))
            _, view = render_portrait(portrait, _generator(5), 96)
            masks[arrangement] = view.classes == SUBJECT_CLASSES[0]
            props[arrangement] = (view.classes == 6).sum()
            rows = np.nonzero(masks[arrangement])[0]
            floors[arrangement] = (rows.min(), rows.max())
        area = {name: int(mask.sum()) for name, mask in masks.items()}
        assert _parts(masks["row"]) == 3
        assert _parts(masks["standing"]) == 1
        assert floors["floating"][1] < floors["standing"][1] - 8
        assert floors["tower"][0] < floors["standing"][0]
        assert area["sunk"] < 0.75 * area["standing"]
        assert area["far"] < 0.35 * area["standing"]
        with_props = {name for name, count in props.items() if count}
        assert with_props == {"pedestal", "hanging", "arch", "fence"}


@pytest.mark.parametrize("theme", ["thing", "colour", "texture", "background", "style", "arrangement"])
def test_values_of_a_theme_can_be_told_apart_in_pixels(theme: str) -> None:
    """With all else equal, pictures of two values differ by more than noise, whatever the object's turn."""
    values = {**THEMES, "thing": tuple(OBJECTS)}[theme]
    pictures = []
    for value in values:
        if theme in ("thing", "colour", "texture"):
            (solid,) = PLAIN.solids
            portrait = dataclasses.replace(PLAIN, solids=(dataclasses.replace(solid, **{theme: value}),))
        else:
            portrait = dataclasses.replace(PLAIN, **{theme: value})
        pictures.append(render_portrait(portrait, _generator(1), 64)[0].astype(float))
    for first, second in itertools.combinations(pictures, 2):
        assert (np.abs(first - second).max(axis=2) > 24).sum() > 60


def test_words_say_what_is_visible_and_nothing_else(sampled: list[Portrait]) -> None:
    for seed, portrait in enumerate(sampled[:800]):
        words = portrait_words(portrait, _generator(seed))
        text = set(words.caption.lower().replace(".", "").replace(",", "").split())
        hidden = hidden_themes(portrait.style)
        colours = {solid.colour for solid in portrait.solids}
        if "colour" in hidden:
            assert not text & (set(COLOURS) - {"grey"})
            assert not text & set(OTHER_COLOURS.values())
        else:
            assert text & set(COLOURS) == colours
            assert text & set(OTHER_COLOURS.values()) == {OTHER_COLOURS[colour] for colour in colours}
        assert {solid.thing for solid in portrait.solids} == text & set(OBJECTS)
        assert STYLES[portrait.style].other in words.caption
        if "background" not in hidden:
            assert BACKGROUNDS[portrait.background].other in words.caption
        assert not {question.kind for question in words.questions} & hidden
        assert 2 <= words.caption.count(".") <= 3
        assert 18 <= len(words.caption.split()) <= 62


def test_answers_follow_from_the_attributes(sampled: list[Portrait]) -> None:
    numbers = {1: "one", 2: "two", 3: "three"}
    for seed, portrait in enumerate(sampled[:800]):
        words = portrait_words(portrait, _generator(seed))
        solids = words.attributes["solids"]
        for question in words.questions:
            assert len(question.answer.split()) == 1
            if question.kind == "count":
                assert question.answer == numbers[words.attributes["count"]]
            elif question.kind in ("colour", "texture", "object"):
                assert question.answer == solids[0][question.kind]
            elif question.kind in ("background", "style", "arrangement"):
                assert question.answer == words.attributes[question.kind]
            elif question.kind == "is":
                assert (question.answer == "yes") == (f" {solids[0]['colour']}?" in question.question)
            elif question.kind in ("same colour", "same object"):
                key = question.kind.removeprefix("same ")
                assert (question.answer == "same") == (solids[0][key] == solids[1][key])
            elif question.kind == "which is left":
                assert question.answer == solids[0]["object"]
            else:
                end, _, key = question.kind.partition(" ")
                assert question.answer == solids[end == "right"][key or "object"]


@pytest.mark.parametrize("unseen", [False, True])
def test_no_question_can_be_answered_without_looking(unseen: bool) -> None:
    sampled = [sample_portrait(_generator(seed), unseen) for seed in range(3000)]
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    firsts = []
    for seed, portrait in enumerate(sampled):
        for question in portrait_words(portrait, _generator(seed)).questions:
            answers[question.kind][question.answer] += 1
            if question.kind == "which is left":
                named = question.question.split(" the ")[1].removesuffix(" or")
                firsts.append(named == question.answer)
    for kind, counts in answers.items():
        share = max(counts.values()) / counts.total()
        assert share < (0.75 if kind == "count" else 0.6), (kind, counts)
    assert abs(np.mean(firsts) - 0.5) < 0.08


def test_pairs_hold_pictures_and_serialisable_words(pairs: list[Pair]) -> None:
    for pair in pairs:
        assert pair.image.bytes is not None
        assert decode(pair.image.bytes).shape == (32, 32, 3)
        assert pair.words is not None
        assert json.loads(json.dumps(pair.words.attributes)) == pair.words.attributes
