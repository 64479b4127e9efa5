"""Links lead somewhere, commands can be typed, code runs: README, CONTRIBUTING and docs/."""

from __future__ import annotations

import argparse
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

from configs import stored
from configs.cli import explain
from configs.compose import compose, options
from scripts import paired_statistics
from tests.followed import commands

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Options of CONTRIBUTING.md's own, which its own test adds.
OWN = ("dataset=arrays", "hysteresis", "model=plain", "loss=brier")
PLUGINS = ("launcher=", "hydra.launcher.")  # need packages that are not installed by default

each = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What a heading can be reached by."""
    heads = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@each
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(there), f"{path.name}: {there.name} has no heading #{anchor}"


@each
def test_files_that_are_named_exist(path: Path) -> None:
    spans = re.findall(r"`([^`\s]+)`", prose(path.read_text(encoding="utf-8")))
    for span in spans:
        if re.fullmatch(r"(scripts|configs|tests|datasets|models|trainers|rankseg|docs)/[\w./-]*", span):
            own = any(word.partition("=")[2] == Path(span).stem for word in OWN) or Path(span).stem in OWN
            assert own or (ROOT / span).exists() or "NAME" in span, f"{path.name} names {span}"


def argv(command: str) -> list[str]:
    """The script and its arguments, without placeholders."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return [word for word in words[start:] if not re.search(r"^\[|^[A-Z]+=|=NAME$|<TAB>|^\.\.\.$", word)]


class Parsed(BaseException):
    """Carries what a script's parser made of a command line out of the script."""


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Run a script up to where its command line is parsed."""

    def stop(original: Any) -> Any:
        def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
            raise Parsed(original(self, args, namespace))

        return parse

    script = ROOT / arguments[0]
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [str(script), *arguments[1:]])
        with pytest.raises(Parsed) as caught:
            runpy.run_path(str(script), run_name="__main__")
    return caught.value.args[0]


def compose_runs(overrides: list[str]) -> None:
    """Compose runs of what may be a sweep: so many that each value is in one of them."""
    kept = [word for word in overrides if not word.startswith(PLUGINS) and not word.endswith(OWN)]
    lists = []
    for override in OverridesParser.create().parse_overrides(kept):
        values = override.sweep_string_iterator() if override.is_sweep_override() else None
        lists.append([f"{override.key_or_group}={v}" for v in values] if values else [override.input_line])
    for number in range(max(map(len, lists), default=0)):
        compose_one(tuple(values[number % len(values)] for values in lists))
    for word in overrides:
        if word.startswith("launcher="):
            assert word.partition("=")[2] in options("launcher")


@functools.cache
def compose_one(overrides: tuple[str, ...]) -> None:
    try:
        compose("train", overrides)
    except Exception as error:
        pytest.fail(f"train.py {' '.join(overrides)}: {explain(error)}")


@functools.cache
def as_for_testing(overrides: tuple[str, ...]) -> None:
    """Lay overrides over a stored configuration, as test.py does."""
    choices = {
        "dataset": "synthetic", "model": "tiny", "loss": "ce", "optimizer": "adamw", "schedule": "poly",
        "predictor": "rankdice", "protocol": "corrected", "trainer": "default",
    }  # fmt: skip
    if overrides:
        stored.unpack({"choices": choices, "values": {}}, overrides)


@each
def test_commands_can_be_typed(path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands(path.read_text(encoding="utf-8")):
        if command.startswith("make "):
            for target in shlex.split(command.partition("#")[0])[1:]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name}: {command}"
            continue
        if ".py" not in command or re.search(r"scripts/NAME|\bX\.py", command):
            continue
        script, *rest = argv(command)
        assert (ROOT / script).is_file(), f"{path.name}: {command}"
        if script == "train.py":
            hydra_flags = ("-m", "--multirun", "--help", "--cfg", "job", "-sc", "install=bash", "--info")
            compose_runs([word for word in rest if word not in hydra_flags])
            continue
        if not rest or "--help" in rest or script.startswith("tests/"):
            continue
        if script == "test.py" and "-r" not in rest:  # shortened in running text
            rest = ["-r", "CHECKPOINT", *rest]
        try:
            found = parsed([script, *rest], monkeypatch)
        except SystemExit:
            pytest.fail(f"{path.name}: {command}\n{capsys.readouterr().err}")
        rules = getattr(found, "predictor", None) or []
        for rule in [rules] if isinstance(rules, str) else rules:
            assert rule in (*options("predictor"), "all", *OWN), f"{path.name}: {command}"
        overrides = list(getattr(found, "overrides", None) or [])
        trains = "reproduce" in script or rest[:1] in (["step"], ["loader"])
        if trains:
            given = {key: getattr(found, f"{key}s", None) for key in ("model", "loss", "seed")}
            compose_runs([*(f"{key}={value}" for key, value in given.items() if value), *overrides])
        else:
            as_for_testing(tuple(overrides))


class Network(nn.Module):
    """A stub that the snippets of the documents call."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.repeat(1, 2, 1, 1)[:, :5] * 4 - 2


@each
def test_python_in_documents_runs_and_prints_what_they_say(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    space: dict[str, Any] = {"network": Network(), "images": torch.rand(2, 3, 12, 9), "__name__": path.stem}
    blocks = r"```python\n(.*?)```(?:\s+It prints `([^`]*)`)?"
    for block, printed in re.findall(blocks, path.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(path), "exec"), space)
        assert printed in capsys.readouterr().out
    if path.name == "README.md":
        assert space["predict"].shape == (2, 5, 12, 9) and space["tau"].shape == (2, 5)
    if path.name == "faq.md":
        assert space["masks"].sum(1).max() <= 1 and space["mask"].shape == (2, 1, 12, 9)


@pytest.mark.slow
def test_the_results_page_has_the_rows_that_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runs = sorted((ROOT / "saved/results/kvasir_seg_96px/kvasir_seg").glob("*/*/seed*"))
    assert paired_statistics.main([*map(str, runs), "--rule", "rankdice"]) == 0
    head, _, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(runs) and {head, *rows} <= set(page)
