"""GPT (Radford et al. 2019): LayerNorm in front of each branch, GELU, learnt positions, biases.

``gpt_reference.py`` is the same model in one file of plain torch, and the definition.
"""

from __future__ import annotations

from mpmp.models.style import Style

GPT = Style(norm="layer", feed_forward="gelu_tanh", positions="learnt", bias=True)
