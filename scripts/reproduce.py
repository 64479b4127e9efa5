"""Reproduce a grid of experiments with one command: check the data, train, score, print the table.

    python scripts/reproduce.py                                     built-in data, small network
    python scripts/reproduce.py --losses ce,focal --seeds 0,1,2 --calibrate epochs=4
    python scripts/reproduce.py experiment=paper/kvasir_seg dataset.root=PATH --record saved/results/kvasir
    python scripts/reproduce.py --models smp_unet,smp_pspnet dataset=kvasir_seg dataset.root=PATH --dry-run

The same command again skips finished runs and resumes interrupted ones. If a run fails, the others continue
and the failure is listed at the end. A run that another process is training is left to that process. The
output of each run is in its folder, in reproduce.log.
Exit codes: 0 done, 2 bad input, 3 a run failed, 4 another process still works on a run, 75 interrupted (run
the same command again).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from configs import build, errors, stored
from configs.cli import run_cli
from configs.compose import CONFIGS, compose, options, quote_overrides, unknown_option
from configs.files import file_sha256, read_json, read_text, shell_word
from configs.values import check_values
from scripts import ROOT, paper_tables
from scripts.common import check_least, command_line
from trainers.checkpoint import epoch_of
from trainers.journal import read_rows
from trainers.results import results_folder

# The files of a run that --record copies: small text files, no checkpoints.
RECORDED = (
    *("config.yaml", "metrics.jsonl", "provenance.json", "report/report.json"),
    *("results/**/*.json", "results/**/*.csv"),
)
_SCORING = 1  # scoring a run takes about as long as this number of epochs
_POLL = 0.5  # seconds
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Run:
    """One training run: the overrides to pass to ``train.py``, and the configuration that they give."""

    overrides: tuple[str, ...]
    cfg: DictConfig

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.cfg.run_dir)

    def __str__(self) -> str:
        cfg = self.cfg
        return f"{cfg.dataset.name}/{cfg.model.name}{cfg.suffix}/{cfg.loss.name}/seed{cfg.seed}"

    def epochs_done(self) -> int:
        """Return the number of epochs whose steps are done, from the run's journal; for the progress bar."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return max((row["epoch"] for row in rows if row["kind"] == "train"), default=0)

    def epochs_left(self) -> int:
        """Return the number of epochs left to train, plus the time of scoring in epochs."""
        return (0 if self.is_trained() else max(self.cfg.epochs - self.epochs_done(), 0)) + _SCORING

    def is_trained(self) -> bool:
        """Return whether this run was trained to its end with this configuration; see `stored.differences`."""
        config = self.folder / "config.yaml"
        if epoch_of(self.folder / "last.pth") < self.cfg.epochs or not config.exists():
            return False
        try:
            before = stored.read_config(config)
        except ValueError:  # train.py reports the damaged file; the other runs continue
            return False
        return not stored.differences(before, OmegaConf.to_container(self.cfg, resolve=True))

    def record(self, target: Path, root: Path) -> int:
        """Copy the run's small files to ``target/<dataset>/<model>/<loss>/seed<k>``; return how many.

        Absolute paths of the data, the runs and the repository are rewritten relative to ``root``, the repository.
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
    """Return a run for every combination of swept values, in Hydra's syntax (``loss=ce,focal seed=0,1``).

    The sweep of an experiment (``hydra.sweeper.params``) applies to keys that the command line does not set. Seeds
    vary slowest: an interrupted grid has complete tables for its first seeds. Raise ConfigError if two runs have
    the same folder.
    """
    parser = OverridesParser.create()
    given = parser.parse_overrides(quote_overrides(overrides))
    swept = {o.key_or_group: _values(o) for o in given if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in given if not o.is_sweep_override()]
    # A key such as model.encoder exists only for some options, so compose with the first value of each swept key.
    first = [*(f"{key}={values[0]}" for key, values in swept.items()), *fixed]
    params = compose("train", first, return_hydra_config=True).hydra.sweeper.get("params") or {}
    for key, values in params.items():
        if key not in {override.key_or_group for override in given}:
            swept[key] = _values(parser.parse_override(f"{key}={values}"))
    keys = sorted(swept, key=lambda key: key != "seed")
    runs: list[Run] = []
    for values in product(*(swept[key] for key in keys)):
        line = (*fixed, *(f"{key}={value}" for key, value in zip(keys, values, strict=True)))
        cfg = compose("train", list(line))
        check_values(cfg)
        build.make_root_absolute(cfg)
        runs.append(Run(line, cfg))
    folders = [run.folder for run in runs]
    shared = next((folder for folder in folders if folders.count(folder) > 1), None)
    if shared:
        raise errors.ConfigError(
            f"run_dir={shared} would be the folder of two runs of the grid. Fix: sweep over keys that are in the path "
            "(dataset, model, loss, seed), or set suffix."
        )
    return runs


def _values(override: Override) -> list[str]:
    """Return the values of a swept override, or its single value."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.get_value_element_as_str())]


