"""Format x layout x depth x alpha x orientation: every pixel is what the definition says, by the test's own arithmetic.

The files are written by ``tests.support.picture_files``; nothing here asks an image library what is right.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from covray.errors import PairError
from covray.io.images import decode, read_raster
from tests.support.picture_files import (
    Tiff,
    bmp_file,
    exif_orientation,
    gif_file,
    packed_rows,
    png_file,
)

HEIGHT, WIDTH = 5, 7
GREY, RGB, INDEXED, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
PNG_LAYOUTS = [
    *((GREY, depth) for depth in (1, 2, 4, 8, 16)), (RGB, 8), (RGB, 16), *((INDEXED, depth) for depth in (1, 2, 4, 8)),
    (GREY_ALPHA, 8), (GREY_ALPHA, 16), (RGB_ALPHA, 8), (RGB_ALPHA, 16),
]  # fmt: skip
CHANNELS = {GREY: 1, RGB: 3, INDEXED: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}


def noise(maximum: int, channels: int, seed: int = 0) -> NDArray[np.int64]:
    """Samples [h, w, channels] of every kind: random, and both ends of the range."""
    samples = np.random.default_rng(seed).integers(0, maximum + 1, (HEIGHT, WIDTH, channels))
    samples[0, 0], samples[0, 1] = 0, maximum
    samples[0, 2, -1], samples[0, 3, -1] = 0, maximum
    return samples


def scaled(samples: NDArray, maximum: int, alpha: NDArray | None = None) -> NDArray[np.int64]:
    """255 * samples / maximum * alpha / maximum, rounded half up; grey becomes three channels."""
    numerator, denominator = 255 * samples.astype(object), maximum
    if alpha is not None:
        numerator, denominator = numerator * alpha.astype(object)[..., None], maximum**2
    result = ((2 * numerator + denominator) // (2 * denominator)).astype(np.int64)
    return np.repeat(result, 3, axis=2) if result.shape[2] == 1 else result


def upright(pixels: NDArray, orientation: int) -> NDArray:
    """``pixels`` for display. EXIF names where row 0 and column 0 of the stored picture lie."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def png_case(colour: int, depth: int, keyed: bool) -> tuple[NDArray, list[tuple[bytes, bytes]], NDArray]:
    """Samples, chunks, and the RGB that they mean."""
    maximum = 2**depth - 1
    samples = noise(maximum, CHANNELS[colour], seed=depth + colour)
    if colour == INDEXED:
        palette = np.random.default_rng(depth).integers(0, 256, (maximum + 1, 3))
        alpha = np.full(maximum + 1, 255)
        chunks = [(b"PLTE", palette.astype(np.uint8).tobytes())]
        if keyed:
            alpha[:2] = 0, 77
            chunks.append((b"tRNS", alpha[:2].astype(np.uint8).tobytes()))
        indices = samples[..., 0]
        return samples, chunks, scaled(palette[indices], 255, alpha[indices])
    if colour in (GREY_ALPHA, RGB_ALPHA):
        return samples, [], scaled(samples[..., :-1], maximum, samples[..., -1])
    if not keyed:
        return samples, [], scaled(samples, maximum)
    key = samples[2, 3]
    # A pixel that differs from the key in one channel's last bit stays.
    samples[3, 3] = key
    samples[3, 3, -1] ^= 1
    opaque = (samples != key).any(axis=2) * maximum
    return samples, [(b"tRNS", struct.pack(f">{len(key)}H", *key))], scaled(samples, maximum, opaque)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(("colour", "depth"), PNG_LAYOUTS)
def test_png(colour: int, depth: int, keyed: bool, interlaced: bool) -> None:
    if keyed and colour in (GREY_ALPHA, RGB_ALPHA):
        keyed = False  # the specification forbids it
    samples, chunks, expected = png_case(colour, depth, keyed)
    for orientation in range(1, 9):
        exif = [(b"eXIf", exif_orientation(orientation))]
        data = png_file(samples, colour, depth, [*chunks, *exif], interlaced=interlaced)
        assert np.array_equal(decode(data), upright(expected, orientation))
        if CHANNELS[colour] == 1:
            assert np.array_equal(read_raster(data).samples, samples[..., 0])


