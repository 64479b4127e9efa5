"""Build objects from a configuration: one function per kind of object."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from configs.compose import CONFIGS, options, unknown_option
from configs.errors import ConfigError
from datasets import DatasetInfo, SegmentationDataset
from datasets.loaders import EvalLoader, TrainLoader
from rankseg import Predictor
from trainers.distributed import World, wrap
from trainers.losses import SegmentationLoss
from trainers.metrics import Scoring
from trainers.schedules import Schedule
from trainers.update import Update, to_channels_last


def locate(target: str) -> Any:
    """Return the class or function that a ``_target_`` names, such as ``models.TinyUNet``.

    Raises ConfigError if there is none. An error inside its module keeps its traceback.
    """
    module, _, name = target.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"_target_={target}: there is no module {error.name!r}") from None
        raise
    if not hasattr(found, name):
        raise ConfigError(f"_target_={target}: module {module!r} has no {name!r}")
    return getattr(found, name)


def _make(node: Any) -> Any:
    """Call the ``_target_`` of a node with the other values of the node as plain arguments.

    With ``_partial_`` return a function that makes the call. ``name`` is a label and is not passed. Nested nodes are
    not built.
    """
    values: Any = OmegaConf.to_container(node, resolve=True)
    target, partial = values.pop("_target_"), values.pop("_partial_", False)
    values.pop("name", None)
    build = locate(target)
    signature = inspect.signature(build)
    try:
        (signature.bind_partial if partial else signature.bind)(**values)
    except TypeError as error:
        raise ConfigError(f"{target}: {error}. Fix: remove an unexpected key, or add a missing one.") from None
    return functools.partial(build, **values) if partial else build(**values)


def rules(
    names: Iterable[str], cfg: DictConfig | None = None, fitted: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Predictor]:
    """Build the prediction rules of these names from ``configs/predictor``, with the options of ``cfg``.

    ``cfg.protocol.rules`` maps the name of a rule to the rule that replaces it. ``cfg.predictor`` sets the options of
    the rule that it names, ``cfg.threshold`` the threshold of rule T. A ``cfg.gate`` other than 0.5 turns off the
    pruning of ranking rules. Fitted rules need their values in ``fitted``, from `configs.fitting`. Unknown names,
    and invalid options of our own rules, raise ConfigError.
    """
    built = {}
    for name in names:
        node = rule_node(name, cfg)
        if needs_fit(node):
            if not fitted or name not in fitted:
                raise ConfigError(
                    f"rule {name} has values that are fitted to a checkpoint, which is not possible here. "
                    "Fix: score it with test.py, or choose another rule."
                )
            node = OmegaConf.merge(node, dict(fitted[name]))
        built[name] = _make(node)
        if str(node._target_).startswith("rankseg."):
            try:  # a call on four pixels reports invalid options now
                built[name](torch.full((1, 2, 1, 2), 0.5))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"predictor={name}: {error}") from error
    return built


def rule_node(name: str, cfg: DictConfig | None) -> Any:
    """Return the configuration that a rule is built from."""
    actual = name if cfg is None else cfg.protocol.rules.get(name, name)
    if actual not in options("predictor"):
        raise ConfigError(unknown_option("predictor", actual))
    if cfg is not None and cfg.predictor.name == actual:
        node: Any = cfg.predictor.copy()
        OmegaConf.set_struct(node, False)
    else:
        node = OmegaConf.load(CONFIGS / "predictor" / f"{actual}.yaml")
    if actual == "T" and cfg is not None and cfg.get("threshold") is not None:
        node.at = cfg.threshold
    if is_ranking(node) and cfg is not None and cfg.get("gate", 0.5) != 0.5:
        node = OmegaConf.merge(node, {"pruning": False})  # the gate replaces the pruning
    return node


def rule_options(names: Iterable[str], cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return {rule: options that differ from its file} for the rule of ``cfg.predictor``, if one of the names is it.

    The threshold of rule T is left out: see `threshold`.
    """
    rule = cfg.predictor.name
    if rule not in {cfg.protocol.rules.get(name, name) for name in names}:
        return {}
    changed = _changed_options("predictor", cfg)
    if rule == "T":
        changed.pop("at", None)
    return {rule: changed} if changed else {}


