"""BERT (Devlin et al. 2019): LayerNorm behind each sum, tokens see both sides, masked words.

All tokens are of one type, so that there is no embedding of types. ``bert_reference.py`` is the
same model in one file of plain torch, and the definition.
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
    transform=True,
)
