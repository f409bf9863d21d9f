"""Training-free gates (Arrow, arXiv:2405.11157): an adapter's own direction in the input space of a linear.

    Δ = Bᵀ A          A [r, K], B [r, N]: what the adapter adds to a linear, y += Δ x
    v = the top right singular vector of Δ: the input direction of unit length that Δ answers most strongly
    l = gain · (|x · v| / s − threshold)        s = √(2/π · Σ_i v_i² m_i),  m_i = E[x_i²]

|x · v| alone cannot be compared between adapters, nor with the base: a direction along which every input is large would
always win. s is the mean of |x · v| over ordinary inputs, if their components are independent and x · v is normal, so
|x · v| / s is about 1 for any input that has nothing to do with the adapter, whatever v is. The logit is positive, and
the adapter is preferred to the base at 0, where x lies `threshold` times as far along v as inputs ordinarily do. With
threshold 2 that happens by chance for 11 % of inputs, with 3 for 2 %.

m comes from the gate set where it stores it (`layers.{l}.{fused}.input_mean_square`, which training fills in passing).
Elsewhere it is 1: nothing that could be computed from an adapter tells it. For q, k, v, gate and up, whose input comes
from an RMS norm of weight g, m_i ≈ g_i² is a better guess for those who hold the base. Where m is 1 for all adapters
of a linear, s is the same number for all, so the order of the adapters is Arrow's; only the comparison with the base
is then a guess.

How such columns compete with trained ones: trained logits are taken relative to the base's (the null row is
subtracted from all rows, which changes no softmax), so that the base is at 0 for both kinds. See
`perseid_server.adapters.gate_table`.

Shape legend: r rank, K inputs, N outputs. NumPy only.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

GAIN: Final = 2.0
THRESHOLD: Final = 2.0
_SMALLEST = 1e-30  # of s², below which inputs along v are no evidence


@dataclass(frozen=True, slots=True, eq=False)
class ArrowGate:
    """A column of a gate with f = |·|: l = |weight · x| + bias."""

    weight: NDArray[np.float32]  # [K]
    bias: float


def direction(a_rK: NDArray[np.float32], b_rN: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """v as above, its largest component positive (the sign of a singular vector is arbitrary); None where Δ is zero.

    Δ, [N, K], is never formed. With B Bᵀ = E Λ Eᵀ and M = Λ^½ Eᵀ A [r, K], ΔᵀΔ = MᵀM, and v = Mᵀu / |Mᵀu| with u the
    top eigenvector of M Mᵀ [r, r]. In float64, whose digits make up for the squares.
    """
    a, b = (_scaled(matrix.astype(np.float64)) for matrix in (a_rK, b_rN))
    if not (a.any() and b.any()):
        return None
    squares, basis = np.linalg.eigh(b @ b.T)
    m = np.sqrt(np.maximum(squares, 0))[:, None] * (basis.T @ a)
    v: NDArray[np.float64] = m.T @ np.linalg.eigh(m @ m.T)[1][:, -1]
    length = np.linalg.norm(v)
    if length == 0:  # A's rows and B's do not meet
        return None
    v /= length if v[np.abs(v).argmax()] > 0 else -length
    return v


def arrow_gate(
    a_rK: NDArray[np.float32],
    b_rN: NDArray[np.float32],
    mean_square_K: NDArray[np.float32] | None = None,
    *,
    gain: float = GAIN,
    threshold: float = THRESHOLD,
) -> ArrowGate | None:
    """The gate column of an adapter's projection, gain, s and threshold folded in. None where the adapter adds nothing.

    `mean_square_K`: m, ones where None.
    """
    v = direction(a_rK, b_rN)
    if v is None:
        return None
    second_moment = 1.0 if mean_square_K is None else float(np.square(v) @ mean_square_K.astype(np.float64))
    if second_moment < _SMALLEST:
        return None
    scale = math.sqrt(2 / math.pi * second_moment)
    return ArrowGate((v * (gain / scale)).astype(np.float32), -gain * threshold)


def _scaled(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entries of at most 1, so that no square overflows; v does not depend on it."""
    largest = np.abs(matrix).max(initial=0)
    return matrix / largest if largest > 0 else matrix
