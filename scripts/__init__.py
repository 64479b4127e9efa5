"""Commands around the experiments; nothing imports them but each other and the tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the repository
