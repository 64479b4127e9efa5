"""Fixtures that every test may use."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Two test processes on two cores: one thread each is faster than two that wait for each other. torch reads this
# when it is imported, which takes seconds that the process handing out the tests can do without.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fork the server of tests/trainers/forked.py after all imports, before any test changes anything."""
    forked = sys.modules.get("tests.trainers.forked")
    if forked and sys.platform == "linux" and not session.config.option.collectonly:
        forked.fork_server()


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Compose each configuration once: a composition takes 0.1 s, and many tests need the same ones."""
    from configs import compose

    found: dict[tuple[Any, ...], bytes] = {}
    original = compose.hydra_compose

    def remembered(name: str, overrides: list[str], **options: bool) -> Any:
        key = (name, *overrides, *options)
        if key not in found:
            found[key] = pickle.dumps(original(name, overrides, **options))
        return pickle.loads(found[key])

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
