"""How long `mnist-speed` trains and how well: `python bench/mnist_speed.py [SEEDS [THREADS]]`.

The seconds are of training with its loading, wall clock and processor time, without reading the
data set before and evaluating after. The figures go where bench/recipe_report.py keeps those of
runs.
"""

import sys
import time
from pathlib import Path

import recipe_report as kept
import torch

from fastcls import recipes
from fastcls.compare import mean_and_spread
from fastcls.datasets import data_root
from fastcls.train import Trainer

RECIPE = "mnist-speed"


def train(seed: int, device: str = "cpu", root: Path | None = None, **settings) -> dict:
    """The figures of one run, with ``settings`` other than the recipe's."""
    module = recipes.get(RECIPE)
    config = module.Config(seed=seed, **settings)
    data = module.load_data(config, data_root(root))
    trainer = Trainer(module, config, data, torch.device(device))
    processor = 0.0
    while not trainer.is_finished():
        start = time.process_time()
        trainer.train_epoch()
        processor += time.process_time() - start
        trainer.finish_epoch()
    return {
        "test_accuracy": trainer.history[-1]["test_accuracy"],
        "seconds": sum(epoch["seconds"] for epoch in trainer.history),
        "processor_seconds": processor,
    }


def main():
    seeds, threads = ([int(text) for text in sys.argv[1:]] + [5, 1][len(sys.argv) - 1 :])[:2]
    torch.set_num_threads(threads)
    rows = []
    for seed in range(seeds):
        rows.append(train(seed))
        print(seed, rows[-1], flush=True)
    for name in rows[0]:
        print(name, "mean {:.4f}, standard deviation {:.4f}".format(*column(rows, name)))
    run = {"kind": "speed", "recipe": RECIPE, "settings": {"threads": threads}, "seeds": rows}
    kept.keep([run | {"machine": kept.machine()}])


def column(rows: list[dict], name: str) -> tuple[float, float]:
    return mean_and_spread([row[name] for row in rows])


if __name__ == "__main__":
    main()
