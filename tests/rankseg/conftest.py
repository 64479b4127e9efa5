"""Run the tests of the exact rules with both backends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rankseg import native

BOTH = ("test_exact", "test_rules")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.rpartition(".")[2]
    if name in BOTH:
        metafunc.parametrize("rankseg_backend", ["python", "native"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def rankseg_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Force the backend that a test is parametrized with; skip if it is not installed here."""
    name = getattr(request, "param", None)
    if name == "native" and native.library() is None:
        pytest.skip(native.reason())
    with pytest.MonkeyPatch.context() as patch:
        if name:
            patch.setenv("RANKSEG_BACKEND", name)
        yield
