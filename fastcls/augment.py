"""Augmentation of whole batches on their device, with numbers of its own for every image.

The transforms of torchvision draw once per call, so on a batch they turn all images alike.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class RandomAffine:
    """Turn and shift each image by amounts of its own, in one bilinear resampling.

    What comes in from outside the image is 0.

    Args:
        degrees: angles are uniform in -degrees..degrees. Default 0.
        shift: shifts are uniform in -shift..shift, as parts of the image's height and width.
            Default 0.
    """

    degrees: float = 0.0
    shift: float = 0.0

    def draw(self, images: int, generator: torch.Generator) -> torch.Tensor:
        """The numbers for so many images: float32 [images, 3], each uniform in -1..1."""
        return torch.rand(images, 3, generator=generator) * 2 - 1

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Resample float32 ``images`` [B, C, H, W] by the rows of ``drawn`` [B, 3]."""
        height, width = images.shape[2:]
        angle = drawn[:, 0] * math.radians(self.degrees)
        cos, sin = angle.cos(), angle.sin()
        # Coordinates run from -1 to 1 over the image, so a whole image is 2 wide; an image that
        # is not square is turned in pixels, not in these coordinates.
        shift_x, shift_y = (2 * self.shift * drawn[:, 1:]).unbind(1)
        rows = (
            torch.stack([cos, -sin * (height / width), shift_x], 1),
            torch.stack([sin * (width / height), cos, shift_y], 1),
        )
        grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
