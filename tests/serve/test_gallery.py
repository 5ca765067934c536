"""The gallery of a run: a few of its training pairs, as pictures that a request may send."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covray.config import ServeConfig
from covray.io import storage
from covray.io.images import Picture
from covray.pairs.manifest import Pair
from covray.serve.app import require_servable
from covray.serve.gallery import Gallery, read_galleries, with_galleries
from covray.serve.schemas import GalleryPair
from tests.serve.test_http import Echo, client, get, post, refused, served
from tests.support.commands import free_port
from tests.support.manifests import write

Run = Callable[..., str]


def encoded(level: int, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, task: str = "depth", split: str = "train", image: bytes | None = None) -> Pair:
    return Pair(task, split, Picture(bytes=image or encoded(number)), Picture(bytes=encoded(200 + number)), {})


@pytest.fixture
def run(write_run: Run, tmp_path: Path) -> Callable[..., str]:
    """Writes a run that was trained on given pairs."""

    def make(pairs: list[Pair], **sentences: object) -> str:
        folder = write_run(method="none", **sentences)
        data = storage.read_json(f"{folder}/_run.json")["config"]["data"]
        description = storage.read_json(f"{data}/_dataset.json")
        description["config"]["pairs"] = str(tmp_path / "gallery.parquet")
        storage.write_json(f"{data}/_dataset.json", description)
        if pairs:
            write(tmp_path / "gallery.parquet", pairs)
        return folder

    return make


def gallery(run_folder: str, count: int = 3) -> Gallery:
    config = ServeConfig.model_validate({"adapters": [f"mine={run_folder}"], "gallery": count})
    return read_galleries(config)["mine"] if count else read_galleries(config)


def levels(pairs: tuple[GalleryPair, ...]) -> list[int]:
    return [int(np.array(Image.open(io.BytesIO(base64.b64decode(each.image))))[0, 0, 0]) for each in pairs]


def test_a_gallery_has_a_few_usable_training_pairs_of_each_trained_task(run: Callable[..., str]) -> None:
    broken = pair(3, image=b"no picture")
    pairs = [pair(0, split="test"), pair(1), broken, *(pair(number) for number in range(4, 12))]
    folder = run([*pairs, pair(20, task="normals"), pair(21, task="edges")], tasks=["depth", "edges"])
    found = gallery(folder)
    assert sorted(found) == ["depth", "edges"]
    assert levels(found["edges"]) == [21]
    assert len(found["depth"]) == 3
    assert set(levels(found["depth"])) <= {1, *range(4, 12)}
    assert gallery(folder, 0) == {}
    config = ServeConfig.model_validate({"adapters": [f"mine={folder}"], "port": free_port()})
    (info,) = with_galleries(require_servable(config, None), {"mine": found}).adapters
    assert sorted(info.gallery) == ["depth", "edges"]
    assert info.examples is not None
    assert info.examples > 0


def test_large_pictures_are_sent_smaller_and_small_ones_as_they_are(run: Callable[..., str]) -> None:
    large = Pair("depth", "train", Picture(bytes=encoded(5, 1200, 600)), Picture(bytes=encoded(6, 1200, 600)), {})
    (shown, small) = gallery(run([large, pair(7)]))["depth"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(part))).size for part in (shown.image, shown.label, small.image)]
    assert sizes == [(512, 256), (512, 256), (40, 30)]


def test_a_run_without_its_manifest_has_an_empty_gallery(run: Callable[..., str]) -> None:
    assert gallery(run([])) == {}


def test_the_route_gives_pairs_by_name_and_opens_no_file() -> None:
    shown = GalleryPair.of("1", encoded(1), encoded(2))
    app = served(Echo(), galleries={"depth": {"depth": (shown,)}})
    found = get(app, "/v1/gallery", params={"adapter": "depth", "task": "depth"}).json()["pairs"]
    assert found == [{"id": "1", "image": shown.image, "label": shown.label}]
    for task in ("pose", "../../etc/passwd", ""):
        assert get(app, "/v1/gallery", params={"adapter": "depth", "task": task}).json() == {"pairs": []}
    assert get(app, "/v1/gallery", params={"adapter": "other", "task": "depth"}).json() == {"pairs": []}
    refused(get(app, "/v1/gallery", params={"adapter": "../run", "task": "depth"}), 404, "unknown_adapter")
    body = {"query": shown.image, "examples": [{"image": found[0]["image"], "label": found[0]["label"]}]}
    assert post(app, json=body).status_code == 200, "a request may send them as they are"

    async def without_parameters() -> None:
        async with client(app) as http:
            message = refused(await http.get("/v1/gallery"), 422, "invalid")
            assert message == "adapter: Field required; see /docs"

    asyncio.run(without_parameters())
