"""Rotary positions: pairs of features turn by angles that grow with the position (Su et al. 2021).

The first half of a head's features is paired with the second, as in LLaMA's published weights.

Shapes: B batch, h heads, t positions, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turns(
    positions_t: Tensor, head: int, dtype: torch.dtype, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles position x base ** (-2 i / K).

    (t, K), or (B, 1, t, K) of positions (B, t).
    """
    exponents = torch.arange(0, head, 2, dtype=torch.float64, device=positions_t.device) / head
    angles = positions_t.double().unsqueeze(-1) * base**-exponents
    angles_tK = torch.cat((angles, angles), dim=-1)
    if positions_t.dim() > 1:  # all heads of a row alike
        angles_tK = angles_tK.unsqueeze(1)
    return angles_tK.cos().to(dtype), angles_tK.sin().to(dtype)


def turn(x_BhtK: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, turned; in the precision of ``turns``, given back in their own."""
    cosines_tK, sines_tK = turns
    first, second = x_BhtK.chunk(2, dim=-1)
    across_BhtK = torch.cat((-second, first), dim=-1)
    return (x_BhtK * cosines_tK + across_BhtK * sines_tK).to(x_BhtK.dtype)