def changed_options(names: Iterable[str], cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return `rule_options`, and {"protocol": options that differ from its file} if there are any."""
    protocol = _changed_options("protocol", cfg)
    protocol.pop("results", None)
    return {**({"protocol": protocol} if protocol else {}), **rule_options(names, cfg)}


def _changed_options(group: str, cfg: DictConfig) -> dict[str, Any]:
    """Return the options of a group that differ from the file with its name; empty if no file has this name."""
    files: Any = (OmegaConf.to_container(OmegaConf.load(path)) for path in sorted((CONFIGS / group).glob("*.yaml")))
    usual = next((file for file in files if file.get("name") == cfg[group].name), None)
    if usual is None:  # results with another name are not mixed with those of a file
        return {}
    # The file may hold references, so references are compared.
    stated: Any = OmegaConf.to_container(cfg[group])
    values: Any = OmegaConf.to_container(cfg[group], resolve=True)
    return {key: values[key] for key in stated if (key, stated[key]) not in usual.items()}


def is_ranking(node: Any) -> bool:
    """Return whether the rule of a node maximises an expected score of each image."""
    return node.get("_target_") in ("rankseg.rules.rankdice", "rankseg.rules.rankiou")


def needs_fit(node: Any) -> bool:
    """Return whether the rule of a node needs values that are fitted for a checkpoint; `auto` has no _target_."""
    return str(node.get("_target_", "trainers.fitted.")).startswith("trainers.fitted.")


def threshold(cfg: DictConfig) -> float:
    return rule_node("T", cfg).at


def dataset(cfg: DictConfig, split: str) -> SegmentationDataset:
    """Build one of ``dataset.splits``; raise ConfigError if its ``num_classes`` or ``ignore_index`` is another."""
    if split not in cfg.dataset.splits:
        raise ConfigError(f"split={split} is unknown. Fix: choose one of {', '.join(cfg.dataset.splits)}.")
    data = _make(cfg.dataset.source)(split=cfg.dataset.splits[split])
    for key in ("num_classes", "ignore_index"):
        given, actual = cfg.dataset.get(key), getattr(data.info, key)
        if given not in (None, actual):
            raise ConfigError(
                f"dataset.{key}={given} is invalid: {data.info.name} has {actual}. Fix: set dataset.{key}={actual}."
            )
    return data


def train_loader(cfg: DictConfig, data: SegmentationDataset, world: World) -> TrainLoader:
    """Build the training batches. A last batch with fewer than two images per device is dropped, for BatchNorm."""
    from datasets.transforms import TrainTransform  # slow to import

    batch, settings = cfg.batch_size, cfg.dataset
    if batch < world.size:
        raise ConfigError(
            f"batch_size={batch} is smaller than the number of processes, {world.size}. "
            "Fix: increase batch_size, or start fewer processes."
        )
    transform = TrainTransform(
        data.info.mean, data.info.std, crop=settings.crop, resize=_size(settings.resize),
        rotate=settings.rotate, flip=settings.flip, label_fill=cfg.protocol.label_fill,
    )  # fmt: skip
    drop_last = len(data) > batch and 0 < len(data) % batch < 2 * world.size
    return TrainLoader(data, transform, batch, seed=cfg.seed, drop_last=drop_last, **_loader_options(cfg, world))


def eval_loader(cfg: DictConfig, data: SegmentationDataset, world: World) -> EvalLoader:
    """Build the evaluation batches of the protocol."""
    from datasets.transforms import EvalTransform  # slow to import

    if cfg.protocol.legacy_preprocessing:
        transform = EvalTransform(data.info.mean, data.info.std, crop=cfg.dataset.eval_crop, legacy=True)
    else:
        transform = EvalTransform(data.info.mean, data.info.std, resize=_size(cfg.dataset.resize))
    return EvalLoader(data, transform, cfg.batch_size, **_loader_options(cfg, world))


def _loader_options(cfg: DictConfig, world: World) -> dict[str, Any]:
    """Return the options that both loaders share."""
    return {
        "num_workers": cfg.num_workers,
        "rank": world.rank,
        "world_size": world.size,
        "pin_memory": world.device.type == "cuda",
        "on_error": cfg.on_error,
        "timeout": cfg.loader_timeout,
    }


def _size(value: Any) -> Any:
    return tuple(value) if OmegaConf.is_list(value) else value


def model(cfg: DictConfig) -> nn.Module:
    return _make(cfg.model)


def loss(cfg: DictConfig) -> SegmentationLoss:
    return _make(cfg.loss)


def check_outputs(cfg: DictConfig, network: nn.Module, info: DatasetInfo) -> None:
    """Raise ConfigError if the network or the loss does not fit the classes and the void label of the data set."""
    outputs = getattr(network, "num_classes", info.num_classes)
    if outputs != info.num_classes:
        raise ConfigError(
            f"the network has {outputs} classes and the data set {info.name} has {info.num_classes} "
            f"({', '.join(info.classes[:30])}). Fix: pass dataset.num_classes={info.num_classes}."
        )
    if cfg.loss.get("ignore_index", info.ignore_index) != info.ignore_index:
        raise ConfigError(
            f"loss.ignore_index={cfg.loss.ignore_index} and the data set marks void by {info.ignore_index}. "
            f"Fix: pass dataset.ignore_index={info.ignore_index}."
        )


def update(cfg: DictConfig, network: nn.Module, criterion: nn.Module, world: World) -> Update:
    """Build the update: the network, wrapped and compiled as configured, and its optimizer."""
    if cfg.trainer.channels_last:
        network = to_channels_last(network, world.device, cfg.trainer.precision)
    model = wrap(network, world)
    return Update(
        cast(nn.Module, torch.compile(model)) if cfg.trainer.compile else model,
        criterion,
        optimizer(cfg, network),
        world,
        precision=cfg.trainer.precision,
        accumulate=cfg.trainer.accumulate,
        clip_norm=cfg.trainer.clip_norm,
        channels_last=cfg.trainer.channels_last,
        second_forward=cfg.trainer.second_forward,
    )


def optimizer(cfg: DictConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer: ``backbone_parameters()`` at ``backbone_lr_ratio`` of the rate, others at the full rate."""
    backbone = {id(p) for p in network.backbone_parameters()}  # type: ignore[operator]
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in backbone], "lr": cfg.optimizer.lr},
        {"params": [p for p in trained if id(p) in backbone], "lr": cfg.optimizer.lr * cfg.backbone_lr_ratio},
    ]
    return _make(cfg.optimizer)([group for group in groups if group["params"]])


