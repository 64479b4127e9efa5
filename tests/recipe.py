"""Released checkpoints made up from the recipe of the recordings, without the 240 MB that they would take.

The recipe fills every tensor from a random generator seeded by its name, as the recorded original was filled.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

ARCHES = {"deeplabv3plus": "DeepLab", "pspnet": "PSPNet", "fcn8": "FCN8"}
LAYOUTS = {"deeplabv3plus": "DeepLab_resnet101", "pspnet": "PSPNet_resnet50", "fcn8": "FCN8"}
DATASETS = {19: "CityScapes", 2: "kvasirSEG", 21: "VOC"}
SEED = 7
# With gain 1 the scaled branches of FCN8 are all but invisible; the longer set of recordings turns them up.
VISIBLE = {"adj_pool3.weight": 2e8, "adj_pool4.weight": 2e4}


def fill(key: str, shape: list[int], gain: float) -> torch.Tensor:
    """One tensor of the recipe: a function of its name and shape alone."""
    rng = np.random.default_rng(zlib.crc32((str(SEED) + key).encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.startswith("up_"):
        positions = np.arange(shape[-1])
        tent = 1 - abs(positions - (shape[-1] - 1) / 2) / (shape[-1] / 2)
        values = np.eye(shape[0])[:, :, None, None] * np.outer(tent, tent)
    elif key.endswith("running_var"):
        values = 1 + 0.1 * rng.random(shape)
    elif key.endswith(("running_mean", "bias")):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        values = 1 + 0.1 * rng.standard_normal(shape)
    else:
        values = np.empty(math.prod(shape), np.float32)
        for part in np.split(values, range(2**20, len(values), 2**20)):  # the largest has a gigabyte in float64
            part[:] = math.sqrt(gain / math.prod(shape[1:])) * rng.standard_normal(len(part))
        values = values.reshape(shape)
    return torch.from_numpy(np.asarray(values, np.float32))


def released_config(name: str, num_classes: int, **changes: Any) -> dict[str, Any]:
    """The JSON configuration of a released checkpoint, as far as anything reads it."""
    loader = {"type": DATASETS[num_classes], "args": {"batch_size": 8, "crop_size": 320, "split": "train"}}
    return {
        "name": ARCHES[name],
        "arch": {"type": ARCHES[name], "args": {"backbone": "resnet101"}},
        "train_loader": loader,
        "test_loader": loader,
        "loss": "CrossEntropyLoss2d",
        "predict": {"temperature": 1.0, "CoI": "all", "train": "T", "val": "T", "test": "T", "threshold": 0.5},
        "trainer": {"epochs": 150},
    } | changes


def released(recordings: Path, name: str, num_classes: int, full: bool = True, **changes: Any) -> dict[str, Any]:
    """The checkpoint of a network, as torch.load would return it; `changes` are of its configuration.

    full: whether the gains are those of golden/full, where all branches of FCN8 are visible.
    """
    layouts = json.loads((recordings / "full/layouts.json").read_text())
    state = {}
    for key, entry in layouts[LAYOUTS[name]]["state_dict"].items():
        shape = [num_classes if size == 19 else size for size in entry["shape"]]
        gain = VISIBLE.get(key, 2.0) if full and name == "fcn8" else 1.0
        state[f"module.{key}"] = fill(key, shape, gain)
    return {
        "arch": "DataParallel",
        "epoch": 150,
        "state_dict": state,
        "optimizer": {},
        "monitor_best": np.float64(2.6),
        "config": released_config(name, num_classes, **changes),
    }
