"""The runs of a grid: which there are, what is done of each, how it is executed, and which files git keeps of it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from configs import stored
from configs.build import absolute_root
from configs.compose import CONFIGS, quote_overrides
from configs.errors import ConfigError, UserError
from configs.files import file_sha256, read_text, shell_word
from configs.values import check_values
from scripts import ROOT
from trainers.checkpoint import epoch_of
from trainers.journal import read_rows

# What git keeps of a run: small text files, no checkpoint.
RECORDED = (
    *("config.yaml", "metrics.jsonl", "provenance.json", "report/report.json"),
    *("results/**/*.json", "results/**/*.csv"),
)
_SCORING = 1  # scoring a run takes about as long as this number of epochs
_POLL = 0.5  # seconds
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


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

    def epochs_left(self) -> int:
        """Return the epochs that are left to train, plus the cost of scoring in the same unit."""
        return (0 if self.is_trained() else max(self.cfg.epochs - self.epochs_done(), 0)) + _SCORING

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


def format_time(seconds: float) -> str:
    """Return seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """A progress bar over the epochs of all runs; without a terminal, only the lines printed by `say`."""

    def __init__(self, runs: Sequence[Run], quiet: bool = False) -> None:
        self.left = {run.folder: run.epochs_left() for run in runs}
        self.count, self.started = len(runs), time.monotonic()
        self.total = sum(self.left.values()) or 1
        self.bar = tqdm(
            total=self.total,
            disable=True if quiet else None,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}",
            leave=False,
        )

    def show(self, number: int, run: Run, stage: str, done: int) -> None:
        """Refresh the bar: run ``number`` is in ``stage`` and has finished ``done`` of its epochs."""
        finished = self.total - sum(self.left.values()) + min(done, self.left[run.folder])
        left = self._seconds_left(finished)
        self.bar.n = finished
        self.bar.set_description_str(f"[{number}/{self.count}] {run}  {stage}", refresh=False)
        self.bar.set_postfix_str(f"about {format_time(left)} left" if left else "estimating", refresh=False)
        self.bar.refresh()

    def finish(self, run: Run) -> float | None:
        """Mark a run as processed; return the estimated seconds for the others, None if unknown."""
        del self.left[run.folder]
        return self._seconds_left(self.total - sum(self.left.values()))

    def _seconds_left(self, finished: int) -> float | None:
        """Estimate the remaining seconds from the mean time of an epoch so far."""
        if not finished:
            return None
        return (self.total - finished) * (time.monotonic() - self.started) / finished

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Remove the progress bar."""
        self.bar.close()


def call(arguments: Sequence[str], log: Path, threads: int | None, tick: Callable[[], None]) -> tuple[int, str]:
    """Run a script of this repository; return its exit code and its error, or the last line of its output.

    Output is appended to ``log``, to which another process may write as well; ``tick`` is called twice a second. If
    this process is stopped or killed, the child receives SIGTERM and saves a checkpoint.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    script, *rest = arguments
    with log.open("a", encoding="utf-8") as out:
        print(f"$ python {' '.join(map(shell_word, arguments))}", file=out, flush=True)
        begin = out.tell()
        child = subprocess.Popen(
            [sys.executable, str(ROOT / script), *rest],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the child once, from here
            preexec_fn=_stop_with_parent if _libc else None,
        )
        try:
            while True:
                try:
                    child.wait(_POLL)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(begin)
        lines = [line.strip() for line in text.read().splitlines() if line.strip()]
    errors = [line for line in lines if child.returncode and line.startswith("error: ")]
    return child.returncode, (errors or lines or [""])[-1]


def _stop_with_parent() -> None:
    """Ask Linux to send SIGTERM when the parent dies, so that no training runs on unseen (PR_SET_PDEATHSIG)."""
    _libc.prctl(1, signal.SIGTERM)  # type: ignore[union-attr]
