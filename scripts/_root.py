"""Puts the repository on the import path, so that ``python scripts/NAME.py`` works from any folder.

And takes ``scripts/`` off it, where ``scripts/statistics.py`` would hide the standard library's module.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(ROOT),
    *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "scripts")),
]
