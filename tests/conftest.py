"""Fixtures that every test may use."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Two test processes on two cores: one thread each is faster than two that wait for each other. torch reads this
# when it is imported, which takes seconds that the process handing out the tests can do without.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Compose each configuration once: a composition takes 0.1 s, and many tests need the same ones."""
    from configs import compose

    found: dict[tuple[str, ...], Any] = {}
    original = compose.hydra_compose

    def remembered(name: str, overrides: list[str]) -> Any:
        key = (name, *overrides)
        if key not in found:
            found[key] = original(name, overrides)
        return copy.deepcopy(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "hydra_compose", remembered)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Outputs recorded from the original implementation (tests/golden/README.md)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder of real images and probability maps next to the repository; tests skip if it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real images next to the repository")
    return path
