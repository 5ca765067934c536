from __future__ import annotations

import numpy as np
import pytest

from covray.report.document import document, duration, facts, figures, img, navigation
from tests.report.conftest import Page

HOSTILE = "</title><script>alert(1)</script>\"'&"


def test_a_document_runs_its_own_script_and_no_other() -> None:
    body = [navigation([(HOSTILE, HOSTILE)], 64), figures([(HOSTILE, HOSTILE)]), facts([(HOSTILE, HOSTILE)], [HOSTILE])]
    page = Page(document(HOSTILE, body, tile_px=64, script="/* of the page */").decode())
    page.require_self_contained()
    assert page.texts_in("title") == [HOSTILE]
    assert "/* of the page */" in page.texts_in("script")[0]
    assert page.texts.count(HOSTILE) == 6
    injected = document("", ["<script>alert(1)</script>"], tile_px=64).decode()
    with pytest.raises(ValueError):  # two scripts, one hash: the browser runs one of them
        Page(injected).require_self_contained()


@pytest.mark.parametrize("size", [8, 128])
def test_small_pictures_are_stored_to_the_pixel(size: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    (shown,) = Page(img(picture, "noise")).pictures()
    assert np.array_equal(shown, picture)


def test_durations_are_in_the_unit_one_would_say() -> None:
    assert [duration(seconds) for seconds in (4.4, 61, 600, 7200)] == ["4 s", "61 s", "10 min", "2.0 h"]
