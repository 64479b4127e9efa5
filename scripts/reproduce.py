"""Reproduce a grid of experiments from one command: check the data, train, score, print the table.

    python scripts/reproduce.py                                     the built-in data, the small network
    python scripts/reproduce.py --losses ce,focal --seeds 0,1,2 --calibrate epochs=4
    python scripts/reproduce.py experiment=paper/kvasir_seg dataset.root=PATH --record saved/results/kvasir
    python scripts/reproduce.py --models smp_unet,smp_pspnet dataset=kvasir_seg dataset.root=PATH --dry-run

The same command again skips what is finished and goes on with what was interrupted. A cell that fails is
named at the end; the others run. Each cell's own output is in its folder, reproduce.log.
Exit codes: 0 done, 2 bad input, 3 a cell failed, 75 interrupted (run the same command again).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from omegaconf import OmegaConf

from configs import build
from configs.cli import guarded
from configs.compose import CONFIGS, options, unknown_option
from configs.errors import EXIT_FAILED, EXIT_RESUME, Interrupted
from scripts import ROOT
from scripts.grid.cells import Cell, cells
from scripts.grid.record import record
from scripts.grid.running import Display, call, clock
from trainers.results import variant_folder


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags and overrides may mix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", help="such as smp_unet,smp_pspnet (default: the configuration's)")
    parser.add_argument("--losses", help="such as ce,focal,bce")
    parser.add_argument("--seeds", help="such as 0,1,2")
    parser.add_argument("--rules", default="T,max,rankdice", help="what to score (default: %(default)s)")
    parser.add_argument("--protocols", default="corrected,paper", help="how to score (default: %(default)s)")
    parser.add_argument(
        "--checkpoint",
        choices=("best_model.pth", "last.pth"),
        default="best_model.pth",
        help="what to score (default: %(default)s, by the validation score; the paper's tables: last.pth)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="score again with a fitted temperature, and focal-loss networks with their correction",
    )
    parser.add_argument("--threads", type=int, help="threads of each process")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="DIR",
        help="copy results, journals, configurations and report.json to DIR",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the cells and their state, run nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress; the table only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to train.py")
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True)
class Wanted:
    """What to score: rules, the folder of each protocol's results, which checkpoint, and whether calibrated too."""

    rules: list[str]
    folders: dict[str, str]
    checkpoint: str
    calibrate: bool = False

    def passes(self, cell: Cell) -> Iterator[tuple[str, str, list[str]]]:
        """The calls of test.py that a cell wants: what each is, the folder of its results, and its overrides."""
        at = build.threshold(cell.cfg)
        ways: list[tuple[str, str, list[str]]] = [("", variant_folder(at), [])]
        if self.calibrate:
            ways.append((", calibrated", variant_folder(at, calibrated=True), ["temperature=fit"]))
        if self.calibrate and cell.cfg.loss.name == "focal":
            ways.append((", corrected", variant_folder(at, focal_corrected=True), ["correct_focal=true"]))
        for protocol, folder in self.folders.items():
            for name, variant, overrides in ways:
                yield protocol + name, str(Path(folder, variant)), [f"protocol={protocol}", *overrides]

    def scored(self, cell: Cell, folder: str) -> bool:
        """Whether a pass was made."""
        return cell.scored(self.checkpoint, folder, self.rules)

    def done(self, cell: Cell) -> bool:
        """Whether nothing is left to do for a cell."""
        return cell.trained() and all(self.scored(cell, folder) for _, folder, _ in self.passes(cell))


