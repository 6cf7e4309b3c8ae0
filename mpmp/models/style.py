"""What tells one kind of model from another: the choices that its blocks are made by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Style:
    """A kind of model; each file beside this one holds one."""

    norm: Literal["layer", "rms", "none"]
    """LayerNorm (Ba et al. 2016), RMSNorm (Zhang and Sennrich 2019), or none."""
    feed_forward: Literal["gelu", "gelu_tanh", "swiglu"]
    """GELU (Hendrycks and Gimpel 2016), exact or by tanh, or SwiGLU (Shazeer 2020)."""
    positions: Literal["learnt", "rope", "none"]
    """A vector added to each token, or queries and keys that turn (Su et al. 2021)."""
    bias: bool
    """Linear layers add one."""
    attention: bool = True
    """Blocks have attention in front of the feed-forward."""
    causal: bool = True
    """Tokens see the past only."""
    post_norm: bool = False
    """Norms stand behind each sum, where otherwise they stand in front of each branch."""
    token_types: bool = False
    """Tokens are of several types, each with a vector that is added."""
    transform: bool = False
    """The head has a layer of its own in front of the vocabulary, and a bias behind."""
