"""The U-Net of the report's section 4.2: Ronneberger et al. 2015 with padding, batch norm, LeakyReLU and dropout.

    level   one resolution of the U; its width is its number of channels
    block   twice: 3x3 convolution, dropout, batch norm, LeakyReLU
    skip    the encoder's features of a level, concatenated with the decoder's features of this level
    head    the 1x1 convolution to one logit for each class

Shapes here and everywhere: B batch, K classes, C channels, H W pixels, N tiles.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from common import geometry


def block(in_channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    """Build two padded 3x3 convolutions, each with its own dropout, batch norm and LeakyReLU; H and W stay."""
    layers = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, kernel_size=3, padding=1),
            nn.Dropout2d(dropout) if dropout else nn.Identity(),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net with one level for each of `widths`; the last level is the bottleneck.

    The defaults are the report's large network (7,766,051 parameters); its small one is
    `UNet(widths=(32, 64, 128, 256), dropout=0)` (1,928,483 parameters).
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256, 512), dropout: float = 0.5,
                 classes: int = 3, in_channels: int = 3):
        super().__init__()
        self.multiple = geometry.multiple(len(widths))
        self.encoder = nn.ModuleList(block(a, b, dropout) for a, b in pairwise([in_channels, *widths]))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(block(2 * width, width, dropout) for width in widths[:-1])
        self.head = nn.Conv2d(widths[0], classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W) into logits (B, K, H, W). `self.multiple` must divide H and W."""
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise ValueError(f"a U-Net of {len(self.encoder)} levels needs heights and widths that are multiples of "
                             f"{self.multiple}, not {x.shape[-2]} x {x.shape[-1]}")
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the features of each level for normalised images; the last are the bottleneck's."""
        features = [self.encoder[0](x)]                                              # (B, widths[0], H, W)
        for convolve in self.encoder[1:]:
            features.append(convolve(self.pool(features[-1])))                       # (B, widths[l], H/2^l, W/2^l)
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Turn the features of each level into logits (B, K, H, W). All may be cut to the same part of the image."""
        *skips, x = features
        for level in reversed(range(len(skips))):
            x = torch.cat([skips[level], self.up[level](x)], dim=1)                  # (B, 2 widths[l], H/2^l, W/2^l)
            x = self.decoder[level](x)                                               # (B, widths[l], H/2^l, W/2^l)
        return self.head(x)                                                          # (B, K, H, W)