def schedule(cfg: DictConfig) -> Schedule:
    """Build the learning-rate schedule: (number of the update, number of all updates) -> factor."""
    return _make(cfg.schedule)


def scoring(cfg: DictConfig, info: DatasetInfo) -> Scoring:
    """Build the scoring conventions of the protocol for a data set."""
    protocol = cfg.protocol
    return Scoring(
        num_classes=info.num_classes,
        scored=tuple(info.scored),
        ignore_index=info.ignore_index,
        void=protocol.void,
        paper=protocol.name == "paper",
        legacy_bce_iou=protocol.legacy_bce_iou,
        legacy_soft_dice_void=protocol.legacy_soft_dice_void,
    )


def describe(cfg: DictConfig, data: SegmentationDataset, split: str) -> dict[str, Any]:
    """Return the description of the experiment for a result file."""
    return {
        "protocol": cfg.protocol.name,
        "dataset": {
            "name": cfg.dataset.name,
            "split": split,
            "fingerprint": data.fingerprint(),
            "num_images": len(data),
            "resize": OmegaConf.to_container(cfg.dataset)["resize"],  # type: ignore[index,call-overload]
        },
        "model": cfg.model.name + cfg.suffix,
        "model_detail": OmegaConf.to_container(cfg.model, resolve=True),
        "loss": cfg.loss.name,
        "seed": cfg.seed,
        "classes": list(data.info.classes),
    }


def make_root_absolute(cfg: DictConfig) -> None:
    """Make ``dataset.root`` an absolute path, so that a checkpoint can be tested from any folder."""
    if cfg.dataset.get("root"):
        cfg.dataset.root = str(Path(cfg.dataset.root).expanduser().resolve())
