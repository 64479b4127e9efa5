"""Load the checkpoints that the authors of RankSEG released into the networks of this project.

Source: the released code and logs of Dai & Li, "RankSEG: A Consistent Ranking-based Framework for
Segmentation", JMLR 24(224), 2023. A released checkpoint holds ``arch`` (always "DataParallel"), ``epoch``,
``state_dict`` (each key starting with ``module.``), ``optimizer``, ``monitor_best`` and ``config``, a JSON.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from models.deeplabv3plus import DeepLabV3Plus
from models.fcn8 import FCN8, bilinear_kernel
from models.pspnet import PSPNet
from models.reading import CheckpointError, check_epoch, load_state, plain_key

NETWORKS = {"deeplabv3plus": DeepLabV3Plus, "pspnet": PSPNet, "fcn8": FCN8}

MODELS = {"DeepLab": "deeplabv3plus", "PSPNet": "pspnet", "FCN8": "fcn8"}
DATASETS = {"CityScapes": "cityscapes", "VOC": "voc2012", "kvasirSEG": "kvasir_seg"}
NUM_CLASSES = {"cityscapes": 19, "voc2012": 21, "kvasir_seg": 2}
LOSSES = {
    "CrossEntropyLoss2d": "ce",
    "FocalLoss": "focal",
    "BCEWithLogitsLoss2d": "bce",
    "BCEWithLogitsFocalLoss2d": "bce_focal",
    "DiceLoss": "soft_dice",
    "LogCoshDiceLoss": "log_cosh_dice",
    "BDiceLoss": "b_soft_dice",
    "BCEDiceLoss": "b_soft_dice",  # name in the logs
    "LovaszSoftmax": "lovasz",
    "CE_DiceLoss": "ce_dice",
}
PREDICTORS = {name: name for name in ("T", "max", "rankdice")}

# (pattern of a released name, our name), tried in order; a replacement may be a function.
_KEYS: dict[str, list[tuple[str, Any]]] = {
    "deeplabv3plus": [
        (r"backbone\.layer0\.0\.", "backbone.conv1."),
        (r"backbone\.layer0\.1\.", "backbone.bn1."),
        (r"backbone\.layer([1-4])\.", r"backbone.layer\1."),
        (r"ASSP\.aspp([1-4])\.", lambda m: f"aspp.branches.{int(m[1]) - 1}."),
        (r"ASSP\.avg_pool\.", "aspp.image."),
        (r"ASSP\.conv1\.", "aspp.merge.0."),
        (r"ASSP\.bn1\.", "aspp.merge.1."),
        (r"decoder\.conv1\.", "low_level.0."),
        (r"decoder\.bn1\.", "low_level.1."),
        (r"decoder\.output\.", "decoder."),
    ],
    "pspnet": [
        (r"initial\.0\.", "backbone.conv1."),
        (r"initial\.1\.", "backbone.bn1."),
        (r"layer([1-4])\.", r"backbone.layer\1."),
        (r"master_branch\.0\.stages\.", "pyramid.levels."),
        (r"master_branch\.0\.bottleneck\.", "pyramid.merge."),
        (r"master_branch\.1\.", "classifier."),
        (r"auxiliary_branch\.", "auxiliary."),
    ],
    "fcn8": [
        (r"pool3\.(\d+)\.", r"features.\1."),
        (r"pool4\.(\d+)\.", lambda m: f"features.{int(m[1]) + 17}."),
        (r"pool5\.(\d+)\.", lambda m: f"features.{int(m[1]) + 24}."),
        (r"adj_pool([34])\.", r"pool\1."),
        (r"output\.", "classifier."),
    ],
}
# A tensor that only this network has. Its first dimension is the number of classes.
_CLASS_BIASES = {"deeplabv3plus": "decoder.output.7.bias", "pspnet": "master_branch.1.bias", "fcn8": "output.6.bias"}
# FCN8's transposed convolutions with fixed bilinear weights, and their kernel sizes.
_BILINEAR_KERNELS = {"up_output.weight": 4, "up_pool4_out.weight": 4, "up_final.weight": 16}


def is_published(checkpoint: dict[str, Any]) -> bool:
    """Return whether the content of a checkpoint has the format of the released ones."""
    return "arch" in checkpoint and all(isinstance(checkpoint.get(k), dict) for k in ("state_dict", "config"))


def load_published(checkpoint: dict[str, Any], source: str = "the checkpoint") -> tuple[nn.Module, dict[str, Any]]:
    """Return the network (CPU, evaluation mode) and the translated configuration of a released checkpoint.

    ``checkpoint`` is the result of ``read_checkpoint``. Raises CheckpointError, which names the ``source``, if it is
    not a released checkpoint or is inconsistent.
    """
    if not is_published(checkpoint):
        raise CheckpointError(
            f"{source} is not a released checkpoint. Fix: choose a file with arch, state_dict and config."
        )
    config = translate_config(checkpoint["config"], source)
    state = checkpoint["state_dict"]
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()):
        raise CheckpointError(f"{source}: state_dict does not map names to tensors. Fix: use an undamaged file.")
    state = {plain_key(key): tensor for key, tensor in state.items()}
    name, dataset = config["choices"]["model"], config["choices"]["dataset"]
    bias = _CLASS_BIASES[name]
    if bias not in state or not state[bias].ndim:
        raise CheckpointError(f"{source} is of a {name} but has no tensor {bias!r}. Fix: use a released file.")
    num_classes = state[bias].shape[0]
    if num_classes != NUM_CLASSES[dataset]:
        raise CheckpointError(
            f"{source} was trained for {num_classes} classes, but its data set {dataset} has {NUM_CLASSES[dataset]}. "
            "Fix: use an undamaged file."
        )
    check_epoch(checkpoint.get("epoch", 0), source)
    with torch.device("meta"):  # the checkpoint has all weights, so none are initialised
        network = NETWORKS[name](num_classes)
    load_state(network, translate_state(name, state, source), source)
    return network.eval(), config


def translate_state(name: str, state: dict[str, Tensor], source: str = "the state dict") -> dict[str, Tensor]:
    """Rename the tensors of a released state dict (without ``module.``) for our network ``name``.

    The three transposed convolutions of FCN8 are constants here. They are removed if they are bilinear.
    """
    translated = {}
    for key, tensor in state.items():
        if name == "fcn8" and key in _BILINEAR_KERNELS:
            if not _is_bilinear(tensor, _BILINEAR_KERNELS[key]):
                raise CheckpointError(
                    f"{source} has a trained {key!r}, which is fixed in FCN8. Fix: use a released file."
                )
            continue
        ours = (re.sub(pattern, new, key, count=1) for pattern, new in _KEYS[name] if re.match(pattern, key))
        new_key = next(ours, None)
        if new_key is None:
            raise CheckpointError(
                f"{source} has a tensor {key!r} that {name} does not have. Fix: use an undamaged file."
            )
        translated[new_key] = tensor
    return translated


def _is_bilinear(weight: Tensor, size: int) -> bool:
    """Return whether a transposed convolution (C, C, size, size) upsamples each class bilinearly."""
    if weight.shape[1:] != (*weight.shape[:1], size, size):
        return False
    wanted = torch.eye(len(weight))[..., None, None] * bilinear_kernel(size)
    return torch.allclose(weight.detach().float().cpu(), wanted, atol=1e-6)


def translate_config(config: dict[str, Any], source: str = "the configuration") -> dict[str, Any]:
    """Translate a released JSON configuration into the form that our checkpoints hold: names of options, and values.

    A missing predictor is T, a missing temperature 1, and a missing threshold 0.5; other missing values are left out.
    Data set and crop come from ``train_loader``, and the batch size and crop of the evaluation from ``test_loader``. If
    that loader is missing, they come from another one.
    """
    predict = _mapping(config, "predict")
    loaders = {name: _mapping(config, f"{name}_loader") for name in ("train", "val", "test")}
    train, test = (
        [loaders[name] for name in order if loaders[name]]
        for order in (("train", "test", "val"), ("test", "val", "train"))
    )
    try:  # older runs lack these two settings and used the values that became their defaults
        temperature, threshold = float(predict.get("temperature", 1.0)), float(predict.get("threshold", 0.5))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{source} has an invalid temperature or threshold: {error}. Fix: use an undamaged file."
        ) from None
    choices = {
        "dataset": _translate_name(DATASETS, train[0].get("type") if train else None, "data set", source),
        "model": _translate_name(MODELS, _mapping(config, "arch").get("type"), "model", source),
        "loss": _translate_name(LOSSES, config.get("loss"), "loss", source),
        "predictor": _translate_name(PREDICTORS, predict.get("test", "T"), "predictor", source),
        "optimizer": "sgd",
        "schedule": "poly",
        "protocol": "paper",
        "trainer": "default",
    }
    epochs, batch_size = _mapping(config, "trainer").get("epochs"), _argument(test, "batch_size")
    crops = {"crop": _argument(train, "crop_size"), "eval_crop": _argument(test, "crop_size")}
    values = {"temperature": temperature, "threshold": threshold, "epochs": epochs, "batch_size": batch_size}
    return {"choices": choices, "values": {**_drop_none(values), "dataset": _drop_none(crops)}}


def _drop_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _mapping(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _argument(loaders: list[dict[str, Any]], key: str) -> Any:
    """Return an argument of the first loader that has it."""
    return next((args[key] for loader in loaders if key in (args := _mapping(loader, "args"))), None)


def _translate_name(names: dict[str, str], name: Any, kind: str, source: str) -> str:
    """Return our name of a released ``name``; raise CheckpointError if it is unknown."""
    if not isinstance(name, str) or name not in names:
        raise CheckpointError(f"{source} has an unknown {kind} {name!r}: expected one of {', '.join(names)}.")
    return names[name]
