"""LLaMA (Touvron et al. 2023): RMSNorm in front of each branch, SwiGLU, RoPE, no biases.

``llama_reference.py`` is the same model in one file of plain torch, and the definition.
"""

from __future__ import annotations

from mpmp.models.style import Style

LLAMA = Style(norm="rms", feed_forward="swiglu", positions="rope", bias=False)
