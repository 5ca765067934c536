"""Pictures from strangers: every mode comes out as the right RGB, every bad file as a PairError with its reason."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from covray.errors import PairError
from covray.io import images, storage
from covray.io.images import Picture, decode, encode_png, load_picture, picture_identity, read_raster, square

ENCODINGS: dict[str, dict[str, object]] = {
    "PNG": {},
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "GIF": {},
    "PPM": {},
}


def photo(height_px: int = 24, width_px: int = 40) -> NDArray[np.uint8]:
    """Smooth, so that JPEG keeps it, and different in every corner."""
    y, x = np.mgrid[0:height_px, 0:width_px] / max(height_px, width_px)
    return np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], axis=2).astype(np.uint8)


def encode(image: Image.Image | NDArray[np.uint8], kind: str, **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(PairError) as caught:
        decode(data, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(caught.value.reason + ": ")
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_lossless_formats_return_the_pixels(kind: str) -> None:
    assert np.array_equal(decode(encode(photo(), kind, **ENCODINGS[kind])), photo())


def test_jpeg_is_close_and_gif_matches_its_palette() -> None:
    assert np.abs(decode(encode(photo(), "JPEG", quality=95)).astype(int) - photo()).mean() < 3
    indexed = Image.fromarray(photo()).quantize(64)
    assert np.array_equal(decode(encode(indexed, "GIF")), np.array(indexed.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_its_rgb(mode: str) -> None:
    image = Image.fromarray(photo()).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encode(image, kind)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert np.array_equal(decode(data), np.array(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_black_and_opaque_ones_stay(mode: str) -> None:
    cut_out = Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).convert("RGBA")
    cut_out.putpixel((3, 2), (200, 200, 200, 0))
    cut_out.putpixel((5, 5), (200, 200, 200, 128))
    if mode == "P":
        indexed = Image.new("P", (8, 8), 1)
        indexed.putpalette([200, 0, 0, 200, 200, 200])
        indexed.putpixel((3, 2), 0)
        data = encode(indexed, "PNG", transparency=0)
    else:
        data = encode(cut_out.convert(mode), "PNG")
    rgb = decode(data)
    assert rgb[2, 3].tolist() == [0, 0, 0]
    assert rgb[0, 0].tolist() == [200, 200, 200]
    if mode != "P":
        assert rgb[5, 5].tolist() == [100, 100, 100]


def test_a_transparent_colour_key_becomes_black() -> None:
    data = encode(np.full((4, 4, 3), (10, 200, 10), np.uint8), "PNG", transparency=(10, 200, 10))
    assert decode(data).max() == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_cut(kind: str) -> None:
    levels = np.array([[0, 128, 129, 257], [1000, 25700, 65278, 65535]], np.uint16)
    rgb = decode(encode(Image.fromarray(levels), kind))
    assert rgb[..., 0].tolist() == [[0, 0, 1, 1], [4, 100, 254, 255]]
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def test_big_endian_16_bits_are_scaled_the_same() -> None:
    image = Image.frombytes("I;16B", (2, 2), struct.pack(">4H", 0, 257, 25700, 65535))
    assert decode(encode(image, "TIFF"))[..., 1].tolist() == [[0, 1], [100, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_levels_are_as_stored(kind: str) -> None:
    for levels in (np.array([[0, 255, 256], [1, 65534, 65535]], np.uint16), np.array([[0, 7], [254, 255]], np.uint8)):
        stored = read_raster(encode(Image.fromarray(levels), kind)).samples
        assert stored.dtype == levels.dtype
        assert np.array_equal(stored, levels)


def test_levels_of_a_palette_are_its_indices() -> None:
    indexed = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).convert("P")
    indexed.putpalette([9, 9, 9] * 256)
    assert read_raster(encode(indexed, "PNG")).samples.tolist() == [[0, 1], [2, 255]]


def test_levels_have_the_limits_of_pictures() -> None:
    for data, expected in [
        (png_header(9_000, 9_000), "too_large"), (b"hello", "not_an_image"), (b"", "empty"),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "unsupported"),
    ]:  # fmt: skip
        with pytest.raises(PairError, match=f"^{expected}: "):
            read_raster(data)


def test_pixels_without_an_agreed_range_are_refused() -> None:
    assert reason(encode(Image.new("F", (4, 4), 0.5), "TIFF")) == "unsupported"
    assert reason(encode(Image.new("I", (4, 4), 70_000), "TIFF")) == "unsupported"
    assert reason(encode(Image.new("I", (4, 4), -1), "TIFF")) == "unsupported"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    turns = [
        lambda a: a,
        np.fliplr,
        lambda a: np.rot90(a, 2),
        np.flipud,
        lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a, 1),
        lambda a: np.rot90(a, 2).swapaxes(0, 1),
        lambda a: np.rot90(a, -1),
    ]
    stored = np.ascontiguousarray(turns[orientation - 1](photo()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(encode(stored, kind, exif=exif, **ENCODINGS[kind]))
    assert upright.shape == photo().shape
    assert np.abs(upright.astype(int) - photo()).mean() < 3


def test_broken_metadata_does_not_cost_the_pixels() -> None:
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"):
        assert decode(encode(photo(), "PNG", exif=exif)).shape == photo().shape
        assert decode(encode(photo(), "JPEG", exif=exif)).shape == photo().shape
    assert decode(encode(photo(), "JPEG", icc_profile=b"no profile")).shape == photo().shape


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(kind: str) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 128, 255)]
    assert reason(encode(frames[0], kind, save_all=True, append_images=frames[1:])) == "animated"


def test_a_camera_picture_with_a_preview_attached_is_its_main_picture() -> None:
    preview = Image.fromarray(photo(6, 10))
    data = encode(photo(), "MPO", save_all=True, append_images=[preview], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(decode(data).astype(int) - photo()).mean() < 3


def png_header(width_px: int, height_px: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000))


@pytest.mark.parametrize("side_px", [9_000, 12_000, 60_000])
def test_bombs_are_refused_by_their_header(side_px: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    for action in ("ignore", "error"):  # whatever the caller does with Pillow's own warnings
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            assert reason(png_header(side_px, side_px)) == "too_large"
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_of_pixels_is_the_callers() -> None:
    data = encode(photo(24, 40), "PNG")
    assert decode(data, max_pixels=24 * 40).shape == (24, 40, 3)
    assert reason(data, max_pixels=24 * 40 - 1) == "too_large"


def test_what_is_no_picture_has_its_reason() -> None:
    assert reason(b"") == "empty"
    assert reason(b"hello, this is text") == "not_an_image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not_an_image"
    assert reason(b"%PDF-1.7\n") == "not_an_image"
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not_an_image"
    assert reason(encode(photo(1, 1), "PNG")) == "too_small"
    assert reason(encode(photo(1, 50), "PNG")) == "too_small"


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_half_a_download_is_called_truncated(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, kind, **ENCODINGS[kind])
    assert reason(data[: int(share * len(data))]) == "truncated"


def hostile(generator: np.random.Generator, data: bytes) -> bytes:
    """``data`` after an accident: cut, flipped, overwritten, repeated, or with a number set to an extreme."""
    damaged = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        at = int(generator.integers(0, len(damaged) if generator.random() < 0.5 else min(64, len(damaged))))
        kind = generator.integers(0, 5)
        if kind == 0:
            damaged = damaged[: max(1, at)]
        elif kind == 1:
            damaged[at] ^= 1 << int(generator.integers(0, 8))
        elif kind == 2:
            damaged[at : at + 8] = generator.bytes(8)
        elif kind == 3:
            damaged[at:at] = damaged[: int(generator.integers(1, 64))]
        else:
            damaged[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")[generator.integers(0, 3)]
    return bytes(damaged)


def samples() -> list[bytes]:
    small = photo(16, 12)
    indexed = Image.fromarray(small).quantize(16)
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 255)]
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    found = [encode(small, kind, **options) for kind, options in ENCODINGS.items()]
    found += [
        encode(small, "JPEG", exif=exif, progressive=True),
        encode(small, "PNG", exif=exif, icc_profile=b"x" * 99),
    ]
    found += [encode(indexed, "PNG", transparency=0), encode(indexed, "BMP"), encode(indexed, "TIFF")]
    found += [encode(small, "TIFF", compression=name) for name in ("raw", "jpeg", "tiff_deflate", "packbits")]
    found += [
        encode(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "PNG", "WEBP", "MPO")
    ]
    found += [encode(Image.fromarray(small).convert("1"), kind) for kind in ("PPM", "TIFF", "PNG")]
    found += [encode(Image.fromarray(small).convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    found += [encode(Image.fromarray(small[..., 0].astype(np.uint16)), kind) for kind in ("PNG", "TIFF", "PPM")]
    found += [b"P3\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 12\n", encode(Image.new("F", (4, 4), 0.5), "TIFF")]
    return found


@pytest.mark.filterwarnings("ignore")
def test_hostile_files_raise_nothing_but_pair_errors() -> None:
    generator = np.random.default_rng(7)
    seen: dict[str, int] = {}
    texts = []
    for data in samples():
        for _ in range(70):
            try:
                picture = decode(hostile(generator, data))
            except PairError as error:
                seen[error.reason] = seen.get(error.reason, 0) + 1
                texts.append(str(error))
            else:
                seen["good"] = seen.get("good", 0) + 1
                assert picture.dtype == np.uint8
                assert picture.ndim == 3
                assert picture.shape[2] == 3
    assert not any("\n" in text for text in texts)
    assert sum(seen.values()) >= 2_000
    assert seen["truncated"] > 100
    assert seen["damaged"] > 100
    assert seen["good"] > 100


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_square_keeps_a_picture_of_the_right_size(fit: str) -> None:
    image = photo(32, 32)
    assert np.array_equal(square(image, 32, fit), image)  # type: ignore[arg-type]


def test_square_agrees_with_plain_pillow() -> None:
    image = photo(48, 100)
    expected = np.array(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(square(image, 32), expected)


def test_crop_takes_the_centre_without_distortion() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 255
    assert square(image, 20, "crop").min() == 255
    assert square(image.swapaxes(0, 1), 10, "crop").min() == 255
    assert square(image, 20, "stretch").min() == 0


def test_nearest_makes_no_new_colours() -> None:
    palette = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
    label = palette[np.random.default_rng(1).integers(0, 5, (37, 53))]
    kept = {tuple(colour) for colour in square(label, 16, resample="nearest").reshape(-1, 3)}
    assert kept <= {tuple(colour) for colour in palette}


def test_png_round_trips_and_is_repeatable() -> None:
    for image in (photo(), photo()[:, ::-1], photo(2, 2)):
        assert np.array_equal(decode(encode_png(image)), image)
        assert encode_png(image) == encode_png(image.copy())


def test_identity_is_of_the_content_else_of_the_uri() -> None:
    assert picture_identity(Picture(uri="a", bytes=b"x")) == picture_identity(Picture(uri="b", bytes=b"x"))
    others = [Picture(uri="a"), Picture(uri="b"), Picture(bytes=b"a"), Picture(bytes=b""), Picture()]
    assert len({picture_identity(picture) for picture in others}) == len(others)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A manifest's root with a picture, and a secret beside it."""
    folder = tmp_path / "root"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a b.png").write_bytes(b"picture")
    (folder / "empty.png").write_bytes(b"")
    (tmp_path / "root_secret.png").write_bytes(b"secret")
    (folder / "out.png").symlink_to(tmp_path / "root_secret.png")
    (folder / "outdir").symlink_to(tmp_path)
    (folder / "in.png").symlink_to(folder / "inner" / "a b.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def refused(uri: str | None, root: str | None) -> str:
    with pytest.raises(PairError) as caught:
        load_picture({"uri": uri, "bytes": None}, root)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return caught.value.reason


def test_what_lies_below_the_root_is_loaded(root: Path) -> None:
    good = ["inner/a b.png", "./inner/../inner/a b.png", "in.png", f"{root}/inner/a b.png"]
    good += [f"file://{root}/inner/a%20b.png", f"file://localhost{root}/inner/a%20b.png"]
    for uri in good:
        assert load_picture({"uri": uri, "bytes": None}, str(root)) == b"picture"
        assert load_picture(Picture(uri=uri), f"file://{root}") == b"picture"


def test_bytes_win_over_the_uri() -> None:
    assert load_picture(Picture(uri="../../etc/passwd", bytes=b"x"), None) == b"x"
    with pytest.raises(PairError, match="empty"):
        load_picture(Picture(uri="in.png", bytes=b""), None)


def test_nothing_outside_the_root_is_opened(root: Path) -> None:
    beside = f"{root}_secret.png"
    uris = ["../root_secret.png", "inner/../../root_secret.png", beside, f"file://{beside}", "out.png"]
    uris += ["outdir/root_secret.png", "/etc/passwd", "file:///etc/passwd", "file://%2Fetc/passwd", "http://host/x.png"]
    uris += ["s3://bucket/x.png", f"file://{root}/%2e%2e/root_secret.png", f"{root}/../root_secret.png"]
    for uri in uris:
        assert refused(uri, str(root)) == "outside_root", uri
    assert refused("in.png", None) == "outside_root"


def test_what_cannot_be_read_has_its_reason(root: Path) -> None:
    assert refused(None, str(root)) == "missing"
    assert refused("", str(root)) == "missing"
    assert refused("inner/no.png", str(root)) == "missing"
    assert refused("inner/a\nb.png", str(root)) == "missing"
    assert refused("empty.png", str(root)) == "empty"
    assert refused("inner", str(root)) == "unreadable"
    assert refused("pipe.png", str(root)) == "unreadable"
    assert refused("loop.png", str(root)) == "unreadable"
    assert refused("nul\0.png", str(root)) == "unreadable"
    assert refused("x" * 5_000, str(root)) == "unreadable"
    assert refused("~/x.png", str(root)) == "missing"


def test_a_huge_file_is_refused_before_it_is_read(root: Path) -> None:
    with open(root / "huge.png", "wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)  # sparse
    assert refused("huge.png", str(root)) == "too_large"


def test_a_root_on_another_storage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(path: str) -> tuple[fs.FileSystem, str]:
        asked.append(path)
        return fs.SubTreeFileSystem(str(root.parent), fs.LocalFileSystem()), "root"

    monkeypatch.setattr(storage, "resolve", resolve)
    images._remote_root.cache_clear()
    where = "s3://bucket/root?region=x"
    for uri in ("inner/a b.png", "s3://bucket/root/inner/a b.png", "x/../inner/a b.png"):
        assert load_picture(Picture(uri=uri), where) == b"picture"
    uris = ["../root_secret.png", "s3://bucket/root/../root_secret.png", "s3://bucket/root_secret.png", "/etc/passwd"]
    uris += [
        "s3://other/root/in.png",
        "file:///etc/passwd",
        "s3://bucket/root?endpoint_override=evil/in.png",
        ".",
        "..",
    ]
    for uri in uris:
        assert refused(uri, where) == "outside_root", uri
    assert refused("inner/no.png", where) == "missing"
    assert set(asked) == {where}
    images._remote_root.cache_clear()
