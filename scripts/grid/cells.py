"""The cells of a grid: what a command line or an experiment sweeps over, multiplied out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from configs import stored
from configs.build import absolute_root
from configs.compose import CONFIGS, spelled
from configs.values import check_values
from trainers.journal import read_rows
from trainers.results import file_sha256


@dataclass(frozen=True)
class Cell:
    """One training run: what to pass to ``train.py`` for it, and the configuration that this composes."""

    overrides: tuple[str, ...]
    cfg: DictConfig

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return Path(self.cfg.run_dir)

    @property
    def kind(self) -> str:
        """What the time of an epoch depends on."""
        return f"{self.cfg.dataset.name}/{self.cfg.model.name}"

    def __str__(self) -> str:
        cfg = self.cfg
        return f"{cfg.dataset.name}/{cfg.model.name}{cfg.suffix}/{cfg.loss.name}/seed{cfg.seed}"

    def epochs_done(self) -> int:
        """Finished epochs, as the run's journal says."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return max((row["epoch"] for row in rows if row["kind"] == "train"), default=0)

    def trained(self) -> bool:
        """Whether this very configuration was trained to its end."""
        config = self.folder / "config.yaml"
        if not (self.folder / f"checkpoint-epoch{self.cfg.epochs}.pth").exists() or not config.exists():
            return False
        try:
            before = stored.read_config(config)
        except ValueError:  # train.py says what to do, and the other cells go on
            return False
        return not stored.differences(before, _resolved(self.cfg))

    def scored(self, checkpoint: str, folder: str, rules: Iterable[str]) -> bool:
        """Whether these rules were scored on this checkpoint of the run, with results in this folder of it."""
        path = self.folder / checkpoint
        files = [self.folder / folder / f"{rule}.json" for rule in rules]
        if not path.exists() or not all(file.exists() for file in files):
            return False
        digest = file_sha256(path)
        return all(digest in file.read_text(encoding="utf-8") for file in files)


def _resolved(cfg: DictConfig) -> Any:
    """The configuration as ``train.py`` writes it down; the place of the data does not count."""
    return OmegaConf.to_container(cfg, resolve=True)


def cells(overrides: Sequence[str]) -> list[Cell]:
    """Every cell that these overrides ask for, in Hydra's own syntax (``loss=ce,focal seed=0,1``).

    What an experiment sweeps over (``hydra.sweeper.params``) counts where the command line says nothing.
    Seeds vary slowest, so that a grid cut short has whole tables of fewer seeds.

    Raises:
        ValueError: two cells would share a directory, or a value cannot be used.
    """
    given = OverridesParser.create().parse_overrides(spelled(overrides))
    named = {override.key_or_group for override in given}
    swept = {
        override.key_or_group: list(override.sweep_string_iterator())
        for override in given
        if override.is_sweep_override()
    }
    fixed = [str(override.input_line) for override in given if not override.is_sweep_override()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        # With the first of each swept option: a key such as model.encoder exists only in some of them.
        first = [f"{key}={values[0]}" for key, values in swept.items()]
        params = (
            compose("train", [*first, *fixed], return_hydra_config=True).hydra.sweeper.get("params") or {}
        )
        for key, values in params.items():
            if key not in named:
                parsed = OverridesParser.create().parse_override(f"{key}={values}")
                swept[key] = (
                    list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [str(values)]
                )
        keys = sorted(swept, key=lambda key: key != "seed")
        found = []
        for values in product(*(swept[key] for key in keys)):
            line = (*fixed, *(f"{key}={value}" for key, value in zip(keys, values, strict=True)))
            cfg = compose("train", list(line))
            check_values(cfg)
            absolute_root(cfg)
            found.append(Cell(line, cfg))
    folders = [cell.folder for cell in found]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(
            f"{twice} would hold two cells: what is swept has to show in the path "
            "(dataset, model, loss, seed or suffix)"
        )
    return found
