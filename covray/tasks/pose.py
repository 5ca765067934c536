"""Human pose, drawn the OpenPose way: 18 keypoints as coloured discs over dimmed coloured limbs, on black."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from covray.io.pixels import mse
from covray.tasks.base import Lpips, Meta, Metric, Picture, Resample, Score, require_labels
from covray.tasks.pictures import LPIPS, MSE

name = "pose"
short = "pose"
resample: Resample = "nearest"
continuous = False
meta_keys: tuple[str, ...] = ()
metrics: tuple[Metric, ...] = (
    Metric(
        "pck",
        "PCK@0.1",
        "Share of the label's keypoints found within 0.1 of the longer side of the box around them.",
        "higher",
        short="PCK",
    ),
    LPIPS,
    MSE,
)

KEYPOINTS = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
COLOURS = np.array(
    [
        (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
        (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
        (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
    ],
    np.uint8,
)  # fmt: skip
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
LIMB_BRIGHTNESS = 0.6
"""OpenPose blends limbs at 0.6, so that the brightest channel tells a limb (153) from a disc (255)."""

LEAST_VOTE = 0.03
"""Smaller shares of a pixel's vote do not count: they are the tails of the other colours' distributions."""
PCK_ALPHA = 0.1
"""How far from a keypoint still is the keypoint, as a share of the longer side of the box around all of them."""


def disc_radius_px(height: int, width: int) -> float:
    """Return the radius of a keypoint's disc: OpenPose's 4 px at 256 px, never less than what a pixel grid shows."""
    return max(1.5, min(height, width) / 64)


def render(keypoints: NDArray[np.floating], height: int, width: int) -> Picture:
    """Draw keypoints as a picture [height, width, 3].

    Pixel (i, j) covers x in [j, j + 1): a keypoint at its centre is (j + 0.5, i + 0.5).

    Args:
        keypoints: [18, 3] or [people, 18, 3] of (x px, y px, visible > 0), y down.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
    """
    people = np.asarray(keypoints, np.float64).reshape(-1, len(KEYPOINTS), 3)
    radius = disc_radius_px(height, width)
    canvas = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(canvas)
    for person in people:
        for (start, end), colour in zip(LIMBS, COLOURS, strict=False):
            if person[start, 2] > 0 and person[end, 2] > 0:
                dimmed = tuple(int(channel * LIMB_BRIGHTNESS) for channel in colour)
                line = [(float(x) - 0.5, float(y) - 0.5) for x, y in person[[start, end], :2]]
                pen.line(line, fill=dimmed, width=max(2, round(radius * 1.5)))
    picture = np.array(canvas)
    for person in people:
        for (x, y, visible), colour in zip(person, COLOURS, strict=True):
            if visible > 0:
                # Only around the disc: a large picture of many people has hundreds of them.
                left, right = np.clip([x - radius - 1, x + radius + 1], 0, width).astype(int)
                top, bottom = np.clip([y - radius - 1, y + radius + 1], 0, height).astype(int)
                rows, columns = np.ogrid[top:bottom, left:right]
                inside = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= radius**2
                picture[top:bottom, left:right][inside] = colour
    return picture


def read(picture: Picture, meta: Meta | None = None) -> NDArray[np.float32]:
    """Read the keypoints of one person, float32 [18, 3] of (x px, y px, visible 0 or 1).

    Every pixel shares one vote among the colours of discs, limbs and black, by a normal distribution around each, as
    wide as the picture's pixels lie from their nearest: in a drawing all of it goes to one colour, in a picture that a
    tokenizer or a model has blurred some to each that it may have been. A keypoint is where its votes are densest (mean
    shift, Comaniciu & Meer 2002). A disc that others cover entirely is not visible.
    """
    height, width = picture.shape[:2]
    limbs = (COLOURS[: len(LIMBS)] * LIMB_BRIGHTNESS).astype(np.uint8)
    colours = np.concatenate([COLOURS, limbs, np.zeros((1, 3), np.uint8)]).astype(np.float32)
    keypoints = np.zeros((len(KEYPOINTS), 3), np.float32)
    rows, columns = np.nonzero(picture.max(axis=2) > 255 * LIMB_BRIGHTNESS / 2)  # darker is ground
    if not rows.size:
        return keypoints
    # The share of every pixel that each keypoint's colour gets, [18, pixels].
    pixels = picture[rows, columns].astype(np.float32)
    distances = (pixels**2).sum(axis=1) + (colours**2).sum(axis=1)[:, None] - 2 * colours @ pixels.T  # [36, pixels]
    nearest = distances.min(axis=0)
    variance = max(float(nearest.mean()), 10.0**2)  # of a drawing it would be 0, and nothing can be divided by it
    votes = np.exp((nearest - distances) / (2 * variance))
    votes = votes[: len(KEYPOINTS)] / votes.sum(axis=0)
    # Mean shift begins in the cell of a coarse grid that has most votes.
    reach_px = 2 * disc_radius_px(height, width)
    cells = rows // round(reach_px) * width + columns // round(reach_px)
    places = np.stack([columns, rows], axis=1) + 0.5
    for index, vote in enumerate(votes):
        voters = np.flatnonzero(vote > LEAST_VOTE)
        if voters.size:
            vote, cell, place = vote[voters], cells[voters], places[voters]
            near = cell == np.bincount(cell, vote).argmax()
            for _ in range(4):  # more move nothing
                centre = np.average(place[near], axis=0, weights=vote[near])
                near = ((place - centre) ** 2).sum(axis=1) <= reach_px**2
            keypoints[index] = (*centre, 1)
    return keypoints


def score(answer: Picture, label: Picture, meta: Meta | None = None, *, lpips: Lpips | None = None) -> Score:
    """Score the keypoints of ``answer`` against those of ``label``, and the pixels."""
    share = pck(read(answer), read(label), least_px=disc_radius_px(*label.shape[:2]))
    perceptual = {} if lpips is None else {"lpips": float(lpips(answer, label))}
    return Score({"pck": share, **perceptual, "mse": mse(answer, label)})


def pck(
    answer: NDArray[np.floating], label: NDArray[np.floating], *, least_px: float, alpha: float = PCK_ALPHA
) -> float | None:
    """Return the percentage of correct keypoints (Yang & Ramanan 2013) as a share in [0, 1], for one person a picture.

    Args:
        answer: Keypoints [18, 3] of (x px, y px, visible).
        label: The same.
        least_px: A keypoint of the answer within this distance is correct: what the picture cannot resolve is no error,
            and a lone keypoint has no box.
        alpha: It also is within ``alpha`` times the longer side of the box around the label's keypoints.

    Returns:
        None where the label has no keypoints.
    """
    visible = label[:, 2] > 0
    if not visible.any():
        return None
    truth, answered = label[visible].astype(np.float64), answer[visible].astype(np.float64)
    tolerance_px = max(alpha * float(np.ptp(truth[:, :2], axis=0).max()), least_px)
    distance_px = np.linalg.norm(answered[:, :2] - truth[:, :2], axis=1)
    return float(((answered[:, 2] > 0) & (distance_px <= tolerance_px)).mean())


def mean(labels: Iterable[Picture], meta: Meta | None = None, *, robust: bool = False) -> Picture:
    """Return every keypoint that at least half of the labels have, at its mean place; with ``robust`` at its median."""
    pictures = require_labels(name, labels)
    people = np.stack([read(picture) for picture in pictures]).astype(np.float64)  # [labels, 18, 3]
    joined = np.zeros((len(KEYPOINTS), 3))
    for index in range(len(KEYPOINTS)):
        seen = people[people[:, index, 2] > 0, index, :2]
        if 2 * len(seen) >= len(people):
            middle = np.median(seen, axis=0) if robust else seen.mean(axis=0)
            joined[index] = (*middle, 1)
    return render(joined, *pictures[0].shape[:2])


def export(answer: Picture, meta: Meta | None = None) -> dict[str, bytes]:
    """Return those of the 18 keypoints that the answer shows, in pixels of the answer."""
    shown = []
    for keypoint, (x, y, visible) in zip(KEYPOINTS, read(answer), strict=True):
        if visible > 0:
            shown.append({"name": keypoint, "x_px": float(x), "y_px": float(y)})
    return {"keypoints.json": (json.dumps(shown, indent=2) + "\n").encode()}
