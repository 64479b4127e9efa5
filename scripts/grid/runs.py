"""The runs of a grid: which there are, what is done of each, and which files git keeps of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from configs import stored
from configs.build import absolute_root
from configs.compose import CONFIGS, quote_overrides
from configs.errors import ConfigError, UserError
from configs.files import read_text
from configs.values import check_values
from trainers.checkpoint import epoch_of
from trainers.journal import read_rows
from trainers.results import file_sha256

# What git keeps of a run: small text files, no checkpoint.
RECORDED = (
    *("config.yaml", "metrics.jsonl", "provenance.json", "report/report.json"),
    *("results/**/*.json", "results/**/*.csv"),
)


@dataclass(frozen=True)
class Run:
    """One training run: the overrides to pass to ``train.py``, and the configuration that they compose."""

    overrides: tuple[str, ...]
    cfg: DictConfig

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return Path(self.cfg.run_dir)

    def __str__(self) -> str:
        cfg = self.cfg
        return f"{cfg.dataset.name}/{cfg.model.name}{cfg.suffix}/{cfg.loss.name}/seed{cfg.seed}"

    def epochs_done(self) -> int:
        """Return the number of finished epochs, from the run's journal."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return max((row["epoch"] for row in rows if row["kind"] == "train"), default=0)

    def is_trained(self) -> bool:
        """Return whether a run of exactly this configuration was trained to its end."""
        config = self.folder / "config.yaml"
        if epoch_of(self.folder / "last.pth") < self.cfg.epochs or not config.exists():
            return False
        try:
            before = stored.read_config(config)
        except ValueError:  # train.py reports the damaged file; the other runs continue
            return False
        return not stored.differences(before, OmegaConf.to_container(self.cfg, resolve=True))

    def is_scored(self, checkpoint: str, folder: str, rules: Iterable[str]) -> bool:
        """Return whether these rules were scored on this checkpoint, with the results in this sub-folder."""
        path = self.folder / checkpoint
        files = [self.folder / folder / f"{rule}.json" for rule in rules]
        if not path.exists() or not all(file.exists() for file in files):
            return False
        digest = file_sha256(path)
        try:
            return all(digest in read_text(file) for file in files)
        except UserError:  # damaged: it is written again
            return False

    def record(self, target: Path, root: Path) -> int:
        """Copy the run's small files to ``target/<dataset>/<model>/<loss>/seed<k>``; return how many.

        Absolute paths of data and runs are rewritten relative to ``root``, the repository.
        """
        paths = {str(Path(self.cfg.save_dir).resolve()), str(root)}
        if self.cfg.dataset.get("root"):
            paths.add(str(Path(self.cfg.dataset.root).expanduser().resolve()))
        sources = sorted(path for pattern in RECORDED for path in self.folder.glob(pattern))
        for path in sources:
            text = read_text(path, errors="surrogateescape")
            for absolute in sorted(paths, key=len, reverse=True):
                text = text.replace(absolute, os.path.relpath(absolute, root))
            copy = target / str(self) / path.relative_to(self.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text, encoding="utf-8", errors="surrogateescape")
        return len(sources)


def load_runs(overrides: Sequence[str]) -> list[Run]:
    """Return every run that these overrides ask for, in Hydra's own syntax (``loss=ce,focal seed=0,1``).

    An experiment's own sweep (``hydra.sweeper.params``) applies to keys that the command line does not set.
    Seeds vary slowest, so that an interrupted grid has complete tables of fewer seeds.

    Raises:
        ConfigError: two runs would share a directory, or a value is invalid.
    """
    given = OverridesParser.create().parse_overrides(quote_overrides(overrides))
    swept = {o.key_or_group: _values(o) for o in given if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in given if not o.is_sweep_override()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        # Compose with the first value of each swept option: a key such as model.encoder exists only in some.
        first = [*(f"{key}={values[0]}" for key, values in swept.items()), *fixed]
        params = compose("train", first, return_hydra_config=True).hydra.sweeper.get("params") or {}
        for key, values in params.items():
            if key not in {override.key_or_group for override in given}:
                swept[key] = _values(OverridesParser.create().parse_override(f"{key}={values}"))
        keys = sorted(swept, key=lambda key: key != "seed")
        runs: list[Run] = []
        for values in product(*(swept[key] for key in keys)):
            line = (*fixed, *(f"{key}={value}" for key, value in zip(keys, values, strict=True)))
            cfg = compose("train", list(line))
            check_values(cfg)
            absolute_root(cfg)
            runs.append(Run(line, cfg))
    folders = [run.folder for run in runs]
    shared = next((folder for folder in folders if folders.count(folder) > 1), None)
    if shared:
        raise ConfigError(
            f"run_dir={shared} would belong to two runs of the grid. Fix: sweep over keys that are in the path "
            "(dataset, model, loss, seed), or set suffix."
        )
    return runs


def _values(override: Override) -> list[str]:
    """Return the values of a swept override, or its single value."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.get_value_element_as_str())]