def tiff_containers() -> Iterator[dict[str, object]]:
    """Byte order, BigTIFF, strips and tiles, compression and prediction."""
    layouts: list[dict[str, object]] = [{}, {"rows_per_strip": 2}, {"tile_px": 16}]
    for order, big, layout in itertools.product("<>", (False, True), layouts):
        for packing in ({}, {"deflated": True}, {"deflated": True, "predicted": True}):
            yield {"order": order, "big": big, **layout, **packing}


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_grey(photometric: int, bits: int) -> None:
    maximum = 2**bits - 1
    samples = noise(maximum, 1, seed=bits)
    expected = scaled(maximum - samples if photometric == 0 else samples, maximum)
    for container in tiff_containers():
        if container.get("predicted") and bits not in (8, 16):
            continue
        for orientation in (None, *range(1, 9)):
            data = bytes(Tiff(samples, bits, photometric, orientation=orientation, **container))  # type: ignore[arg-type]
            assert np.array_equal(decode(data), upright(expected, orientation or 1)), container
            assert np.array_equal(read_raster(data).samples, samples[..., 0]), container


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("alpha", ["none", "unspecified", "associated", "unassociated"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colours", [1, 3])
def test_tiff_alpha(colours: int, bits: int, alpha: str, planar: bool) -> None:
    maximum = 2**bits - 1
    extra = {"none": (), "unspecified": (0,), "associated": (1,), "unassociated": (2,)}[alpha]
    samples = noise(maximum, colours + len(extra), seed=bits)
    if alpha == "associated":
        samples[..., :colours] = samples[..., :colours] * samples[..., colours:] // maximum
    opacity = samples[..., -1] if alpha == "unassociated" else None
    expected = scaled(samples[..., :colours], maximum, opacity)
    for container in tiff_containers():
        for orientation in (1, 6):
            tiff = Tiff(
                samples,
                bits,
                1 if colours == 1 else 2,
                planar=planar,
                extra=extra,
                orientation=orientation,
                **container,
            )  # type: ignore[arg-type]
            assert np.array_equal(decode(bytes(tiff)), upright(expected, orientation)), container


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_palette(bits: int) -> None:
    colour_map = np.random.default_rng(bits).integers(0, 65536, (2**bits, 3))
    samples = noise(2**bits - 1, 1, seed=bits)
    for container in tiff_containers():
        if container.get("predicted") and bits != 8:
            continue
        data = bytes(Tiff(samples, bits, 3, colour_map=colour_map, **container))  # type: ignore[arg-type]
        assert np.array_equal(decode(data), colour_map[samples[..., 0]] >> 8), container
        assert np.array_equal(read_raster(data).samples, samples[..., 0]), container


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_cmyk(bits: int, planar: bool) -> None:
    maximum = 2**bits - 1
    samples = noise(maximum, 4)
    paper = maximum - samples
    exact = 255 * paper[..., :3] * paper[..., 3:] / maximum**2
    for container in tiff_containers():
        rgb = decode(bytes(Tiff(samples, bits, 5, planar=planar, **container)))  # type: ignore[arg-type]
        assert np.abs(rgb - exact).max() <= 1, container  # rounded after each of two multiplications


def test_tiff_lab() -> None:
    """Against CIE's definition in steps: L*a*b* to XYZ at D50, Bradford to D65, linear sRGB, its curve."""
    samples = noise(255, 3)
    samples[1] = [[255, 0, 0], [0, 0, 0], [128, 0, 0], [150, 40, 250], [200, 216, 30], [90, 20, 200], [255, 0, 0]]
    lightness, a, b = samples[..., 0] * 100 / 255, *(samples[..., k].astype(np.int8).astype(float) for k in (1, 2))
    f = [(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200]
    d50, d65 = np.array([0.96422, 1, 0.82521]), np.array([0.95047, 1, 1.08883])
    xyz = np.stack([np.where(part > 6 / 29, part**3, (part - 4 / 29) * 108 / 841) for part in f], axis=-1) * d50
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.linalg.inv(bradford) @ np.diag((bradford @ d65) / (bradford @ d50)) @ bradford
    to_rgb = np.array([[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560],
                       [0.0556434, -0.2040259, 1.0572252]])  # fmt: skip
    linear = np.clip(xyz @ adapted.T @ to_rgb.T, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    rgb = decode(bytes(Tiff(samples, 8, 8)))
    assert np.abs(rgb - srgb).max() < 0.51
    assert rgb[1, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("container", [{}, {"rows_per_strip": 2}, {"deflated": True}, {"planar": True}])
def test_tiff_ycbcr(container: dict[str, object]) -> None:
    """By ITU-R BT.601, as TIFF's default coefficients are."""
    samples = noise(255, 3)
    y, cb, cr = (samples[..., k].astype(float) for k in range(3))
    cb, cr = cb - 128, cr - 128
    exact = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    levels = tuple(itertools.chain.from_iterable((level, 1) for level in (0, 255, 128, 255, 128, 255)))
    tags = ((530, 3, (1, 1)), (532, 5, levels))
    rgb = decode(bytes(Tiff(samples, 8, 6, tags=tags, **container)))  # type: ignore[arg-type]
    assert np.abs(rgb - np.clip(exact, 0, 255)).max() <= 1.5


def test_bmp() -> None:
    for bits in (1, 4, 8):
        palette = np.random.default_rng(bits).integers(0, 256, (2**bits, 4))
        indices = noise(2**bits - 1, 1)
        data = bmp_file(packed_rows(indices, bits), WIDTH, bits, palette.astype(np.uint8).tobytes())
        assert np.array_equal(decode(data), palette[indices[..., 0], 2::-1])
    colours = noise(255, 3)
    assert np.array_equal(decode(bmp_file(packed_rows(colours[..., ::-1], 8), WIDTH, 24)), colours)
    padded = np.concatenate([colours[..., ::-1], noise(255, 1)], axis=2)
    assert np.array_equal(decode(bmp_file(packed_rows(padded, 8), WIDTH, 32)), colours)
    for shares, masks in (((5, 5, 5), b""), ((5, 6, 5), struct.pack("<3I", 0xF800, 0x7E0, 0x1F))):
        samples = np.stack([noise(2**bits - 1, 1, bits)[..., 0] for bits in shares], axis=-1)
        words = samples[..., 0] << shares[1] + shares[2] | samples[..., 1] << shares[2] | samples[..., 2]
        data = bmp_file(packed_rows(words[..., None], 16, "<"), WIDTH, 16, masks=masks)
        exact = samples * 255 / (2 ** np.array(shares) - 1)
        assert np.abs(decode(data) - exact).max() < 1


def test_gif() -> None:
    palette = np.random.default_rng(0).integers(0, 256, (4, 3))
    indices = noise(3, 1)[..., 0]
    for hidden, corner in itertools.product((None, 0, 3), ((0, 0), (2, 1))):
        canvas = (WIDTH + 4, HEIGHT + 3) if any(corner) else (WIDTH, HEIGHT)
        expected = np.zeros((canvas[1], canvas[0], 3), np.int64)
        opaque = palette.copy()
        if hidden is not None:
            opaque[hidden] = 0
        expected[corner[1] : corner[1] + HEIGHT, corner[0] : corner[0] + WIDTH] = opaque[indices]
        data = gif_file(indices, palette.astype(np.uint8).tobytes(), canvas, corner, hidden)
        assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("maximum", [1, 7, 100, 255, 256, 1000, 4095, 65535])
def test_pnm(maximum: int) -> None:
    for channels, plain, raw in ((1, b"P2", b"P5"), (3, b"P3", b"P6")):
        samples = noise(maximum, channels)
        size = b" # a comment\n%d %d\n%d\n" % (WIDTH, HEIGHT, maximum)
        text = b" ".join(b"%d" % value for value in samples.reshape(-1))
        binary = b"".join(packed_rows(samples, 8 if maximum < 256 else 16))
        for data in (plain + size + text + b"\n", raw + size + binary):
            # Of colours Pillow's scaling is a floating point one, then rounded.
            assert np.abs(decode(data) - scaled(samples, maximum)).max() <= (channels == 3)
            if channels == 1:
                assert np.array_equal(read_raster(data).samples, samples[..., 0])


def test_pbm_ones_are_black() -> None:
    samples = noise(1, 1)
    text = b" ".join(b"%d" % value for value in samples.reshape(-1))
    for data in (b"P1 7 5\n" + text + b"\n", b"P4 7 5\n" + b"".join(packed_rows(samples, 1))):
        assert np.array_equal(decode(data), scaled(1 - samples, 1))
        assert np.array_equal(read_raster(data).samples, samples[..., 0])


@pytest.mark.parametrize(
    ("tiff", "reason"),
    [
        (Tiff(noise(2**10 - 1, 1), 10, 1), "unsupported: TIFF of 10 bits"),
        (Tiff(noise(255, 1), 8, 1, sample_format=2), "unsupported: TIFF of signed integers"),
        (Tiff(noise(255, 1), 32, 1, sample_format=3), "unsupported: TIFF of floating point"),
        (Tiff(noise(255, 1), 32, 1), "unsupported: pixels without an agreed range"),
        (Tiff(noise(255, 1), 8, 4), "unsupported: TIFF of a transparency mask"),
        (Tiff(noise(255, 3), 8, 9), "unsupported: TIFF of ICC L"),
        (Tiff(noise(255, 1), 16, 32803), "unsupported: TIFF of a colour filter array"),
        (Tiff(noise(255, 4), 8, 2), "unsupported: TIFF with an extra sample that it does not explain"),
        (Tiff(noise(255, 4), 8, 1, extra=(1, 2, 2)), "unsupported: TIFF of several alphas"),
        (Tiff(noise(255, 2), 8, 0, extra=(1,)), "unsupported: TIFF whose white is zero"),
        (Tiff(noise(255, 5), 8, 5, extra=(2,)), "unsupported: TIFF of 5 samples"),
        (Tiff(noise(255, 4), 8, 5, tags=((332, 3, (2,)),)), "unsupported: TIFF of other inks"),
        (Tiff(noise(255, 1), 8, 1, tags=((259, 3, (6,)),)), "unsupported: TIFF with JPEG data of the old style"),
        (Tiff(noise(255, 3), 8, 2, tags=((258, 3, (5, 6, 5)),)), "unsupported: TIFF of 5, 6, 5 bits"),
        (Tiff(noise(3, 1), 8, 3, colour_map=noise(255, 3)[:1]), "damaged: a colour map of"),
        (Tiff(noise(3, 1), 2, 3, colour_map=np.full((4, 3), 200)), "unsupported: TIFF with a colour map of 8-bit"),
        (Tiff(noise(255, 1), 8, 2), "damaged: 1 samples a pixel"),
        (Tiff(noise(255, 3), 8, 2, tags=((279, 4, (50,)),)), "truncated: strip 0"),
        (Tiff(noise(255, 3), 8, 2, tags=((279, 4, (50, 50)),)), "damaged: 1 strips or tiles and 2"),
        (Tiff(noise(255, 1), 8, 1, tags=((262, 3, ()),)), "unsupported: TIFF of photometric interpretation -1"),
    ],
)  # fmt: skip
def test_tiff_without_one_reading_is_refused_by_name(tiff: Tiff, reason: str) -> None:
    with pytest.raises(PairError) as caught:
        decode(bytes(tiff))
    assert str(caught.value).startswith(reason)


def test_an_unexplained_extra_sample_that_is_opaque_is_read() -> None:
    samples = noise(255, 4)
    samples[..., 3] = 255
    assert np.array_equal(decode(bytes(Tiff(samples, 8, 2))), samples[..., :3])


def test_a_truncated_tiff_says_so_wherever_it_ends() -> None:
    data = bytes(Tiff(noise(65535, 3), 16, 2, rows_per_strip=1))
    for length in range(10, len(data) - 1, 7):
        with pytest.raises(PairError, match=r"^truncated: "):
            decode(data[:length])
