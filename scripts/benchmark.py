"""Measure speed and memory, as ratios within one run.

python scripts/benchmark.py rules
python scripts/benchmark.py step model=pspnet --steps 12
python scripts/benchmark.py rules --help        the options of one benchmark
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from scripts.benchmarks import loader, rules, step, test, volume
from scripts.common import check_least, command_line

MODULES = {"rules": rules, "step": step, "loader": loader, "test": test, "volume": volume}
AT_LEAST_ONE = ("rounds", "steps", "frames", "images", "threads", "size", "largest", "depth")  # options of some modules


def main() -> None:
    """Run the benchmark that the first argument names; its flags and overrides may be mixed."""
    parser = command_line(__doc__)
    about = "; ".join(f"{name}: {(module.__doc__ or '').splitlines()[0]}" for name, module in MODULES.items())
    parser.add_argument("benchmark", choices=MODULES, help=about)
    name = parser.parse_args(sys.argv[1:2]).benchmark
    parser = command_line(MODULES[name].__doc__)
    parser.prog += f" {name}"
    MODULES[name].add_arguments(parser)
    args = parser.parse_intermixed_args(sys.argv[2:])
    check_least(args, **{option: 1 for option in AT_LEAST_ONE if option in args})
    MODULES[name].main(args)


if __name__ == "__main__":
    run_cli(main)
