"""Commands around the experiments. Only other commands and the tests import them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the repository
