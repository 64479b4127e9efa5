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
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from omegaconf import OmegaConf

from configs import build
from configs.cli import run_cli
from configs.compose import CONFIGS, options, unknown_option
from configs.errors import EXIT_BUSY, EXIT_FAILED, EXIT_RESUME, BusyError, ConfigError, Interrupted, TrainingError
from configs.files import read_json
from scripts import ROOT, paper_tables
from scripts.common import command_line
from scripts.grid import Display, Run, call, format_time, load_runs
from trainers.results import results_folder


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags and overrides may be mixed."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--models", help="for example smp_unet,smp_pspnet (default: from the configuration)")
    add("--losses", help="for example ce,focal,bce")
    add("--seeds", help="for example 0,1,2")
    add("--rules", default="T,max,rankdice", help="rules to score (default: %(default)s)")
    add("--protocols", default="corrected,paper", help="scoring protocols (default: %(default)s)")
    checkpoint = "checkpoint to score (default: %(default)s; the paper's tables use last.pth)"
    add("--checkpoint", choices=("best_model.pth", "last.pth"), default="best_model.pth", help=checkpoint)
    calibrate = "also score with a fitted temperature, and focal-loss networks with their correction"
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
    """What to score for each run: rules, the result folder of each protocol, the checkpoint, calibration."""

    rules: list[str]
    folders: dict[str, str]
    checkpoint: str
    calibrate: bool = False

    def evaluations(self, run: Run) -> Iterator[tuple[str, str, list[str]]]:
        """Yield the calls of test.py that a run needs: name, result folder, overrides."""
        at = build.threshold(run.cfg)
        variants: list[tuple[str, dict[str, bool], list[str]]] = [("", {}, [])]
        if self.calibrate:
            variants.append((", calibrated", {"calibrated": True}, ["temperature=fit"]))
        if self.calibrate and run.cfg.loss.name == "focal":
            variants.append((", corrected", {"focal_corrected": True}, ["correct_focal=true"]))
        for protocol, results in self.folders.items():
            for name, changed, overrides in variants:
                folder = results_folder(self.checkpoint, results, threshold=at, **changed)
                yield protocol + name, str(folder), [f"protocol={protocol}", *overrides]

    def is_scored(self, run: Run, folder: str) -> bool:
        """Return whether the evaluation with this result folder is done."""
        return run.is_scored(self.checkpoint, folder, self.rules)

    def is_done(self, run: Run) -> bool:
        """Return whether nothing is left to do for a run."""
        return run.is_trained() and all(self.is_scored(run, folder) for _, folder, _ in self.evaluations(run))


def main() -> None:
    """Run the command."""
    args = arguments()
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads={args.threads} is invalid: expected an integer >= 1.")
    swept = (("model", args.models), ("loss", args.losses), ("seed", args.seeds))
    grid = load_runs([*args.overrides, *(f"{key}={value}" for key, value in swept if value)])
    folders = {name: _results_folder(name) for name in args.protocols.split(",")}
    plan = ScoringPlan(args.rules.split(","), folders, args.checkpoint, args.calibrate)
    for rule in plan.rules:
        build.rule_node(rule, None)  # report an unknown rule now, not after the first training
    todo = [run for run in grid if not plan.is_done(run)]
    if args.dry_run:
        for run in grid:
            state = "finished" if run not in todo else f"epoch {run.epochs_done()} of {run.cfg.epochs}"
            print(f"{run.folder}  {state}")
        print(f"{len(grid)} runs, {len(grid) - len(todo)} finished")
        return
    check_data(todo)
    failed, busy = execute(todo, len(grid), plan, args)
    if args.record:
        trained = [run for run in grid if run.is_trained()]
        count = sum(run.record(args.record, ROOT) for run in trained)
        print(f"recorded: {count} files of {len(trained)} runs in {args.record}")
    print_table(grid)
    for words, reasons in (("failed", failed), ("are in use by another process", busy)):
        if reasons:
            print(f"\n{len(reasons)} of {len(grid)} runs {words}:", file=sys.stderr)
        for run, reason in reasons.items():
            print(f"  {run}: {reason}\n    log: {run.folder / 'reproduce.log'}", file=sys.stderr)
    if failed or busy:
        sys.exit(EXIT_FAILED if failed else EXIT_BUSY)


