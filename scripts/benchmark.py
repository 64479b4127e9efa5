"""Speed and memory, as ratios measured side by side in one run:

python scripts/benchmark.py rules | step | loader | test  [options; --help says which]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import guarded
from scripts.benchmarks import loader, rules, step, test

MODULES = {"rules": rules, "step": step, "loader": loader, "test": test}


def main() -> None:
    """Hand over to the module of the benchmark asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in MODULES.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    args = parser.parse_args()
    MODULES[args.benchmark].main(args)


if __name__ == "__main__":
    guarded(main)
