"""Fixtures of the tests of networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import recipe


@pytest.fixture(scope="session")
def released(recordings: Path) -> Callable[..., dict[str, Any]]:
    """Makes the checkpoint of a network: ``released(name, num_classes, full=...)``."""
    return functools.partial(recipe.released, recordings)
