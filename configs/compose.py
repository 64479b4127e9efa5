"""Compose and list the configurations of this folder; messages for unknown keys and options."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

CONFIGS = Path(__file__).parent
GROUPS = ("dataset", "model", "loss", "optimizer", "schedule", "predictor", "protocol", "trainer")


def compose(name: str = "train", overrides: Iterable[str] = (), **options: bool) -> DictConfig:
    """Compose a configuration as the command line does, also outside a function of ``hydra.main``."""
    if GlobalHydra.instance().is_initialized():
        return hydra_compose(name, quote_overrides(overrides), **options)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose(name, quote_overrides(overrides), **options)


def quote_overrides(words: Iterable[str]) -> list[str]:
    """Put quotes around values that Hydra's grammar cannot read, such as paths with `~`, umlauts or brackets.

    A comma makes a sweep, except in a path that exists: `dataset.root=/data/a,b`.
    """
    parser, found = OverridesParser.create(), list[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if equals and not word.startswith("-") and not value.startswith(("[", "{", "'", '"')):
            try:
                sweep = parser.parse_override(word).is_sweep_override() and "," in value
                readable = not (sweep and Path(value).expanduser().exists())
            except HydraException:
                readable = False
            if not readable:
                # Inside Hydra's quotes, only backslashes before a quote are escaped.
                escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
                word = f"{key}='{escaped}{value[len(value.rstrip(chr(92))) :]}'"
        found.append(word)
    return found


def options(group: str) -> list[str]:
    """Return the options of a configuration group, such as ``predictor``."""
    folder = CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def unknown_option(group: str, name: str) -> str:
    """Return the message for an option that does not exist."""
    allowed = options(group)
    return f"{group}={name} is unknown{_suggest(name, allowed)}; {group} is one of: {', '.join(allowed)}"


def unknown_key(key: str, config: Any = None) -> str:
    """Return the message for a key that is not in the configuration; default: that of ``train.py``."""
    node = compose("train") if config is None else config
    *path, name = key.split(".")
    for depth, part in enumerate(path):
        if not OmegaConf.is_dict(node) or part not in node:
            path, name = path[:depth], part  # the first unknown part
            break
        node = node._get_node(part)
    allowed = [str(k) for k in node if not str(k).startswith("_")] if OmegaConf.is_dict(node) else []
    if not path:
        allowed += sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and not p.name.startswith("_"))
    key, place = ".".join([*path, name]), f"in {'.'.join(path)}" if path else "at the top"
    listed = ", ".join(dict.fromkeys(allowed))
    return f"{key} is not a key of the configuration{_suggest(name, allowed)}; {place} there are: {listed}"


def _suggest(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
