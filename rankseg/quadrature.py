"""Gauss rules for ∫_0^∞ e^{-at} H(t) dt, with weights that neither overflow nor underflow.

A rule is a pair (t, w) of float64 tensors with ∫_0^∞ e^{-at} H(t) dt ≈ Σ_k exp(w_k - a t_k) H(t_k): the
logarithms of the weights are kept, so that they join the exponents of the integrand before `exp`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def laguerre(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss–Laguerre rule of unit scale; for a scale λ use t/λ and w - log λ.

    It is exact for e^{-t} times polynomials of degree < 2·nodes. The nodes are the eigenvalues of the Jacobi
    matrix (Golub & Welsch, 1969). The weights come from the Laguerre functions e^{-x/2} L_n(x), which stay
    of moderate size where the weights themselves fall to 1e-47.
    """
    order = torch.arange(nodes, dtype=torch.float64, device="cpu")
    x = torch.linalg.eigvalsh(torch.diag(2 * order + 1) + torch.diag(order[1:], 1) + torch.diag(order[1:], -1))
    before, function = torch.zeros_like(x), torch.exp(-x / 2)
    for n in range(nodes + 1):
        before, function = function, ((2 * n + 1 - x) * function - n * before) / (n + 1)
    # Weight x / ((n+1) L_{n+1}(x))², times e^{x} because e^{-x} belongs to the integrand here.
    return x, torch.log(x) - 2 * torch.log((nodes + 1) * function.abs())


@lru_cache(maxsize=8)
def jacobi(nodes: int, power: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gauss–Jacobi rule in s = e^{-t} on (0, 1) with weight s^power, 0 <= power < 1 (0: Gauss–Legendre).

    It is exact for integrals ∫_0^1 s^power · polynomial(s) ds of degree < 2·nodes, which is what the
    expected scores of a few pixels are; `power` is the fractional part of `smooth`.
    """
    n = torch.arange(nodes, dtype=torch.float64, device="cpu")
    m, b = n[1:], power
    diagonal = b * b / ((2 * n + b) * (2 * n + b + 2)) if b else torch.zeros_like(n)
    off = torch.sqrt(4 * m * m * (m + b) ** 2 / ((2 * m + b) ** 2 * (2 * m + b + 1) * (2 * m + b - 1)))
    z, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    s = (1 + z) / 2
    t = -torch.log(s)
    return t, torch.log(vectors[0] ** 2 / (1 + b)) + (1 + b) * t
