"""BERT (Devlin et al. 2019): LayerNorm behind each sum, tokens see both sides, masked words.

All tokens are of the first type. ``bert_reference.py`` is the same model in one file of plain
torch, and the definition.
"""

from __future__ import annotations

from mpmp.models.style import Style

BERT = Style(
    norm="layer",
    feed_forward="gelu",
    positions="learnt",
    bias=True,
    causal=False,
    post_norm=True,
    token_types=True,
    transform=True,
)