def call(arguments: Sequence[str], log: Path, threads: int | None, tick: Callable[[], None]) -> tuple[int, str]:
    """Run a script of this repository; return its exit code and its error message, or the last line of its output.

    The output is appended to ``log``, to which another process may write as well. ``tick`` is called twice a second.
    If this process is stopped, the child receives SIGTERM, on which train.py saves a checkpoint. On Linux this also
    holds if this process is killed.
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
            while child.poll() is None:
                tick()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL)
        except BaseException:
            child.terminate()
            child.wait()
            raise
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(begin)
        lines = [line.strip() for line in text.read().splitlines() if line.strip()]
    messages = [line for line in lines if child.returncode and line.startswith("error: ")]
    return child.returncode, (messages or lines or [""])[-1]


def _stop_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies (PR_SET_PDEATHSIG), which ends its training."""
    _libc.prctl(1, signal.SIGTERM)  # type: ignore[union-attr]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags and overrides may be mixed."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--models", help="models to train, for example smp_unet,smp_pspnet (default: from the configuration)")
    add("--losses", help="losses to train with, for example ce,focal,bce (default: from the configuration)")
    add("--seeds", help="for example 0,1,2 (default: from the configuration)")
    add("--rules", default="T,max,rankdice", help="rules to score (default: %(default)s)")
    add("--protocols", default="corrected,paper", help="scoring protocols (default: %(default)s)")
    checkpoint = "checkpoint to score (default: %(default)s; on Cityscapes and Kvasir-SEG the paper scored last.pth)"
    add("--checkpoint", choices=("best_model.pth", "last.pth"), default="best_model.pth", help=checkpoint)
    calibrate = "also score with a fitted temperature and, if loss=focal, with correct_focal=true"
    add("--calibrate", action="store_true", help=calibrate)
    add("--threads", type=int, help="CPU threads of each process")
    record = "copy results, journals, configurations and report.json to DIR"
    add("--record", type=Path, metavar="DIR", help=record)
    add("--dry-run", action="store_true", help="list the runs and their state, run nothing")
    add("--quiet", action="store_true", help="print the table only")
    add("overrides", nargs="*", metavar="key=value", help="passed to train.py")
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True)
class ScoringPlan:
    """What to score for each run: rules, result folder of each protocol, checkpoint, and whether to calibrate."""

    rules: list[str]
    folders: dict[str, str]
    checkpoint: str
    calibrate: bool

    def evaluations(self, run: Run) -> Iterator[tuple[str, str, list[str]]]:
        """Yield the calls of test.py that a run needs: name, result folder, overrides."""
        at = build.threshold(run.cfg)
        variants: list[tuple[str, dict[str, bool], list[str]]] = [("", {}, [])]
        if self.calibrate:
            variants.append((", calibrated", {"calibrated": True}, ["temperature=fit"]))
        if self.calibrate and run.cfg.loss.name == "focal":
            variants.append((", corrected", {"focal_corrected": True}, ["correct_focal=true"]))
        for protocol, results in self.folders.items():
            cfg = run.cfg.copy()
            cfg.protocol.rules = OmegaConf.load(CONFIGS / "protocol" / f"{protocol}.yaml").rules
            options = build.rule_options(self.rules, cfg)
            for name, changed, overrides in variants:
                folder = results_folder(self.checkpoint, results, threshold=at, options=options, **changed)
                yield protocol + name, str(folder), [f"protocol={protocol}", *overrides]

    def missing(self, run: Run) -> list[tuple[str, str, list[str]]]:
        """Return the evaluations in which a rule has no result of this checkpoint."""
        path = run.folder / self.checkpoint
        digest = file_sha256(path) if path.exists() else None

        def is_scored(folder: Path) -> bool:
            files = [folder / f"{rule}.json" for rule in self.rules]
            return digest is not None and all(file.is_file() and digest.encode() in file.read_bytes() for file in files)

        return [one for one in self.evaluations(run) if not is_scored(run.folder / one[1])]

    def is_done(self, run: Run) -> bool:
        """Return whether nothing is left to do for a run."""
        return run.is_trained() and not self.missing(run)


