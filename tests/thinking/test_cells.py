"""Portraits of cells: what an episode shows is to be seen, and only its own cells may be held out."""

from __future__ import annotations

import numpy as np

from covray.evaluation.caption_facts import stated
from covray.pairs.scenes.portrait_values import THEMES, hidden_themes
from covray.thinking import cells
from covray.thinking.episodes import PORTRAITS, Cell, make_episode, sample_orders, tasks_of


def test_every_cell_has_a_plain_and_varied_portraits_that_let_see_it() -> None:
    numbers = np.random.default_rng(0)
    held_out = 0
    for theme in PORTRAITS:
        for detail in theme.details:
            for thing in theme.objects:
                cell = Cell(detail, thing)
                own = {theme.name} if cells.is_held_out(theme, cell) else set()
                held_out += len(own)
                for portrait in (cells.plain_portrait(theme, cell), cells.varied_portrait(theme, cell, numbers)):
                    assert portrait.solids[0].thing == thing
                    assert theme.name not in hidden_themes(portrait.style)
                    assert portrait.held_out_themes() == own, "of the other themes none is held out"
    assert held_out == 15 * len(THEMES)


def test_the_answers_caption_states_the_cell_and_the_pictures_follow_from_the_seed() -> None:
    (order,) = sample_orders(1, 0)
    for task in tasks_of(PORTRAITS):
        episode = make_episode(task, 0, order, 2)
        values = stated(cells.answer_caption(episode, np.random.default_rng(0)))
        assert values[task.theme.name] == {episode.answer.detail}
        assert values["object"] == {episode.answer.object}
    first, again, other = (cells.demonstration_pictures(episode, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
