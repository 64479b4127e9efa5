"""Commands that prepare data, run grids, predict and report. Only other commands and the tests import them.

Functions here raise UserError for bad input; `configs.cli.run_cli` prints it in one line.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the repository
