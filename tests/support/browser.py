"""A real browser whose tabs are watched, and servers of pages for it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright


def chromium_path() -> str:
    """Return the Chromium of this machine."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path, "the tests of pages need Chromium: apt install chromium"
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for all tests of a file."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def watched_tab(browser: Browser, *allowed: str, **options: Any) -> Iterator[Page]:
    """Open a tab; at its end no script of it may have failed, and no request may have left for elsewhere.

    Args:
        browser: Where.
        allowed: How the addresses of requests may begin, besides data in the page itself.
        options: Of the tab.
    """
    requests: list[str] = []
    errors: list[object] = []
    tab = browser.new_page(**options)
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(error))
    try:
        yield tab
    finally:
        tab.close()
    assert [url for url in requests if not url.startswith((*allowed, "data:", "blob:"))] == []
    assert errors == []


def require_fits_every_screen(page: Page, folder: Path) -> None:
    """Check that nothing of a page is cut off or blank: light and dark, on a wide screen and on a telephone."""
    for scheme in ("light", "dark"):
        for width in (1100, 400):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off"
            page.screenshot(path=folder / f"{scheme}-{width}.png", full_page=True)
            assert np.array(Image.open(folder / f"{scheme}-{width}.png").convert("L")).std() > 5


@contextmanager
def served(app: Any, port: int) -> Iterator[str]:
    """Serve an application on a port of loopback while the block runs; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(20)
