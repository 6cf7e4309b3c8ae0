"""The two-layer MLP of textbooks, cut by column, then by row; no token sees another.

Each layer is ``x + down(gelu(up x))``. ``mlp_reference.py`` is the same model in one file of plain
torch, and the definition.
"""

from __future__ import annotations

from mpmp.models.style import Style

MLP = Style(norm="none", feed_forward="gelu", positions="none", bias=True, attention=False)
