"""What small filters make of a photo, drawn; the fused block does the work."""

import os
from pathlib import Path

import torch

from fastcls.errors import UserError, import_extra
from fastcls.folders import open_image
from fastcls.functional import conv_block

SOBEL_X = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
RING = torch.tensor(
    [
        [0.0, 0, -1, 0, 0],
        [0, -1, -2, -1, 0],
        [-1, -2, 16, -2, -1],
        [0, -1, -2, -1, 0],
        [0, 0, -1, 0, 0],
    ]
)
BLUR = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])) / 16
# For the grey photo; "5 x 5" is a Laplacian of a Gaussian, the fractions are a Gaussian.
PHOTO_FILTERS = {"Sobel x": SOBEL_X, "Sobel y": SOBEL_X.T, "5 x 5": RING, "fractions": BLUR}

EDGE = torch.tensor([-1.0, -1, 1, 1]).expand(4, 4)
# The weights of a conv layer [4, 1, 4, 4].
LAYER_FILTERS = {
    "vertical edge": EDGE,
    "its negative": -EDGE,
    "its transpose": EDGE.T,
    "the negative of that": -EDGE.T,
}
STAGES = {
    "before activation": {"activation": None, "pool_size": None},
    "after ReLU": {"pool_size": None},
    "after max-pool 2": {},
}


def filter_photo(photo: torch.Tensor) -> dict[str, torch.Tensor]:
    """``photo`` [H, W] through each of ``PHOTO_FILTERS``: maps [H, W], the border padded by 0."""
    return {
        name: conv_block(
            photo[None],
            weight[None, None].contiguous(),
            padding=len(weight) // 2,
            **STAGES["before activation"],
        )[0]
        for name, weight in PHOTO_FILTERS.items()
    }


def activation_maps(photo: torch.Tensor) -> dict[str, torch.Tensor]:
    """``photo`` [H, W] through a layer of ``LAYER_FILTERS``: maps [4, h, w] at each stage."""
    weight = torch.stack(list(LAYER_FILTERS.values())).unsqueeze(1)
    return {name: conv_block(photo[None], weight, **stage) for name, stage in STAGES.items()}


def draw(file: str | os.PathLike, out: str | os.PathLike) -> list[Path]:
    """Draw the filters with their values, and what they make of a photo.

    Args:
        file: an image; it is turned to grey.
        out: the folder of the pictures.

    Returns:
        The pictures.

    Raises:
        UserError: the image cannot be read, or is too small for the filters.
    """
    from fastcls import plots  # matplotlib takes its time

    pixels = import_extra("numpy").asarray(open_image(file).convert("L"))
    photo = torch.from_numpy(pixels / 255).float()
    least = EDGE.shape[0] + 1  # what the layer and the pool after it need
    if min(photo.shape) < least:
        size = " x ".join(map(str, photo.shape))
        raise UserError(
            f"image {Path(file)} must have at least {least} x {least} pixels, has {size}"
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("photo-filters.png", "photo-maps.png", "layer-filters.png", "layer-maps.png")
    files = [folder / name for name in names]
    plots.filters(PHOTO_FILTERS, files[0])
    plots.maps({"grey photo": photo} | filter_photo(photo), files[1])
    plots.filters(LAYER_FILTERS, files[2])
    plots.stages(activation_maps(photo), list(LAYER_FILTERS), files[3])
    return files
