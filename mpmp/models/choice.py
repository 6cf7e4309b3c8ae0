"""The next token of each sequence: the likeliest, or a draw that is the same on every layout.

    logits -- / temperature --> the top k --> the fewest of them that have p of the probability
           --> the largest of logit + Gumbel noise, which is a draw from their softmax

Noise hangs on the seed, the number of the prompt, the place in the sequence and the token, so a
draw asks for no other draw and for no rank (Gumbel 1954; Maddison et al. 2014). Nucleus: Holtzman
et al. 2020.

Shapes: B sequences, V vocabulary, C tokens that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from mpmp.errors import NotFiniteError
from mpmp.parallel import counter


@dataclass(frozen=True)
class Choice:
    """How a token is chosen."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest of the likeliest tokens that have this share of the probability."""
    seed: int = 1

    def next(self, logits_BV: Tensor, prompts: Sequence[int], places: Sequence[int]) -> Tensor:
        """A token (B, int64) for the place of each sequence, which continues a prompt by number.

        Raises NotFiniteError where logits are not numbers.
        """
        if self.temperature == 0.0:
            best, tokens = logits_BV.max(-1)
        else:
            best, tokens = self._draw(logits_BV.double() / self.temperature, prompts, places)
        if not all(map(isfinite, best.tolist())):
            raise NotFiniteError("the model's logits are not finite; its weights must be damaged")
        return tokens

    def _draw(
        self, logits_BV: Tensor, prompts: Sequence[int], places: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The largest logit with its noise, and whose it is."""
        tokens_BC: Tensor | None = None
        scores_BC, V = logits_BV, logits_BV.shape[-1]
        if self.top_k is not None and self.top_k < V:
            scores_BC, tokens_BC = logits_BV.topk(self.top_k)
        elif self.top_p < 1.0:
            scores_BC, tokens_BC = logits_BV.sort(descending=True)
        if self.top_p < 1.0:
            shares_BC = scores_BC.softmax(-1)
            before_BC = shares_BC.cumsum(-1) - shares_BC
            scores_BC = scores_BC.masked_fill(before_BC >= self.top_p, float("-inf"))
        noisy_BC = scores_BC + self._noise(tokens_BC, prompts, places, logits_BV)
        best, at = noisy_BC.max(-1)
        if tokens_BC is not None:
            at = tokens_BC.gather(-1, at.unsqueeze(-1)).squeeze(-1)
        return best, at

    def _noise(
        self,
        tokens_BC: Tensor | None,
        prompts: Sequence[int],
        places: Sequence[int],
        like_BV: Tensor,
    ) -> Tensor:
        """Gumbel's, of the tokens that may be drawn; None: of all."""
        V, device = like_BV.shape[-1], like_BV.device
        tokens = torch.arange(V, device=device) if tokens_BC is None else tokens_BC
        keys = [counter.key_of(self.seed, f"prompt/{number}") for number in prompts]
        rows = [
            counter.uniform(key, place * V + row)
            for key, place, row in zip(keys, places, tokens.expand(len(keys), -1), strict=True)
        ]
        return -torch.log(-torch.log(torch.stack(rows).clamp_min(1e-300)))
