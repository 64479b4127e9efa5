"""A configuration inside a checkpoint: what goes in, and what is believed on the way out.

A checkpoint may come from anywhere, so nothing in it chooses which Python object is built: the *names* of options
(``model: smp_unet``) are looked up in ``configs/``, plain values are merged over them, and every key that speaks
to Hydra's ``instantiate`` is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.compose import CONFIGS, GROUPS, compose, options, spelled, unknown_key, unknown_option
from configs.free import FREE
from configs.values import check_values

_INSTANTIATE = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
# ${dataset.root} refers to another key; whatever else stands in ${} may call a resolver, such as oc.env.
_REFERENCE = re.compile(r"\$\{[\w.]+\}")


def pack(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """The configuration as plain containers, for a checkpoint."""
    for group in GROUPS:
        if not isinstance(choices.get(group), str):
            raise ValueError(
                f"{group}= takes one option, not a list; {group} is one of: {', '.join(options(group))}"
            )
    values = OmegaConf.to_container(cfg, resolve=False)
    return {"choices": {group: choices[group] for group in GROUPS}, "values": values}


def unpack(stored: Any, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a checkpoint with overrides on top, and the options of ``configs/test.yaml``.

    Raises:
        ValueError: the stored configuration is not one of ours, an override names what does not exist, or a value
            cannot be used.
    """
    parts = stored if isinstance(stored, dict) else {}
    if set(parts) != {"choices", "values"} or not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(
            "the checkpoint holds no configuration of this project; it cannot be tested without one"
        )
    groups, values = _split(overrides)
    choices = {**stored["choices"], **groups}
    for group, name in choices.items():
        if group not in GROUPS or name not in options(group):
            raise ValueError(
                unknown_option(group, str(name)) if group in GROUPS else f"{group} is no configuration group"
            )
    cfg = compose("train", [f"{group}={name}" for group, name in choices.items()])
    OmegaConf.set_struct(cfg, False)
    cfg = OmegaConf.merge(cfg, OmegaConf.load(CONFIGS / "test.yaml"))  # type: ignore[assignment]
    for key, value in stored["values"].items():
        if _harmless(key).partition(".")[0] not in groups:
            OmegaConf.update(cfg, key, _plain(value), merge=True)
    OmegaConf.set_struct(cfg, True)
    for key, value in values:
        if OmegaConf.select(cfg, key, default=_MISSING) is _MISSING:
            raise ValueError(unknown_key(key, cfg))
        OmegaConf.update(cfg, key, value, merge=True)
    check_values(cfg)
    return cfg


_MISSING = object()


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, Any]]]:
    """Overrides that choose an option (``protocol=paper``), and those that set a value."""
    groups: dict[str, str] = {}
    values: list[tuple[str, Any]] = []
    for override in OverridesParser.create().parse_overrides(spelled(overrides)):
        key = override.get_key_element().lstrip("+~")
        if override.is_delete() or override.is_sweep_override():
            raise ValueError(f"{override.input_line}: test.py takes key=value and group=option only")
        if not key:
            raise ValueError(f"{override.input_line} names no key: write key=value")
        if key in GROUPS:
            groups[key] = str(override.value())
        else:
            values.append((key, override.value()))
    return groups, values


def _harmless(key: Any) -> str:
    """A stored key, such as ``dataset.crop``, that does not lead to what Hydra builds."""
    if not isinstance(key, str) or _INSTANTIATE & set(re.split(r"[.\[\]]", key)):
        raise ValueError(f"the checkpoint's configuration holds the key {key!r}, which is not allowed there")
    return key


def _plain(value: Any) -> Any:
    """A stored value without anything that could choose code or read the environment."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in _INSTANTIATE}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise ValueError(f"the checkpoint's configuration holds {value!r}, which is not allowed there")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that a run wrote into its folder.

    Raises ValueError where it is damaged.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or "epochs" not in found:
        raise ValueError(
            f"{path} is damaged: remove it, and the run goes on from its checkpoints, which hold the same; "
            "or start over with resume=false"
        )
    return {str(key): value for key, value in found.items()}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The keys in which two runs differ so that their numbers could, as ``key: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in [*old, *(k for k in new if k not in old)]:
            name = f"{prefix}{key}"
            if name not in FREE:
                found += differences(old.get(key), new.get(key), f"{name}.")
        return found
    return [] if old == new else [f"{prefix[:-1]}: {old} -> {new}"]
