"""Build the optional compiled kernel of `rankseg`; everything else is in pyproject.toml.

    python setup.py build_ext --inplace     # build it in the source tree

Without a C++ compiler the installation succeeds, and `rankseg` uses its Python implementation.
"""

from __future__ import annotations

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMPILE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
]
# The kernel refers to neither torch nor Python. With the C++ runtime inside, it needs only the C library.
LINK = ["-s", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []


class BuildKernel(build_ext):
    """Build a plain shared library: its name and its wheel do not depend on the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return `rankseg/_kernel.so` in place of `rankseg/_kernel.cpython-….so`."""
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        return fullname.replace(".", "/") + suffix


commands: dict[str, type] = {"build_ext": BuildKernel}

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel  # type: ignore[no-redef]
    except ImportError:
        bdist_wheel = None  # type: ignore[assignment, misc]

if bdist_wheel is not None:

    class PlatformWheel(bdist_wheel):  # type: ignore[misc, valid-type]
        """Tag the wheel py3-none-PLATFORM."""

        def get_tag(self) -> tuple[str, str, str]:
            """Return the tag without the version of Python."""
            return "py3", "none", super().get_tag()[2]

    commands["bdist_wheel"] = PlatformWheel

setup(
    ext_modules=[
        Extension(
            "rankseg._kernel",
            ["rankseg/kernel.cpp"],
            extra_compile_args=[*COMPILE, "-pthread"],
            extra_link_args=[*LINK, "-pthread"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass=commands,
)
