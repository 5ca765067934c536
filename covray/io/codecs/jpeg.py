"""Whether the data of a JPEG is whole: libjpeg fills what is lost with grey, and Pillow does not pass on its warning.

``simplejpeg`` does. It decodes at an eighth of the size, which takes a third of Pillow's time, and is given the
segments that pixels depend on and no others, so that a camera's odd metadata warns of nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import simplejpeg

from covray.errors import PairError, one_line

MAX_SCANS = 500
"""A picture of thousands of scans costs hours and shows nothing: progressive files have about ten."""
_SOI, _EOI, _SOS, _DHT, _DAC, _DQT, _DRI, _APP14 = 0xD8, 0xD9, 0xDA, 0xC4, 0xCC, 0xDB, 0xDD, 0xEE
_TABLES = (_DHT, _DAC, _DQT, _DRI)
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (_DHT, 0xC8, _DAC))
# FF 00 is a byte of the data, FF FF padding, and restart markers (D0 to D7) stand within a scan.
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def require_known(data: bytes) -> None:
    """Raise PairError ``unsupported`` where the header of a JPEG names a depth or a number of channels not read.

    Four channels are CMYK, inverted where Adobe's marker says so; some programs invert without it, and some do not.
    """
    channels, by_adobe = 0, False
    for marker, segment in _segments(data, also=(_APP14,)):
        if marker == _SOS:
            break
        by_adobe |= marker == _APP14 and segment[4:9] == b"Adobe"
        if marker in _FRAMES and len(segment) > 9 and not channels:
            bits, channels = segment[4], segment[9]
            if bits != 8 or channels not in (1, 3, 4):
                raise PairError("unsupported", f"JPEG of {bits} bits and {channels} channels; save 8 bits and RGB")
            if channels != 4:
                return  # before the scans, which take longer to pass over
    if channels == 4 and not by_adobe:
        raise PairError(
            "unsupported", "JPEG of 4 channels without Adobe's marker, so that ink has two readings; save it as RGB"
        )


def require_whole(data: bytes, tables: bytes = b"") -> None:
    """Raise PairError where the scans of a JPEG do not hold exactly the picture that its header promises.

    A scan that lacks data makes libjpeg warn. One that has too much does so only from some eight bytes on, so the scan
    of a sequential picture is also read without its last byte, which must be missed. (In a progressive one that found
    nothing more, at five times the cost.) Bytes 00 or FF before the end are padding, which some cameras write, and no
    damage. Lost bytes after which as many blocks are read as before cannot be told from a picture.

    Args:
        data: a JPEG that Pillow has decoded; what follows its end marker is not looked at.
        tables: a JPEG of tables only, of which the picture makes use (TIFF keeps them apart).

    Raises:
        PairError: ``damaged``, or ``truncated`` where the data is closed before its end.
    """
    parts, scans, colours = [b"\xff\xd8"], [], "GRAY"
    for marker, segment in [*_segments(tables), *_segments(data)]:
        if marker in _FRAMES and segment[9:10] == b"\x04":
            colours = "CMYK"  # cannot become grey, which is the least work
        if marker == _SOS:
            scans.append(len(parts))
        if len(scans) > MAX_SCANS:
            raise PairError("damaged", f"more than {MAX_SCANS} scans")
        parts.append(segment)
    warning = _warning(b"".join(parts), colours)
    if warning is not None and "extraneous" in warning:
        for number in scans:
            parts[number] = _without_padding(parts[number])
        warning = _warning(b"".join(parts), colours)
    if warning is not None:
        early = "premature end" in warning.lower()
        raise PairError("truncated" if early else "damaged", warning)
    if len(scans) == 1:
        (number,) = scans
        parts[number] = _without_padding(parts[number]).removesuffix(b"\0")[:-1]
        if _warning(b"".join(parts), colours) is None:
            raise PairError("damaged", "Corrupt JPEG data: more than its picture takes")


def _without_padding(scan: bytes) -> bytes:
    """``scan`` without the zeros or ones at its end; the zero of a stuffed FF 00 is data."""
    stripped = scan.rstrip(b"\xff") if scan.endswith(b"\xff") else scan.rstrip(b"\0")
    return stripped + b"\0" if stripped.endswith(b"\xff") else stripped


def _warning(jpeg: bytes, colours: str) -> str | None:
    """What libjpeg warns of first, None for nothing."""
    # Decoded at an eighth of the size: all of the file is read, and few pixels are computed. With an end marker behind
    # it, a file is not warned of for the lack of one.
    try:
        simplejpeg.decode_jpeg(
            jpeg + b"\xff\xd9", colours, fastdct=True, min_height=1, min_width=1, min_factor=8, strict=True
        )
    except ValueError as error:
        return one_line(error)
    return None


def _segments(data: bytes, also: tuple[int, ...] = ()) -> Iterator[tuple[int, bytes]]:
    """Yield marker and bytes (with the marker) of each segment that pixels depend on; a scan goes with its data.

    Those of the markers ``also`` are yielded with them.
    """
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            at += 1  # stray bytes between segments, which decoders skip
            continue
        marker = data[at + 1]
        if marker == _EOI:
            return
        if marker == 0xFF or marker == 0 or marker == _SOI or 0xD0 <= marker <= 0xD7:
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SOS:
            following = _MARKER_IN_SCAN.search(data, end)
            end = following.start() if following else len(data)
        if marker == _SOS or marker in _TABLES or marker in _FRAMES or marker in also:
            yield marker, data[at:end]
        at = end
