"""A ``VQModel`` whose latents are the pixels of patches: a token describes its own 4 x 4 pixels and nothing else.

A convolutional encoder writes into each token what lies up to three tokens around it, and its group norms something of
the whole picture. A decoder is not harmed by that, but a model that writes tokens one by one is: it has to write every
contour several times, and can err each time (``covray.recipes.nano.writing``). So the codebook is one of patches
themselves, and only the decoder is learned.

``write_encoder`` makes a stock ``VQModel`` do this, so that what is shipped needs no code of its own:

- A residual block whose second convolution is zero is its shortcut, which is linear; a convolution that halves the size
  can gather 2 x 2 pixels into channels. So the encoder up to its last norm can pass a patch on unchanged.
- The last group norm takes the mean and the variance of a group of channels over the whole picture. Every value is
  there twice, with both signs, so that the mean is 0; two channels of each group hold a constant of either sign, so
  large that the variance is the constant's. So the norm only scales.
- silu(x) - silu(-x) = x: the last convolution undoes the activation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PATCH_PX = 4
COLOURS = 3
VALUES = COLOURS * PATCH_PX**2
"""Values of a patch, and width of a latent."""
TOKENS_BATCH = 8
"""Pictures whose distances to all codes are in memory at a time: few enough for a core's cache."""
_CONSTANT = 1012.0
"""So large that a picture itself makes up about 1e-6 of a group's variance. It is exact in float16; the norm's
weight for groups of 14 channels is nearly so."""


def patches(pictures: Tensor) -> Tensor:
    """Return the patches, [n, h / 4, w / 4, 48], of pictures [n, 3, h, w]: what the encoder computes."""
    return F.pixel_unshuffle(pictures, PATCH_PX).permute(0, 2, 3, 1)


@torch.inference_mode()
def patch_tokens(pictures: NDArray[np.uint8], codebook: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the tokens of pictures as the tokenizer would, without the cost of its encoder.

    Where two codes are equally near but for rounding, the tokenizer may take the other: one token in a thousand.

    Args:
        pictures: uint8 [n, h, w, 3].
        codebook: The patch of every code, [codes, VALUES].

    Returns:
        Ids, [n, h * w / 16].
    """
    codes = torch.from_numpy(codebook.copy())
    squares = codes.square().sum(1)
    height, width = pictures.shape[1:3]
    # Allocated once: small arrays kept from every round would lie between the large ones that a round frees, and memory
    # would grow by 0.8 MB a picture.
    tokens = np.empty((len(pictures), height * width // PATCH_PX**2), np.uint16)
    for start in range(0, len(pictures), TOKENS_BATCH):
        pixels = torch.from_numpy(np.array(pictures[start : start + TOKENS_BATCH])).permute(0, 3, 1, 2).float() / 255
        points = patches(pixels).flatten(1, 2)
        distances = squares - 2 * points @ codes.T  # less the square of the patch, the same for all codes
        tokens[start : start + TOKENS_BATCH] = distances.argmin(-1).numpy()
    return tokens


@torch.no_grad()
def write_encoder(model: Any) -> None:
    """Make the encoder of ``model`` compute ``patches``.

    Args:
        model: A ``VQModel`` of three levels without attention, with latents of ``VALUES`` channels. The groups of the
            norms on its last level have 2 * VALUES / groups + 2 channels.
    """
    for parameter in model.encoder.parameters():
        parameter.zero_()
    _gather_patches(model.encoder)
    norm = model.encoder.conv_norm_out
    groups, size = norm.num_groups, norm.num_channels // norm.num_groups
    identity = torch.eye(VALUES)
    signed = torch.cat((identity, -identity))
    last = model.encoder.down_blocks[2].resnets[0].conv_shortcut
    last.weight[:, :VALUES, 0, 0] = _by_group(signed[:, _unshuffled_twice()], torch.zeros(groups, 2, VALUES))
    last.bias.copy_(_by_group(torch.zeros(2 * VALUES), torch.tensor([_CONSTANT, -_CONSTANT]).expand(groups, 2)))
    norm.weight.fill_(_CONSTANT * (2 / size) ** 0.5)  # the deviation that the norm divides by
    model.encoder.conv_out.weight[..., 1, 1] = _by_group(signed, torch.zeros(groups, 2, VALUES)).T
    model.quant_conv.weight.copy_(identity[..., None, None])
    model.quant_conv.bias.zero_()


def _gather_patches(encoder: Any) -> None:
    """Make the first two levels of an encoder that is all zero gather the values of a patch into channels."""
    encoder.conv_in.weight[:COLOURS, :, 1, 1] = torch.eye(COLOURS)
    for level, block in enumerate(encoder.down_blocks[:2]):
        before = COLOURS * 4**level
        resnet, halving = block.resnets[0], block.downsamplers[0].conv
        if resnet.conv_shortcut is not None:
            resnet.conv_shortcut.weight[:before, :before, 0, 0] = torch.eye(before)
        # Channel, row, column, as pixel_unshuffle has them.
        halving.weight[: 4 * before, :before, :2, :2] = torch.eye(4 * before).unflatten(1, (before, 2, 2))


def _by_group(values: Tensor, constant: Tensor) -> Tensor:
    """Put what belongs to the values of a patch in the order of the channels.

    Args:
        values: Of the values with the one sign, then with the other, [2 * VALUES, ...].
        constant: Of each group's two constant channels, [groups, 2, ...].

    Returns:
        Of all channels, [channels, ...]: group by group, its values, the same with the other sign, its constants.
    """
    positive, negative = values.unflatten(0, (2, len(constant), -1))
    return torch.cat((positive, negative, constant), 1).flatten(0, 1)


def _unshuffled_twice() -> Tensor:
    """Return which value of a patch each channel holds after its pixels are gathered twice, int64 [48]."""
    numbers = torch.arange(VALUES).view(1, VALUES, 1, 1).float()
    gathered = F.pixel_unshuffle(F.pixel_unshuffle(F.pixel_shuffle(numbers, PATCH_PX), 2), 2)
    return gathered.flatten().long()
