"""Write and read the configuration in a checkpoint or in a run's folder.

A checkpoint may come from anywhere, so its configuration is not trusted. It holds the *names* of options
(``model: smp_unet``), which must be files in ``configs/``, and plain values. A value is accepted if it passes the check
of its key. A key that our configuration does not have is accepted only as the name of a split or an argument of the
class or function that this part of the configuration builds. Stored references (``${...}``) are not resolved. A stored
value cannot choose which Python object is built, which rule a name stands for, or where results are written.
``dataset.root`` is accepted. It is the folder that a data set is read from, unless ``dataset.root=PATH`` is given.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from configs.compose import CONFIGS, GROUPS, compose, options, quote_overrides, unknown_key, unknown_option
from configs.errors import ConfigError, UserError
from configs.files import check_plain, read_yaml
from configs.values import CHECKS, FLAG, Check, check_values

# Config keys that do not define the experiment. They are ignored when two runs are compared.
NON_RESULT_KEYS = frozenset(
    {
        "expected", "loader_timeout", "num_workers", "device", "verify", "resume", "validation", "save_dir", "run_dir",
        "dataset.root", "dataset.source.root",
        "trainer.tensorboard", "trainer.panels", "trainer.save_minutes", "trainer.save_every", "trainer.keep",
    }
)  # fmt: skip
# Keys whose values are never read from a checkpoint.
NOT_FROM_CHECKPOINT = frozenset(
    {
        "protocol", "predictor.name", "loss.name",  # names and contents that our files define
        "save_dir", "run_dir",  # folders that are written
        "model.weights",  # a checkpoint replaces them
        "device", "loader_timeout", "hydra",  # settings of the machine
        "verify", "resume", "validation", "expected",  # what a command does with a run
    }
)  # fmt: skip
# Keys that only train.py uses.
_TRAINING_KEYS = (
    "epochs", "backbone_lr_ratio", "validation", "verify", "save_dir", "run_dir", "resume", "model.weights",
    "optimizer", "schedule", *(key for key in CHECKS if key.startswith("trainer.") and key != "trainer.precision"),
)  # fmt: skip
_HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
_KEY = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)
_WORD = re.compile(r"[\w.+-]{1,64}")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_MISSING = object()


def pack(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration as plain containers for a checkpoint, every reference resolved."""
    for group in GROUPS:
        if not isinstance(choices.get(group), str):
            raise ConfigError(f"{group}= takes one option, not a list. Fix: choose one of {', '.join(options(group))}.")
    values = _drop_keys(OmegaConf.to_container(cfg, resolve=True))
    return {"choices": {group: choices[group] for group in GROUPS}, "values": values}


def _drop_keys(values: Any, prefix: str = "") -> Any:
    """Remove the keys that `unpack` does not accept."""
    if not isinstance(values, dict):
        return values
    return {
        key: _drop_keys(value, f"{prefix}{key}.")
        for key, value in values.items()
        if key not in _HYDRA_KEYS and f"{prefix}{key}" not in NOT_FROM_CHECKPOINT
    }


def unpack(stored: Any, overrides: Sequence[str] = (), rules: Sequence[str] | None = None) -> DictConfig:
    """Return the configuration of a checkpoint with overrides on top, and the options of ``configs/test.yaml``.

    ``rules`` are the rules that the command applies; None: any. If there is a single one, ``predictor.KEY=VALUE``
    without ``predictor=RULE`` is an option of it. Stored values of overridden keys are not read. Raises ConfigError if
    the stored configuration is not one of ours, a value is invalid, or an override names an unknown key, a key that
    only train.py uses, or another rule.
    """
    reject_overrides(overrides, {**dict.fromkeys(_TRAINING_KEYS, ""), "device": "--device"})
    check_plain(stored, "the checkpoint's configuration", max_items=20_000)
    if not (isinstance(stored, dict) and set(stored) == {"choices", "values"}) or not all(
        isinstance(part, dict) for part in stored.values()
    ):
        raise ConfigError(
            "the checkpoint holds no configuration of this project, without which it cannot be tested. "
            "Fix: choose a checkpoint that train.py wrote."
        )
    groups, assigned = _split_overrides(overrides)
    keys = [key for key, _ in assigned if key.startswith("predictor.")]
    if rules is not None and (keys or "predictor" in groups):
        groups |= _rule_of_options(keys, groups.get("predictor"), rules, _compose({**stored["choices"], **groups}))
    cfg = _compose(stored["choices"])
    given = [key for key, _ in assigned]
    if "predictor.at" in given:
        given.append("threshold")  # a released checkpoint stores the threshold, which would replace predictor.at
    accepted = list(_accept_values(stored["values"], cfg, (*given, *groups)))
    if groups:
        cfg = _compose({**stored["choices"], **groups})
    OmegaConf.set_struct(cfg, False)
    for key, value in accepted:
        OmegaConf.update(cfg, key, value, merge=False)
    OmegaConf.set_struct(cfg, True)
    for key, value in assigned:
        if OmegaConf.select(cfg, key, default=_MISSING) is _MISSING:
            raise ConfigError(unknown_key(key, cfg) + _rules_with_option(key))
        OmegaConf.update(cfg, key, value, merge=True)
    check_values(cfg)
    return cfg


def chosen_rules(overrides: Sequence[str]) -> list[str]:
    """Return the rule of ``predictor=RULE``, for a command line without -p; empty without it."""
    groups, _ = _split_overrides(overrides)
    return [groups["predictor"]] if "predictor" in groups else []


def reject_overrides(overrides: Sequence[str], unused: Mapping[str, str]) -> None:
    """Raise ConfigError for an override of a key or group that the command does not use.

    ``unused`` maps these keys to the command's own option for them, such as ``--device``, or to "".
    """
    groups, assigned = _split_overrides(overrides)
    for name, value in (*groups.items(), *assigned):
        for key, option in unused.items():
            if name == key or name.startswith(f"{key}."):
                fix = f"pass {option} {value} instead" if option else "remove it"
                raise ConfigError(f"{name}={value} has no effect on this command. Fix: {fix}.")


def _rule_of_options(keys: Sequence[str], chosen: str | None, rules: Sequence[str], cfg: DictConfig) -> dict[str, str]:
    """Return the group ``predictor`` that overridden keys of a rule belong to; empty if it is chosen already.

    ``chosen`` is the rule of ``predictor=RULE``, and ``rules`` are those that the command applies.
    """
    actual = {cfg.protocol.rules.get(rule, rule) for rule in rules}
    if chosen is not None and chosen not in {*actual, *rules}:
        raise ConfigError(
            f"predictor={chosen} sets a rule that is not applied: the rules are {', '.join(rules)}. "
            f"Fix: add -p {chosen}, or remove predictor={chosen}."
        )
    if not keys or chosen is not None or cfg.predictor.name in actual:
        return {}
    if len(actual) != 1:
        applied = f", and the rules are {', '.join(rules)}" if rules else ""
        raise ConfigError(
            f"{keys[0]} is an option of one rule{applied}. Fix: add predictor=RULE, the rule that it is for."
        )
    return {"predictor": actual.pop()}


def _rules_with_option(key: str) -> str:
    """Return the end of the message for an unknown ``predictor.KEY``: the rules that have the key."""
    group, _, name = key.partition(".")
    files = {one: CONFIGS / group / f"{one}.yaml" for one in options(group)} if group == "predictor" else {}
    found = [one for one, path in files.items() if name in OmegaConf.load(path)]
    return f". Rules with this key: {', '.join(found)}. Fix: choose one with -p or predictor=." if found else ""


def _compose(choices: Mapping[Any, Any]) -> DictConfig:
    """Compose our configuration from names of options, each of which must be a file in ``configs/``."""
    for group, name in choices.items():
        if not isinstance(group, str) or group not in GROUPS:
            raise ConfigError(f"{str(group)[:64]!r} is not a configuration group")
        if not isinstance(name, str) or name not in options(group):
            raise ConfigError(unknown_option(group, str(name)[:64]))
    cfg = compose("train", [f"{group}={name}" for group, name in choices.items()])
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.merge(cfg, OmegaConf.load(CONFIGS / "test.yaml"))  # type: ignore[return-value]


def _split_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, Any]]]:
    """Separate overrides that choose an option (``protocol=paper``) from those that set a value."""
    groups: dict[str, str] = {}
    values: list[tuple[str, Any]] = []
    for override in OverridesParser.create().parse_overrides(quote_overrides(overrides)):
        key = override.get_key_element().lstrip("+~")
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: expected key=value or group=option")
        if not key:
            raise ConfigError(f"{override.input_line} names no key. Fix: write key=value.")
        if key in GROUPS:
            groups[key] = str(override.value())
        else:
            values.append((key, override.value()))
    return groups, values


def _accept_values(values: dict[Any, Any], cfg: DictConfig, given: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the stored keys (``dataset.crop``) that replace or add a value of ours, and their checked values.

    ``given`` are the keys and groups that overrides set.
    """
    raw, ours = OmegaConf.to_container(cfg, resolve=False), OmegaConf.to_container(cfg, resolve=True)

    def walk(theirs: dict[Any, Any], raw: Any, ours: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in theirs.items():
            name = f"{prefix}{key}"
            if name in NOT_FROM_CHECKPOINT or any(name == one or name.startswith(f"{one}.") for one in given):
                continue
            if key in _HYDRA_KEYS and key in raw:  # earlier versions stored these keys
                continue
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ConfigError(
                    f"the checkpoint's configuration holds the key {name[:100]!r}. Fix: choose another checkpoint."
                )
            if key not in ours:
                _check_added_key(name, value, raw)
                yield name, value
            elif isinstance(ours[key], dict) and isinstance(value, dict):
                yield from walk(value, raw[key] if isinstance(raw[key], dict) else ours[key], ours[key], f"{name}.")
            elif not equals_our_reference(raw[key], value):
                _check_value(name, value, ours[key])
                yield name, value

    def equals_our_reference(raw: Any, value: Any) -> bool:
        """Return whether our value is a reference, and the stored value is what it gives for the checkpoint."""
        match = _REFERENCE.fullmatch(raw) if isinstance(raw, str) else None
        if match is None:
            return isinstance(raw, str) and "${" in raw and value == raw
        found = _lookup(values, match[1], _lookup(ours, match[1]))
        # Checkpoints written before references were resolved hold the reference itself.
        return value == raw or (type(found) is type(value) and found == value)

    yield from walk(values, raw, ours, "")


def _lookup(tree: Any, key: str, default: Any = _MISSING) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def _check_value(name: str, value: Any, ours: Any) -> None:
    """Raise ConfigError if a stored value fails the check of its key; without one, the check of our value's type."""
    is_valid, expected = CHECKS.get(name) or _BY_TYPE[type(ours)]
    if not (_is_plain(value) and is_valid(value)):
        raise ConfigError(
            f"the checkpoint's configuration holds {name}={str(value)[:100]!r}: expected {expected}. "
            f"Fix: pass {name}=VALUE, or choose another checkpoint."
        )


def _check_added_key(name: str, value: Any, raw: Any) -> None:
    """Raise ConfigError unless an added key (``+key=value``) names a split, or an argument of the object built."""
    parent, _, key = name.rpartition(".")
    allowed = set[str]()
    if parent == "dataset.splits":
        allowed = {key}
    elif isinstance(raw, dict) and "_target_" in raw:
        allowed = _argument_names(raw)
    items = value if isinstance(value, list) else [value]
    plain = all(
        _is_number(one) or one is None or isinstance(one, bool) or bool(_is_text(one) and _WORD.fullmatch(one))
        for one in items
    )
    if key not in allowed or not plain or len(items) > 100:
        raise ConfigError(
            f"the checkpoint's configuration holds {name}={str(value)[:100]!r}, "
            "which this project's configuration does not have. Fix: choose another checkpoint."
        )


def _argument_names(node: dict[str, Any]) -> set[str]:
    """Return the names of the arguments of the object that a node of our configuration builds."""
    from configs.build import locate

    parameters = inspect.signature(locate(node["_target_"])).parameters.items()
    names = {name for name, one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    if node["_target_"] == "models.SMP":
        from models.library import options_of

        names |= options_of(node["arch"])
    return names


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**63


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= 4096 and "$" not in value and value.isprintable()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(
            not isinstance(one, list) and _is_plain(one) and one is not None for one in value
        )
    return value is None or isinstance(value, bool) or _is_number(value) or _is_text(value)


_BY_TYPE: dict[type, Check] = {  # type of our value -> check of a stored one
    type(None): (_is_plain, "null, a number, a word or a list of those"),
    bool: FLAG,
    int: (_is_number, "a finite number"),
    float: (_is_number, "a finite number"),
    str: (_is_text, "plain text without $"),
    list: (lambda value: isinstance(value, list), "a list of numbers or words"),
    dict: (lambda value: False, "a mapping"),
}


def read_config(path: Path) -> dict[str, Any]:
    """Read the ``config.yaml`` that a run wrote into its folder; raise ConfigError if it is damaged."""
    try:
        found = read_yaml(path)
        if not isinstance(found, dict) or "epochs" not in found:
            raise UserError("it does not hold the configuration of a run")
    except UserError as error:
        raise ConfigError(
            f"{path} is damaged: {error}. Fix: remove it, and the run resumes from its checkpoints, "
            "which hold the same configuration; or start over with resume=false."
        ) from error
    return {str(key): value for key, value in found.items()}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return the differences of two configurations that can change results, as ``key: old -> new``.

    The names of classes and functions of this project are not compared: a later version may rename them.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = _settings(old), _settings(new)
        found: list[str] = []
        for key in [*old, *(k for k in new if k not in old)]:
            name = f"{prefix}{key}"
            if name not in NON_RESULT_KEYS:
                found += differences(old.get(key), new.get(key), f"{name}.")
        return found
    return [] if old == new else [f"{prefix[:-1]}: {old} -> {new}"]


def _settings(node: dict[str, Any]) -> dict[str, Any]:
    ours = str(node.get("_target_")).startswith(("datasets.", "models.", "rankseg.", "trainers."))
    return {key: value for key, value in node.items() if key not in _HYDRA_KEYS} if ours else node


def check_same_run(folder: Path, cfg: DictConfig) -> None:
    """Raise ConfigError if a run's folder holds a run of another configuration.

    A folder without checkpoints and results has nothing that a new run could replace. Its config.yaml is not compared.
    """
    path = folder / "config.yaml"
    has_work = any(folder.glob("*.pth")) or (folder / "results").exists()
    if not cfg.resume or not has_work or not path.exists():
        return
    changed = differences(read_config(path), OmegaConf.to_container(cfg, resolve=True))
    if changed:
        raise ConfigError(_other_run_message(folder, f"another configuration ({'; '.join(changed[:4])})"))


def check_same_data(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError if a run was trained on other classes or images.

    Args:
        before, now: ``classes`` (names), ``data`` (fingerprints of splits) and ``contents`` (checksums of splits).
            Keys that ``before`` lacks, as older checkpoints do, are not compared.
    """
    old, new = before.get("classes"), now["classes"]
    if old and list(old) != list(new):
        raise ConfigError(_other_run_message(folder, f"the classes [{', '.join(old)}], not [{', '.join(new)}]"))
    for key, what in (("data", "other images (fingerprint"), ("contents", "other masks or images (checksum")):
        known = before.get(key)
        changed = [
            f"{split}: {known[split]} -> {new}"
            for split, new in now[key].items()
            if isinstance(known, dict) and split in known and known[split] != new
        ]
        if changed:
            raise ConfigError(_other_run_message(folder, f"{what} of {'; '.join(changed)})"))


def _other_run_message(folder: Path, what: str) -> str:
    return (
        f"{folder} holds a run with {what}. "
        "Fix: give this run a name of its own with suffix=-NAME, or replace that one with resume=false."
    )