def main() -> None:
    args = parse_arguments()
    check_least(args, threads=1)
    swept = {"model": args.models, "loss": args.losses, "seed": args.seeds}
    grid = load_runs([*args.overrides, *(f"{key}={value}" for key, value in swept.items() if value)])
    folders = {}
    for name in args.protocols.split(","):
        if name not in options("protocol"):
            raise errors.ConfigError(unknown_option("protocol", name))
        folders[name] = str(OmegaConf.load(CONFIGS / "protocol" / f"{name}.yaml").results)
    plan = ScoringPlan(args.rules.split(","), folders, args.checkpoint, args.calibrate)
    for rule in plan.rules:
        build.rule_node(rule, None)  # report an unknown rule now, not after the first training
    todo = [run for run in grid if not plan.is_done(run)]
    if args.dry_run:
        for run in grid:
            state = "finished" if run not in todo else f"epoch {run.epochs_done()} of {run.cfg.epochs}"
            print(errors.one_line(f"{run.folder}  {state}"))
        print(f"{len(grid)} runs, {len(grid) - len(todo)} finished")
        return
    check_data(todo)
    if not args.quiet:
        print(f"{len(grid)} runs, {len(grid) - len(todo)} finished before, {len(todo)} to do", flush=True)
    failed, busy = execute(todo, plan, args)
    if args.record:
        trained = [run for run in grid if run.is_trained()]
        count = sum(run.record(args.record, ROOT) for run in trained)
        print(errors.one_line(f"recorded: {count} files of {len(trained)} runs in {args.record}"))
    print_table(grid)
    for words, reasons in (("failed", failed), ("are in use by another process", busy)):
        if reasons:
            print(f"\n{len(reasons)} of {len(grid)} runs {words}:", file=sys.stderr)
        for run, reason in reasons.items():
            print(f"  {run}: {reason}", file=sys.stderr)
            print(errors.one_line(f"    log: {run.folder / 'reproduce.log'}"), file=sys.stderr)
    if failed or busy:
        sys.exit(errors.EXIT_FAILED if failed else errors.EXIT_BUSY)


def check_data(runs: Sequence[Run]) -> None:
    """Verify each data set of the runs once, so that invalid data is reported before any training."""
    found = {OmegaConf.to_yaml(run.cfg.dataset, resolve=True): run.cfg for run in runs if run.cfg.verify}
    for cfg in found.values():
        splits = {actual: name for name, actual in cfg.dataset.splits.items()}  # two names may be the same split
        for split in splits.values():
            sample = 32 if split == "train" else None  # damaged images that are scored would stop a run at its end
            build.dataset(cfg, split).verify(progress=sys.stderr.isatty(), sample=sample)


