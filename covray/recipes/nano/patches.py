"""An encoder whose tokens describe their own pixels and nothing else, written as that of a stock ``VQModel``.

A convolutional encoder writes into each token what lies up to three tokens around it, and its group norms something of
the whole picture. A decoder does not mind; a model that writes tokens one by one does: it has to say every contour
several times (``covray.recipes.nano.writing``). Here a token is a function of its patch of 4 x 4 pixels alone, by a
network of one hidden layer. The decoder still looks around.

``write_encoder`` puts that network into the layers that a ``VQModel`` has, so that what is shipped needs no code of its
own. Three things make that possible:

- A residual block whose second convolution is zero is its shortcut, which is linear; a convolution that halves the size
  can gather 2 x 2 pixels into channels. So the encoder up to its last norm can be any linear map of a patch.
- The last group norm takes the mean and the variance of a group of channels over the whole picture. Every feature is
  there twice, with both signs, so that the mean is 0; two channels of each group hold a constant of either sign, so
  large that the variance is the constant's. So the norm does nothing but scale.
- The activation and the convolution after it are the hidden layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 4
_COLOURS = 3
_PIXELS = _COLOURS * PATCH_PX**2
_CONSTANT = 1024.0
"""Features are of the order of 1: what they add to a group's variance is some 1e-6 of it. Exact in float16."""


class PatchEncoder(nn.Module):
    """A network of one hidden layer from a patch to its latent."""

    def __init__(self, channels: int, groups: int, width: int) -> None:
        """Make an untrained encoder.

        Args:
            channels: Channels of the ``VQModel``'s last level.
            groups: Groups of its norms.
            width: Channels of the latents.
        """
        super().__init__()
        self.groups = groups
        self.features = nn.Linear(_PIXELS, groups * (channels // groups - 2) // 2)
        self.gain = nn.Parameter(torch.ones(2 * self.features.out_features))
        self.offset = nn.Parameter(torch.zeros(2 * self.features.out_features))
        self.latent = nn.Linear(2 * self.features.out_features, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], float [n, 3, h, w] -> latents, float32 [n, width, h / 4, w / 4]."""
        with torch.autocast(pixels.device.type, enabled=False):
            patches = F.pixel_unshuffle(pixels.float(), PATCH_PX).permute(0, 2, 3, 1)
            features = self.features(patches)
            signed = torch.cat((features, -features), -1)
            return self.latent(F.silu(signed * self.gain + self.offset)).permute(0, 3, 1, 2)


@torch.no_grad()
def write_encoder(encoder: PatchEncoder, model: Any) -> None:
    """Make the encoder of ``model``, a ``VQModel`` of three levels without attention, compute what ``encoder`` does."""
    for parameter in model.encoder.parameters():
        parameter.zero_()
    _gather_patches(model.encoder)
    groups, size = encoder.groups, model.encoder.conv_norm_out.num_channels // encoder.groups
    last = model.encoder.down_blocks[2].resnets[0].conv_shortcut
    weight = torch.cat((encoder.features.weight, -encoder.features.weight))[:, _pixels_as_gathered()]
    bias = torch.cat((encoder.features.bias, -encoder.features.bias))
    last.weight[:, :_PIXELS, 0, 0] = _by_group(weight, torch.zeros(groups, 2, _PIXELS))
    last.bias.copy_(_by_group(bias, torch.tensor([_CONSTANT, -_CONSTANT]).expand(groups, 2)))
    norm, unused = model.encoder.conv_norm_out, torch.zeros(groups, 2)
    norm.weight.copy_(_by_group(encoder.gain * _CONSTANT * (2 / size) ** 0.5, unused))  # the group's deviation
    norm.bias.copy_(_by_group(encoder.offset, unused))
    width = encoder.latent.out_features
    model.encoder.conv_out.weight[..., 1, 1] = _by_group(encoder.latent.weight.T, torch.zeros(groups, 2, width)).T
    model.encoder.conv_out.bias.copy_(encoder.latent.bias)
    model.quant_conv.weight.copy_(torch.eye(width)[..., None, None])
    model.quant_conv.bias.zero_()


def _gather_patches(target: Any) -> None:
    """Make the first two levels of an encoder that is all zero gather the 48 values of a patch into channels."""
    target.conv_in.weight[:_COLOURS, :, 1, 1] = torch.eye(_COLOURS)
    for level, block in enumerate(target.down_blocks[:2]):
        before = _COLOURS * 4**level
        resnet, halving = block.resnets[0], block.downsamplers[0].conv
        if resnet.conv_shortcut is not None:
            resnet.conv_shortcut.weight[:before, :before, 0, 0] = torch.eye(before)
        # Channel, row, column, as pixel_unshuffle has them.
        halving.weight[: 4 * before, :before, :2, :2] = torch.eye(4 * before).unflatten(1, (before, 2, 2))


def _by_group(values: Tensor, constant: Tensor) -> Tensor:
    """Put what belongs to the features in the order of the channels.

    Args:
        values: Of the features with the one sign, then with the other, [2 * features, ...].
        constant: Of each group's two constant channels, [groups, 2, ...].

    Returns:
        Of all channels, [channels, ...]: group by group, its features, the same with the other sign, its constants.
    """
    positive, negative = values.unflatten(0, (2, len(constant), -1))
    return torch.cat((positive, negative, constant), 1).flatten(0, 1)


def _pixels_as_gathered() -> Tensor:
    """Which of ``pixel_unshuffle``'s values of a patch each channel holds after two halvings, int64 [48]."""
    numbers = torch.arange(_PIXELS).view(1, _PIXELS, 1, 1).float()
    gathered = F.pixel_unshuffle(F.pixel_unshuffle(F.pixel_shuffle(numbers, PATCH_PX), 2), 2)
    return gathered.flatten().long()
