"""The definition of every kernel of this package, in plain torch: slow, obvious, right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_publish(sources: Sequence[Tensor], targets: Sequence[Tensor], divide: float = 1.0) -> None:
    """Store the elementwise sum of all sources, over ``divide``, in every target.

    The sum goes in the order of the list. 16-bit floats are added in float32 and rounded once, at
    the end; all others are added in their own dtype, in which integers wrap and their quotient is
    cut towards zero. Targets may be the sources themselves; otherwise nothing overlaps.
    """
    dtype = sources[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = sources[0].to(wide)
    for source in sources[1:]:
        total = total + source.to(wide)
    if divide != 1:
        if dtype.is_floating_point:
            total = total / divide
        else:  # by a float, torch would divide in float32
            total = torch.div(total, int(divide), rounding_mode="trunc")
    total = total.clone()  # one source alone would be a view of itself
    for target in targets:
        target.copy_(total)
