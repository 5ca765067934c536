"""Reading a page back: what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

_VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """The elements and the text of a page, as a browser sees them; every element must be closed where it was opened."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[tuple[str, str]] = []
        """Every text with the element it stands in."""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))  # <line/> and the like, of SVG

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.said.append((self._open[-1] if self._open else "", data))

    def texts_in(self, tag: str) -> list[str]:
        return [text for inside, text in self.said if inside == tag]

    @property
    def texts(self) -> list[str]:
        """What is there to read."""
        return [text for inside, text in self.said if inside not in ("script", "style")]

    def pictures(self) -> list[np.ndarray]:
        """Every picture, decoded from the page itself."""
        sources = [attributes["src"] or "" for tag, attributes in self.elements if tag == "img" and "src" in attributes]
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]

    def require_self_contained(self) -> None:
        """It loads nothing, and its policy lets its one script run and no other."""
        for tag, attributes in self.elements:
            assert tag not in ("link", "iframe", "object", "embed", "base", "form", "use"), tag
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            for name in ("src", "href", "srcset", "poster"):
                assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
        (policy,) = [attributes["content"] for _, attributes in self.elements if "http-equiv" in attributes]
        (script,) = self.texts_in("script")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy is not None
        assert f"script-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy
