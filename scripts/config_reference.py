"""docs/configuration.md, made from the YAML files of configs/ and the comments in them.

    python scripts/config_reference.py             write it
    python scripts/config_reference.py --check     fail if it is stale

An option's text is the comment at the top of its file; a key's text is the comment behind it. A key that several
options have may be explained in one of them.
Exit codes: 0 done, 1 stale, 2 bad input.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from scripts import ROOT
from scripts.command import leave

CONFIGS = ROOT / "configs"
TARGET = ROOT / "docs" / "configuration.md"
STALE = 1
# What each group is about, in the order of the page.
GROUPS = {
    "dataset": "Images and labels, how they are cut and augmented, and the length of the training that suits them.",
    "model": "The network. The `smp_` ones take any encoder of segmentation_models_pytorch or timm.",
    "loss": "What training minimises; its link turns logits into probabilities. RankDice wants a strictly proper one.",
    "optimizer": "How weights move.",
    "schedule": "The learning rate over the updates of a run.",
    "predictor": "The prediction rule: train.py picks `best_model.pth` by it; `-p` of test.py, repeated at will.",
    "protocol": "The conventions of scoring and of void. [What differs](protocol.md).",
    "trainer": "Precision, memory, checkpoints, logs.",
}
# Groups whose options set keys of the others, so that only what they are for is of interest.
RECIPES = {
    "experiment": "Whole experiments: `python train.py experiment=NAME`.",
    "cell": "Single cells of the paper's tables that answer a question of their own: `python train.py cell=NAME`.",
    "launcher": "Where the cells of a sweep run: `python train.py launcher=NAME ...`. [More](engine.md#launchers).",
}
WIRING = ("_target_", "_partial_", "name")
INTRODUCTION = """\
# Configuration

<!-- made by `python scripts/config_reference.py` from the comments in configs/: change those, not this page -->

`python train.py GROUP=OPTION KEY=VALUE ...` chooses options and sets keys; `python train.py --help` shows what results,
and `--cfg job` prints it as YAML. `test.py` and the scripts that take a checkpoint start from the configuration stored
in it and accept the same overrides. Defaults are in bold. A value such as `${dataset.epochs}` follows another key.
Lists are written `'validation=[T,rankdice]'`, an empty value `null`.
"""


@dataclass(frozen=True)
class Key:
    """A key of a YAML file: its dotted name, its value as written, and the comment behind it."""

    name: str
    value: str
    comment: str


@dataclass(frozen=True)
class Option:
    """A YAML file: its name in the group, the comment on top, what it builds, its keys."""

    name: str
    header: list[str]
    target: str
    keys: list[Key]

    @property
    def summary(self) -> str:
        """The header as one paragraph, without the commands, which are indented."""
        return " ".join(line for line in self.header if not line.startswith(" "))

    def field(self, label: str) -> str:
        """What follows ``Label:`` in the header, with the lines that are indented below it."""
        found: list[str] = []
        for line in self.header:
            if line.startswith(f"{label}:"):
                found.append(line.partition(":")[2])
            elif found and line.startswith("  "):
                found.append(line)
            elif found:
                break
        return " ".join(" ".join(found).split())


def read_option(path: Path, group: Path) -> Option:
    """A file of a group."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    header: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):  # Hydra's directives
            header.append(line[1:].removeprefix(" ").rstrip())
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = list(_keys(tree, lines)) if isinstance(tree, yaml.MappingNode) else []
    targets = [key.value for key in keys if key.name.split(".")[-1] == "_target_"]
    return Option(str(path.relative_to(group).with_suffix("")), header, (targets or [""])[0], keys)


def _keys(node: yaml.MappingNode, lines: Sequence[str], prefix: str = "") -> Iterator[Key]:
    """Every leaf; a mapping or list in brackets is one."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _keys(value, lines, f"{name}.")
            continue
        end = value.end_mark
        comment = (
            re.search(r"(?:^|\s)#\s*(.*)$", lines[end.line][end.column :]) if end.line < len(lines) else None
        )
        yield Key(name, _written(value, lines), comment[1].strip() if comment else "")


def _written(node: yaml.Node, lines: Sequence[str]) -> str:
    start, end = node.start_mark, node.end_mark
    if start.line == end.line:
        return lines[start.line][start.column : end.column].strip()
    return " ".join(line.strip() for line in lines[start.line : end.line + 1])


def read_group(name: str, configs: Path = CONFIGS) -> list[Option]:
    """The options of a group, by name."""
    folder = configs / name
    return [read_option(path, folder) for path in sorted(folder.rglob("*.yaml"))]


def reference(configs: Path = CONFIGS) -> str:
    """The page.

    Raises:
        ValueError: an option or a key has no comment anywhere; or a group has no place on the page.
    """
    unknown = sorted(
        {path.name for path in configs.iterdir() if any(path.rglob("*.yaml"))} - set(GROUPS) - set(RECIPES)
    )
    if unknown:
        raise ValueError(f"configs/{unknown[0]} has no place in {Path(__file__).name}: add it to GROUPS")
    top = read_option(configs / "train.yaml", configs)
    chosen = _defaults(configs / "train.yaml")
    own = [key for key in top.keys if key.name.split(".")[0] not in ("defaults", "hydra")]
    blocks = [
        INTRODUCTION,
        "## Top level\n",
        _rows("train", [Option("train", top.header, "", own)]),
        "## Only in `test.py`\n",
        _rows("test", [read_option(configs / "test.yaml", configs)]),
    ]
    for name, about in GROUPS.items():
        found = read_group(name, configs)
        blocks += [
            f"## `{name}`\n",
            f"{about}\n",
            _options(name, found, chosen.get(name, "")),
            _rows(name, found),
        ]
    for name, about in RECIPES.items():
        blocks += [f"## `{name}`\n", f"{about}\n", _recipes(name, read_group(name, configs))]
    return "\n".join(block for block in blocks if block)


def _defaults(path: Path) -> dict[str, str]:
    """The option that each group has unless told otherwise."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"]
    return {group: str(name) for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _options(group: str, options: Sequence[Option], chosen: str) -> str:
    """The table of a group's options, the default one in bold."""
    rows = []
    for option in options:
        if not option.summary:
            raise ValueError(f"configs/{group}/{option.name}.yaml says nothing: begin it with a comment")
        name = f"**`{option.name}`**" if option.name == chosen else f"`{option.name}`"
        builds = f"`{option.target}`" if option.target else ""
        rows.append((name, option.summary, builds))
    width = 3 if any(row[2] for row in rows) else 2
    return _table(("option", "what it is", "builds")[:width], [row[:width] for row in rows])


def _rows(group: str, options: Sequence[Option]) -> str:
    """The table of a group's keys: values where options differ, with their names."""
    merged: dict[str, dict[str, Key]] = {}
    for option in options:
        for key in option.keys:
            nested = "." in key.name and key.value.startswith("${")  # hands on what another key says
            if key.name.split(".")[-1] not in WIRING and not nested:
                merged.setdefault(key.name, {})[option.name] = key
    rows = []
    for name, found in merged.items():
        if not any(key.comment for key in found.values()):
            files = ", ".join(f"{one}.yaml" for one in found)
            raise ValueError(f"{group}: {name} of {files} has no comment: write one behind it")
        prefix = "" if group in ("train", "test") else f"{group}."
        values = _by_holder({one: f"`{key.value}`" for one, key in found.items()}, len(options))
        comments = {one: key.comment for one, key in found.items() if key.comment}
        rows.append((f"`{prefix}{name}`", values, _by_holder(comments, len(comments))))
    return _table(("key", "default", "meaning"), rows) if rows else ""


def _by_holder(texts: dict[str, str], count: int) -> str:
    """The texts of options, each once and with the options' names, unless all `count` of them have the same."""
    holders: dict[str, list[str]] = {}
    for name, text in texts.items():
        holders.setdefault(text, []).append(name)
    if len(holders) == 1 and len(texts) == count:
        return next(iter(holders))
    return "<br>".join(f"{', '.join(names)}: {text}" for text, names in holders.items())


def _recipes(group: str, options: Sequence[Option]) -> str:
    """The table of options that combine others: claim or use, and command."""
    rows = []
    for option in options:
        first = option.field("Claim") or " ".join(line for line in option.header if ":  " not in line)
        command, more = option.field("Command"), option.field("Cost") or option.field("Needs")
        if not (first and command):
            raise ValueError(f"configs/{group}/{option.name}.yaml: its header lacks Claim: or Command:")
        rows.append((f"`{option.name}`", first, more, f"`{_line(command)}`"))
    label = "needs" if all(option.field("Needs") for option in options) else "cost"
    return _table(("option", "what it shows" if label == "cost" else "what it does", label, "command"), rows)


def _line(command: str) -> str:
    """The command without the words that may follow it."""
    return re.split(r"\s{2,}| then | \(", command)[0]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def main(arguments: Sequence[str] | None = None, target: Path = TARGET, configs: Path = CONFIGS) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    args = parser.parse_args(arguments)
    try:
        text = reference(configs)
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    current = target.read_text(encoding="utf-8") if target.is_file() else None
    if args.check:
        if current != text:
            print(f"stale: {target.name} (run: python scripts/config_reference.py)", file=sys.stderr)
        return STALE if current != text else 0
    if current != text:
        target.write_text(text, encoding="utf-8")
        print(f"written: {target.name}")
    return 0


if __name__ == "__main__":
    leave(main)