def _results_folder(protocol: str) -> str:
    """Return the sub-folder of a run that holds the results of a protocol."""
    if protocol not in options("protocol"):
        raise ConfigError(unknown_option("protocol", protocol))
    return str(OmegaConf.load(CONFIGS / "protocol" / f"{protocol}.yaml").results)


def check_data(runs: Sequence[Run]) -> None:
    """Verify each data set of the runs once, so that invalid data is reported before any training."""
    seen = set()
    for run in runs:
        key = OmegaConf.to_yaml(run.cfg.dataset, resolve=True)
        if key in seen or not run.cfg.verify:
            continue
        seen.add(key)
        splits = {actual: name for name, actual in run.cfg.dataset.splits.items()}  # two names may share one
        for split in splits.values():
            build.dataset(run.cfg, split).verify(progress=sys.stderr.isatty())


def execute(
    runs: Sequence[Run], total: int, plan: ScoringPlan, args: argparse.Namespace
) -> tuple[dict[Run, str], dict[Run, str]]:
    """Train and score each run; return those that failed and those that another process uses, with reasons."""
    signal.signal(signal.SIGTERM, _raise_interrupted)
    display, failed, busy = Display(runs, args.quiet), {}, {}
    if not args.quiet:
        display.say(f"{total} runs, {total - len(runs)} finished before, {len(runs)} to do")
    with contextlib.closing(display):
        for number, run in enumerate(runs, 1):
            started = time.monotonic()
            try:
                text = _train_and_score(run, number, display, plan, args.threads)
            except TrainingError as error:
                text = failed[run] = str(error)
            except BusyError as error:
                text = busy[run] = str(error)
            except KeyboardInterrupt:
                raise Interrupted("Ctrl-C") from None
            left = display.finish(run)
            if not args.quiet:
                ahead = f", about {format_time(left)} left" if left else ""
                duration = format_time(time.monotonic() - started)
                display.say(f"[{number}/{len(runs)}] {run}: {text}  ({duration}{ahead})")
    return failed, {run: reason for run, reason in busy.items() if not plan.is_done(run)}


def _raise_interrupted(number: int, _frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def _train_and_score(run: Run, number: int, display: Display, plan: ScoringPlan, threads: int | None) -> str:
    """Train and score one run; return its scores as text.

    Raises:
        TrainingError: a script failed.
        BusyError: another process trains this run.
    """
    log, before = run.folder / "reproduce.log", run.epochs_done()

    def stage(name: str, *command: str) -> None:
        def tick() -> None:
            display.show(number, run, name, run.epochs_done() - before)

        code, last = call(command, log, threads, tick)
        reason = last.removeprefix("error: ")
        if code == EXIT_RESUME:
            raise Interrupted("a signal to the training")
        if code == EXIT_BUSY:
            raise BusyError(reason)
        if code:
            raise TrainingError(f"{name} failed (exit {code}): {reason}")

    if not run.is_trained():
        stage("training", "train.py", *run.overrides, "verify=false", "hydra.mode=RUN")
    path = str(run.folder / plan.checkpoint)
    rules = [part for rule in plan.rules for part in ("-p", rule)]
    for name, folder, overrides in plan.evaluations(run):
        if not plan.is_scored(run, folder):
            options = ["--device", run.cfg.device, *overrides]
            stage(f"scoring ({name})", "test.py", "-r", path, *rules, *options)
    return _format_scores(run, plan)


def _format_scores(run: Run, plan: ScoringPlan) -> str:
    """Return the mean Dice of each rule under the first protocol, in percent."""
    _, folder, _ = next(plan.evaluations(run))
    parts = []
    for rule in plan.rules:
        record = read_json(run.folder / folder / f"{rule}.json")
        parts.append(f"{rule} {100 * (record['scores']['mean_dice'] or 0):.2f}")
    return "mDice " + "  ".join(parts)


def print_table(grid: Sequence[Run]) -> None:
    """Print the table of all results in the folders of the grid."""
    for saved in dict.fromkeys(run.cfg.save_dir for run in grid):
        if Path(saved).is_dir():
            print(flush=True)
            paper_tables.main(["--saved", saved])


if __name__ == "__main__":
    run_cli(main)
