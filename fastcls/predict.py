"""A checkpoint's likeliest classes for images, printed and drawn."""

import os
import sys
from dataclasses import fields
from pathlib import Path

import torch

from fastcls import recipes
from fastcls.data import Input, MemoryBatches
from fastcls.errors import UserError
from fastcls.files import load_checkpoint
from fastcls.folders import open_image

TOP = 5


class Predictor:
    """A trained model and what it takes to use it on images.

    Args:
        checkpoint: ``best.pt`` or ``last.pt`` of a run.
        device: default ``"cpu"``.
        layers: ``"fused"`` or ``"native"``; default: as it was trained.

    Raises:
        UserError: the file is absent, damaged or no checkpoint of a run.
    """

    def __init__(
        self, checkpoint: str | os.PathLike, device: str = "cpu", layers: str | None = None
    ):
        self.device = torch.device(device)
        state = load_checkpoint(Path(checkpoint), self.device)
        try:
            module, settings = recipes.get(state["recipe"]), state["config"]
            self.classes, self.input = state["classes"], Input(**state["input"])
            weights = state["model"]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{checkpoint} is no checkpoint of a run of fastcls train") from error
        # The weights come from the checkpoint, wherever training took its first ones from.
        changes = {"weights": "none"} | ({"layers": layers} if layers else {})
        known = {field.name for field in fields(module.Config)}
        config = module.Config(**{k: v for k, v in (settings | changes).items() if k in known})
        self.model = module.build_model(config, len(self.classes)).to(self.device).eval()
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{checkpoint} has the weights of another model: {error}") from error

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [N, classes] of uint8 images [N, C, size, size]."""
        labels = torch.zeros(len(images), dtype=torch.int64)
        batches = MemoryBatches(images, labels, 64, self.input).to(self.device)
        return torch.cat([self.model(x).float().softmax(1).cpu() for x, _ in batches.epoch()])


def predict(
    checkpoint: str | os.PathLike, files: list[str], out: str, *, invert: bool = False, **options
) -> None:
    """Print the likeliest classes of each image file and draw them beside it into ``out``.

    Args:
        checkpoint, options: as of :class:`Predictor`.
        files: the images.
        out: the picture.
        invert: the model gets black as white and white as black. Default False.

    Raises:
        UserError: the checkpoint or an image cannot be read.
    """
    from fastcls import plots  # matplotlib takes its time

    plots.check_file(out)
    predictor = Predictor(checkpoint, **options)
    photos = [open_image(file) for file in files]
    inputs = torch.stack([predictor.input.prepare(photo) for photo in photos])
    if invert:
        inputs = 255 - inputs
    probabilities = predictor(inputs)
    best = probabilities.topk(min(TOP, len(predictor.classes)))
    width = max(map(len, predictor.classes))
    guesses = []
    for file, values, places in zip(files, best.values, best.indices, strict=True):
        guesses.append(
            [(predictor.classes[i], p) for i, p in zip(places, values.tolist(), strict=True)]
        )
        print(file)
        for name, probability in guesses[-1]:
            print(f"  {name:<{width}}  {probability:>7.2%}")
    plots.guesses(photos, inputs, guesses, Path(out))
    print(f"drawn in {out}")
    swapped = [f for f, image in zip(files, inputs, strict=True) if _is_dark_on_light(image)]
    if swapped:
        print(
            "fastcls: note: dark on light, where the model learned from light on dark: "
            f"{', '.join(swapped)}; try {'without' if invert else 'with'} --invert",
            file=sys.stderr,
        )


def _is_dark_on_light(image: torch.Tensor) -> bool:
    """Is a grey image [1, h, w] lighter at its border than elsewhere?

    Of the 141,437 of MNIST, Fashion-MNIST and scikit-learn's digits one is.
    """
    border = torch.cat([image[0, 0], image[0, -1], image[0, :, 0], image[0, :, -1]])
    return len(image) == 1 and border.median().item() > image.float().mean().item()
