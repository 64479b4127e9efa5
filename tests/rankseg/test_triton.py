"""The Triton path: interpreted against the Python solver, and compiled for a card that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_with_the_interpreter(tier: str) -> None:
    """The tests of interpreted.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", tier, "tests/rankseg/interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "RANKSEG_BACKEND": "python"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


SIGNATURES = """
statistics_kernel flat=*fp32 stride_row=i64 stride_pixel=i64 pixels=i64 span=i64 total=*fp64 peak=*fp32 bad=*i32
guess_kernel flat=*fp32 stride_row=i64 stride_pixel=i64 pixels=i64 step=i64 mean=*fp64 smooth=*fp64 cut=*fp64 volume=*fp64 density=*fp64
excess_kernel flat=*fp32 stride_row=i64 stride_pixel=i64 pixels=i64 span=i64 cut=*fp64 excess=*fp64
bracket_kernel mean=*fp64 smooth=*fp64 peak=*fp32 cut=*fp64 volume=*fp64 density=*fp64 excess=*fp64 low=*fp32 high=*fp32 least=fp32 chunks=i32
gather_kernel flat=*fp16 stride_row=i64 stride_pixel=i64 pixels=i64 span=i64 low=*fp32 high=*fp32 sums=*fp64 window=*fp32 cursor=*i32 capacity=i32
equal_kernel flat=*fp32 stride_row=i64 stride_pixel=i64 pixels=i64 span=i64 cutpoint=*fp32 tied=*i64 equal=*i32
select_kernel flat=*bf16 stride_row=i64 stride_pixel=i64 pixels=i64 span=i64 tau=*i64 cutpoint=*fp32 tied=*i64 before=*i64 masks=*i8
solve_kernel window=*fp32 cursor=*i32 sums=*fp64 low=*fp32 smooth=*fp64 table=*fp64 scores=*fp64 tau=*i64 cutpoint=*fp32 tied=*i64 failed=*i32 capacity=i32 pixels=i64 least=fp32 peak=*fp32 chunks=i32
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize("line", SIGNATURES.strip().splitlines(), ids=lambda line: line.split()[0])
def test_kernels_compile_for_a_card(line: str) -> None:
    """Down to machine code for an H100, with the types that `best_masks` passes; no card is needed."""
    program = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rankseg import triton_kernels
line = {line!r}.split()
kernel, types = getattr(triton_kernels, line[0]), dict(word.split("=") for word in line[1:])
values = {{"BLOCK": 512 if line[0] == "solve_kernel" else 1024, "SAMPLE": 8192, "CHUNKS": 64}}
values["DTYPE"] = triton_kernels.tl.float32
for dice in (True, False) if "DICE" in kernel.arg_names else (True,):
    constants = {{name: value for name, value in (values | {{"DICE": dice}}).items() if name in kernel.arg_names}}
    signature = {{name: types.get(name, "constexpr") for name in kernel.arg_names}}
    places = {{(kernel.arg_names.index(name),): value for name, value in constants.items()}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    options = {{"num_warps": 8}} if line[0] == "solve_kernel" else {{}}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-2000:]
