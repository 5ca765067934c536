"""Human pose, drawn the OpenPose way: 18 keypoints as coloured discs over dimmed coloured limbs, on black."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RESAMPLE = "nearest"

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


def disc_radius_px(height: int, width: int) -> float:
    """Radius of a keypoint's disc: OpenPose's 4 px at 256 px, never less than what a pixel grid shows."""
    return max(1.5, min(height, width) / 64)


def draw(keypoints: NDArray[np.floating], height: int, width: int) -> NDArray[np.uint8]:
    """Keypoints [18, 3] or [people, 18, 3] of (x px, y px, visible > 0), y down, as a picture [h, w, 3].

    Pixel (i, j) covers x in [j, j + 1): a keypoint at its centre is (j + 0.5, i + 0.5).
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


def read(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The keypoints of one person, float32 [18, 3] of (x px, y px, visible 0 or 1), from a picture uint8 [h, w, 3].

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
    pixels = picture[rows, columns].astype(np.float32)
    distances = (pixels**2).sum(axis=1) + (colours**2).sum(axis=1)[:, None] - 2 * colours @ pixels.T  # [36, pixels]
    nearest = distances.min(axis=0)
    variance = max(float(nearest.mean()), 10.0**2)  # of a drawing it would be 0, and nothing can be divided by it
    votes = np.exp((nearest - distances) / (2 * variance))
    votes = votes[: len(KEYPOINTS)] / votes.sum(axis=0)
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
