"""Speed and memory, as ratios measured side by side in one run:

python scripts/benchmark.py rules | step | loader | test | volume  [options; --help says which]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from scripts.benchmarks import loader, rules, step, test, volume

MODULES = {"rules": rules, "step": step, "loader": loader, "test": test, "volume": volume}


def main() -> None:
    """Hand over to the module of the benchmark asked for; flags and overrides may mix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    parsers = {}
    for name, module in MODULES.items():
        parsers[name] = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(parsers[name])
    name, *rest = sys.argv[1:] or [""]
    if name not in MODULES:
        parser.parse_args()  # help, or what is wrong
    MODULES[name].main(parsers[name].parse_intermixed_args(rest))


if __name__ == "__main__":
    run_cli(main)