def main() -> None:
    """The command."""
    args = arguments()
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: give 1 or more")
    chosen = [
        f"{key}={value}"
        for key, value in (("model", args.models), ("loss", args.losses), ("seed", args.seeds))
        if value
    ]
    grid = cells([*args.overrides, *chosen])
    folders = {name: _results(name) for name in args.protocols.split(",")}
    wanted = Wanted(args.rules.split(","), folders, args.checkpoint, args.calibrate)
    build.rules(wanted.rules)  # an unknown rule is said now, not after the first training
    todo = [cell for cell in grid if not wanted.done(cell)]
    if args.dry_run:
        for cell in grid:
            state = "finished" if cell not in todo else f"epoch {cell.epochs_done()} of {cell.cfg.epochs}"
            print(f"{cell.folder}  {state}")
        print(f"{len(grid)} cells, {len(grid) - len(todo)} finished")
        return
    check_data(todo)
    failures = run(todo, len(grid), wanted, args)
    if args.record:
        finished = [cell for cell in grid if cell.trained()]
        count = sum(record(cell, args.record, ROOT) for cell in finished)
        print(f"recorded: {count} files of {len(finished)} cells in {args.record}")
    table(grid)
    if failures:
        print(f"\n{len(failures)} of {len(grid)} cells failed:", file=sys.stderr)
        for cell, reason in failures.items():
            print(f"  {cell}: {reason}\n    log: {cell.folder / 'reproduce.log'}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _results(protocol: str) -> str:
    """The folder of a run in which a protocol's results are."""
    if protocol not in options("protocol"):
        raise ValueError(unknown_option("protocol", protocol))
    return str(OmegaConf.load(CONFIGS / "protocol" / f"{protocol}.yaml").results)


def check_data(todo: Sequence[Cell]) -> None:
    """Check every data set that the cells need, once; a fault is said before anything is trained."""
    seen = set()
    for cell in todo:
        key = OmegaConf.to_yaml(cell.cfg.dataset, resolve=True)
        if key in seen or not cell.cfg.verify:
            continue
        seen.add(key)
        named = {actual: split for split, actual in cell.cfg.dataset.splits.items()}  # two may be the same
        for split in named.values():
            build.dataset(cell.cfg, split).verify(progress=sys.stderr.isatty())


def run(todo: Sequence[Cell], total: int, wanted: Wanted, args: argparse.Namespace) -> dict[Cell, str]:
    """Train and score each cell; return those that failed, with the reason."""
    signal.signal(signal.SIGTERM, _interrupt)
    display, failures = Display(todo, args.quiet), {}
    if not args.quiet:
        display.say(f"{total} cells, {total - len(todo)} finished before, {len(todo)} to do")
    with contextlib.closing(display):
        for number, cell in enumerate(todo, 1):
            started = time.monotonic()
            try:
                reason = _cell(cell, number, display, wanted, args.threads)
            except KeyboardInterrupt:
                raise Interrupted("Ctrl-C") from None
            seconds = time.monotonic() - started
            left = display.finish(cell, seconds, not reason)
            if reason:
                failures[cell] = reason
            if not args.quiet:
                ahead = f", about {clock(left)} left" if left else ""
                text = reason or _shown(cell, wanted)
                display.say(f"[{number}/{len(todo)}] {cell}: {text}  ({clock(seconds)}{ahead})")
    return failures


def _interrupt(number: int, _frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def _cell(cell: Cell, number: int, display: Display, wanted: Wanted, threads: int | None) -> str:
    """Train and score one cell; return the reason if it failed, else an empty text."""
    log, before, started = cell.folder / "reproduce.log", cell.epochs_done(), time.monotonic()

    def stage(name: str, *command: str) -> str:
        code, last = call(command, log, threads, lambda: display.show(number, cell, name, started, before))
        if code == EXIT_RESUME:
            raise Interrupted("a signal to the training")
        return "" if code == 0 else f"{name} failed (exit {code}): {last.removeprefix('error: ')}"

    if not cell.trained():
        failed = stage("training", "train.py", *cell.overrides, "verify=false", "hydra.mode=RUN")
        if failed:
            return failed
    path = str(cell.folder / wanted.checkpoint)
    rules = [part for rule in wanted.rules for part in ("-p", rule)]
    for name, folder, overrides in wanted.passes(cell):
        if not wanted.scored(cell, folder):
            options = ["--device", cell.cfg.device, *overrides]
            failed = stage(f"scoring ({name})", "test.py", "-r", path, *rules, *options)
            if failed:
                return failed
    return ""


def _shown(cell: Cell, wanted: Wanted) -> str:
    """The mean Dice of each rule under the first protocol, in percent."""
    _, where, _ = next(wanted.passes(cell))
    scores = {
        rule: json.loads((cell.folder / where / f"{rule}.json").read_text(encoding="utf-8"))["scores"]
        for rule in wanted.rules
    }
    return "mDice " + "  ".join(
        f"{rule} {100 * (score['mean_dice'] or 0):.2f}" for rule, score in scores.items()
    )


def table(grid: Sequence[Cell]) -> None:
    """Print the table of all results in the grid's folders."""
    for saved in dict.fromkeys(cell.cfg.save_dir for cell in grid):
        if Path(saved).is_dir():
            print(flush=True)
            subprocess.run(
                [sys.executable, str(ROOT / "scripts" / "paper_tables.py"), "--saved", saved],
                check=False,
            )


if __name__ == "__main__":
    guarded(main)
