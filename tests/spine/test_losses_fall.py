"""Each published network learns with each published loss: a few steps on one batch of real images lower it.

As a script it prints the table of docs/fidelity.md: ``python tests/spine/test_losses_fall.py data``. The
test makes every layer a quarter as wide and takes twice the steps: a twentieth of the time, and no fall that is as
small as rounding.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # as a script, this file's own folder comes first

from configs import build  # noqa: E402
from configs.compose import compose  # noqa: E402
from trainers.distributed import World  # noqa: E402
from trainers.update import Update  # noqa: E402

MODELS = ("deeplabv3plus", "pspnet", "fcn8")
LOSSES = ("ce", "focal", "bce", "soft_dice", "b_soft_dice", "lovasz")
ROOTS = {"kvasir_seg": "Kvasir-SEG", "voc2012": "."}
STEPS, CROP, BATCH = 6, 64, 2
RATES = {("deeplabv3plus", "lovasz"): ["optimizer.lr=0.02"]}  # with the default rate, 6 updates move it by noise alone


def run(data: Path, dataset: str, model: str, loss: str, steps: int = STEPS, *more: str) -> list[float]:
    """Losses of one batch at each update, and after the last, from random weights and without dropout."""
    overrides = [f"dataset={dataset}", f"dataset.root={data / ROOTS[dataset]}", f"model={model}", f"loss={loss}"]
    sizes = [f"dataset.resize={CROP}", f"dataset.crop={CROP}", f"batch_size={BATCH}", "optimizer=sgd"]
    cfg = compose("train", [*overrides, *sizes, *more])
    torch.manual_seed(0)
    network = build.model(cfg)
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0  # it would hide small falls behind noise
    where = World(0, 1, torch.device("cpu"))
    batch = next(build.train_loader(cfg, build.dataset(cfg, "train"), where).epoch(0))
    update = Update(network.train(), build.loss(cfg), build.optimizer(cfg, network), where)
    return [update(batch) for _ in range(steps + 1)]


def table(data: Path) -> Iterator[str]:
    """Rows of Markdown: the first loss and the last."""
    yield f"| data | network | {' | '.join(LOSSES)} |"
    yield f"|---|---|{'---|' * len(LOSSES)}"
    for dataset, model in itertools.product(ROOTS, MODELS):
        cells = []
        for loss in LOSSES:
            values = run(data, dataset, model, loss)
            cells.append(f"{values[0]:.4f} → {values[-1]:.4f}{'' if values[-1] < values[0] else ' !'}")
        yield f"| {dataset} | {model} | {' | '.join(cells)} |"


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", ROOTS)
def test_the_loss_falls(real_data: Path, dataset: str, model: str, loss: str) -> None:
    values = run(real_data, dataset, model, loss, 2 * STEPS, "+model.narrow=4", *RATES.get((model, loss), ()))
    assert values[-1] < values[0] and values[STEPS] < values[0], values


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in table(Path(sys.argv[1])):
        print(row, flush=True)
