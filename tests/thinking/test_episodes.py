"""Episodes are permutations with distinct words and one hidden value; an answer counts if both sides are right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from covray.errors import DatasetError
from covray.thinking.episodes import (
    COBSAT,
    MOST_SHOTS,
    PORTRAITS,
    Cell,
    Order,
    judge,
    make_episode,
    open_cobsat,
    sample_orders,
    tasks_of,
)

ORDER = Order((8, 7, 5, 9, 2, 3, 6, 1, 4, 0), (7, 6, 3, 4, 1, 0, 2, 5, 9, 8))
"""The first of CoBSAT's file."""


def test_there_are_ten_tasks_of_five_themes_of_ten_by_ten() -> None:
    for themes in (COBSAT, PORTRAITS):
        assert len(themes) == 5
        for theme in themes:
            assert (len(set(theme.details)), len(set(theme.objects))) == (10, 10)
        assert len({task.name for task in tasks_of(themes)}) == 10
    assert [task.name for task in tasks_of(COBSAT)][:4] == ["Color-I", "Color-II", "Background-I", "Background-II"]


def test_an_episode_is_what_cobsat_makes_of_its_order() -> None:
    color, color_of = tasks_of(COBSAT)[:2]
    episode = make_episode(color, 0, ORDER, 2)
    assert episode.words == ("blue", "brown", "orange")
    assert episode.demonstrations == (Cell("blue", "car"), Cell("brown", "car"))
    assert episode.answer == Cell("orange", "car")
    other = make_episode(color_of, 0, ORDER, 4)
    assert other.words == ("bag", "ball", "box", "apple", "cup")
    assert other.answer == Cell("yellow", "cup")


def test_the_words_of_an_episode_differ_and_the_hidden_value_stays() -> None:
    for task in tasks_of(PORTRAITS):
        for number, order in enumerate(sample_orders(20, 123)):
            episode = make_episode(task, number, order, 4)
            assert len(set(episode.words)) == 5
            cells = [*episode.demonstrations, episode.answer]
            details, objects = {cell.detail for cell in cells}, {cell.object for cell in cells}
            assert (len(details), len(objects)) == ((5, 1) if task.named == "detail" else (1, 5))
            assert episode.answer not in episode.demonstrations


def test_orders_are_permutations_that_follow_from_seed_and_number() -> None:
    orders = sample_orders(300, 123)
    for order in orders:
        assert sorted(order.named) == sorted(order.hidden) == list(range(10))
    assert sample_orders(7, 123) == orders[:7]
    assert sample_orders(7, 124) != orders[:7]
    firsts = Counter(order.named[0] for order in orders)
    assert len(firsts) == 10
    assert max(firsts.values()) < 60


def test_a_prompt_has_a_text_before_each_picture_and_one_after_them() -> None:
    task = tasks_of(COBSAT)[4]
    episode = make_episode(task, 0, Order((8, 1, 2, *range(3, 8), 0, 9), ORDER.hidden), 2)
    assert episode.prompt("Draw.") == [
        "Draw.\n\nWord 1: wireframe, ", "\n\nWord 2: sketch, ", "\n\nWord 3: pixel, ",
    ]  # fmt: skip
    assert episode.demonstrations[0].detail == "3d"


@pytest.mark.parametrize("shots", [0, MOST_SHOTS + 1])
def test_shots_out_of_bounds_are_refused(shots: int) -> None:
    assert len(make_episode(tasks_of(COBSAT)[0], 0, ORDER, MOST_SHOTS).words) == 9
    with pytest.raises(ValueError, match="give 1 to 8"):
        make_episode(tasks_of(COBSAT)[0], 0, ORDER, shots)


def test_both_sides_must_be_right() -> None:
    names_color, names_object = (make_episode(task, 0, ORDER, 2) for task in tasks_of(COBSAT)[:2])
    right = judge(names_color, Cell("orange", "car"))
    assert right.right
    assert (right.named, right.hidden) == (True, True)
    half = judge(names_color, Cell("orange", "hat"))
    assert (half.right, half.detail, half.object, half.named, half.hidden) == (False, True, False, True, False)
    answer = names_object.answer
    half = judge(names_object, Cell(answer.detail, "leaf"))
    assert (half.right, half.detail, half.named, half.hidden) == (False, True, False, True)
    missing = judge(names_color, None)
    assert not any((missing.right, missing.detail, missing.object, missing.named, missing.hidden))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CoBSAT's layout with empty pictures."""
    rows = [{"x_list": ORDER.named, "theta_list": ORDER.hidden}]
    (tmp_path / "load_datasets").mkdir()
    (tmp_path / "load_datasets" / "prompts_list_default.json").write_text(json.dumps(rows))
    for theme in COBSAT:
        lines = ["image,caption"]
        for thing in theme.objects:
            pictures = tmp_path / "datasets" / f"{theme.name}_{thing}"
            pictures.mkdir(parents=True)
            for detail in theme.details:
                (pictures / f"{detail}_{thing}.jpg").touch()
                lines.append(f'{detail}_{thing}.jpg,"a {detail} {thing}, seen well"')
        (tmp_path / "datasets" / f"{theme.name}_{theme.object_kind}.csv").write_text("\n".join(lines))
    return tmp_path


def test_cobsats_folder_is_read(folder: Path) -> None:
    cobsat = open_cobsat(folder)
    assert cobsat.orders == [ORDER]
    episode = make_episode(tasks_of(COBSAT)[2], 0, cobsat.orders[0], 2)
    for cell in (*episode.demonstrations, episode.answer):
        assert cobsat.picture(COBSAT[1], cell).is_file()
    captions = cobsat.captions(COBSAT[3])
    assert len(captions) == 100
    assert captions["swim_dog.jpg"] == "a swim dog, seen well"


def test_an_incomplete_folder_is_refused_in_one_line(folder: Path) -> None:
    (folder / "datasets" / "action_animal.csv").write_text("file,text\nx,y\n")
    cobsat = open_cobsat(folder)
    with pytest.raises(DatasetError, match=r"action_animal\.csv: cannot be read"):
        cobsat.captions(COBSAT[3])
    (folder / "datasets" / "color_hat" / "red_hat.jpg").unlink()
    with pytest.raises(DatasetError, match=r"red_hat\.jpg: is missing, with 1 of CoBSAT's 500 pictures in all; down"):
        open_cobsat(folder)
    orders = folder / "load_datasets" / "prompts_list_default.json"
    for text in ("[{}]", "{", json.dumps([{"x_list": [0, 0, *range(2, 10)], "theta_list": ORDER.hidden}])):
        orders.write_text(text)
        with pytest.raises(DatasetError, match=r"prompts_list_default\.json: cannot be read") as caught:
            open_cobsat(folder)
        assert "\n" not in str(caught.value)
