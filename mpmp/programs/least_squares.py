"""Least squares with no number below zero, in NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[Any]


def non_negative_least_squares(factors: Vector, wanted: Vector) -> Vector:
    """The x >= 0 with the least |factors x - wanted|; Lawson and Hanson 1974, chapter 23.

    By normal equations: there are few columns, and a matrix that small keeps BLAS from waking its
    threads, which costs more than the sum where other ranks have the cores.
    """
    lengths = np.linalg.norm(factors, axis=0)
    scale = np.where(lengths > 0, lengths, 1.0)
    scaled = factors / scale
    gram, moment = scaled.T @ scaled, scaled.T @ wanted
    enough = 1e-10 * np.linalg.norm(wanted)
    x, free = np.zeros(len(gram)), np.zeros(len(gram), bool)
    for _ in range(3 * len(x) + 3):
        gain = np.where(free, -np.inf, moment - gram @ x)
        if gain.max(initial=-np.inf) <= enough:
            break
        free[gain.argmax()] = True
        while True:
            best = np.zeros_like(x)
            # Columns that always go together share what they have between them.
            best[free] = np.linalg.lstsq(gram[np.ix_(free, free)], moment[free], rcond=1e-12)[0]
            over = free & (best <= 0)
            if not over.any():
                break
            # Go towards the best as far as the first number that reaches its bound.
            share = np.min(x[over] / np.maximum(x[over] - best[over], 1e-300))
            x += share * (best - x)
            free &= ~(over & (x <= 1e-14))
            x[~free] = 0.0
        x = best
    found: Vector = x / scale
    return found