def execute(runs: Sequence[Run], plan: ScoringPlan, args: argparse.Namespace) -> tuple[dict[Run, str], dict[Run, str]]:
    """Train and score each run; return those that failed and those that another process works on, with reasons."""
    signal.signal(signal.SIGTERM, _raise_interrupted)
    failed, busy, finished = {}, {}, 0
    costs, started = [run.epochs_left() for run in runs], time.monotonic()
    with tqdm(total=sum(costs), unit="epoch", disable=args.quiet or None, leave=False) as bar:

        def show(name: str, run: Run, finished: int, before: int, cost: int, stage: str) -> None:
            bar.set_description_str(f"{name}  {stage}", refresh=False)
            bar.update(finished + min(run.epochs_done() - before, cost) - bar.n)
            bar.refresh()

        for number, (run, cost) in enumerate(zip(runs, costs, strict=True), 1):
            name, begin = f"[{number}/{len(runs)}] {run}", time.monotonic()
            try:
                progress = partial(show, name, run, finished, run.epochs_done(), cost)
                text = _train_and_score(run, plan, args.threads, progress)
            except errors.TrainingError as error:
                text = failed[run] = str(error)
            except errors.BusyError as error:
                text = busy[run] = str(error)
            except KeyboardInterrupt:
                raise errors.Interrupted("Ctrl-C") from None
            finished += cost
            now = time.monotonic()
            left = tqdm.format_interval((now - started) * (sum(costs) - finished) / finished)
            if not args.quiet:
                bar.clear()
                print(f"{name}: {text}  ({tqdm.format_interval(now - begin)}, about {left} left)", flush=True)
    return failed, {run: reason for run, reason in busy.items() if not plan.is_done(run)}


def _raise_interrupted(number: int, _frame: object) -> None:
    raise errors.Interrupted(signal.Signals(number).name)


def _train_and_score(run: Run, plan: ScoringPlan, threads: int | None, show: Callable[[str], None]) -> str:
    """Train and score one run; return the mean Dice of each rule under the first protocol, in percent, as text.

    Raises:
        TrainingError: a script failed.
        BusyError: another process trains this run.
        Interrupted: a signal stopped a script.
    """

    def stage(name: str, *command: str) -> None:
        code, last = call(command, run.folder / "reproduce.log", threads, lambda: show(name))
        reason = last.removeprefix("error: ")
        if code == errors.EXIT_RESUME:
            raise errors.Interrupted("a signal to the training")
        if code == errors.EXIT_BUSY:
            raise errors.BusyError(reason)
        if code:
            raise errors.TrainingError(f"{name} failed (exit {code}): {reason}")

    if not run.is_trained():
        stage("training", "train.py", *run.overrides, "verify=false", "hydra.mode=RUN")
    rules = [part for rule in plan.rules for part in ("-p", rule)]
    for name, _, overrides in plan.missing(run):
        more = ["--device", run.cfg.device, *overrides]
        stage(f"scoring ({name})", "test.py", "-r", str(run.folder / plan.checkpoint), *rules, *more)
    _, folder, _ = next(plan.evaluations(run))
    scores = {rule: read_json(run.folder / folder / f"{rule}.json")["scores"]["mean_dice"] for rule in plan.rules}
    texts = {rule: "undefined" if score is None else f"{100 * score:.2f}" for rule, score in scores.items()}
    return "mDice " + "  ".join(f"{rule} {text}" for rule, text in texts.items())


def print_table(grid: Sequence[Run]) -> None:
    """Print the tables of all results in the `save_dir` of the grid, also of runs outside the grid."""
    for saved in dict.fromkeys(run.cfg.save_dir for run in grid):
        if Path(saved).is_dir():
            print(flush=True)
            paper_tables.main(["--saved", saved])


if __name__ == "__main__":
    run_cli(main)
