"""Experts in one file of plain torch: the definition that ``parallel/expert.py`` is proved against.

One token, one choice at a time. Parameters carry the names of a merged model.

Shapes: B batch, T time, D model, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor, nn


class ReferenceExperts(nn.Module):
    """A feed-forward of several experts; ``forward`` gives (B, T, D) and the auxiliary loss.

    The loss is E sum_e f_e P_e, summed over the sequences. Weights: ``router`` (E, D), ``up``
    (E, H, D), or (E, 2, H, D) where gated, ``down`` (E, D, H).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        capacity: float,
        activation: Callable[[Tensor], Tensor],
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.top_k, self.capacity = experts, top_k, capacity
        self.activation, self.gated = activation, gated
        up = (experts, 2, hidden, width) if gated else (experts, hidden, width)
        self.router = nn.Parameter(torch.empty(experts, width))
        self.up = nn.Parameter(torch.empty(up))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_BTD: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, T, _ = x_BTD.shape
        lengths = [T] * B if lengths_B is None else lengths_B.tolist()
        found = [self.sequence(x_TD[:n]) for x_TD, n in zip(x_BTD, lengths, strict=True)]
        y_BTD = torch.stack([nn.functional.pad(y, (0, 0, 0, T - len(y))) for y, _ in found])
        return y_BTD, torch.stack([loss for _, loss in found]).sum()

    def sequence(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """One sequence without padding."""
        T = len(x_TD)
        probabilities_TE = (x_TD @ self.router.T).softmax(-1)
        gates_Tk, choices_Tk = probabilities_TE.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            gates_Tk = gates_Tk / gates_Tk.sum(-1, keepdim=True)
        room = ceil(self.capacity * self.top_k * T / self.experts) if self.capacity else T
        taken = [0] * self.experts
        chosen = [0] * self.experts
        rows = [torch.zeros_like(x_D) for x_D in x_TD]
        for choice in range(self.top_k):
            for token in range(T):
                expert = int(choices_Tk[token, choice])
                chosen[expert] += 1
                if taken[expert] < room:
                    taken[expert] += 1
                    gate = gates_Tk[token, choice]
                    rows[token] = rows[token] + gate * self.expert(expert, x_TD[token])
        share_E = x_TD.new_tensor(chosen) / (self.top_k * T)
        loss: Tensor = self.experts * (share_E * probabilities_TE.mean(0)).sum()
        return torch.stack(rows), loss

    def expert(self, number: int, x_D: Tensor) -> Tensor:
        """The feed-forward of one expert."""
        if self.gated:
            gate_HD, up_HD = self.up[number]
            hidden_H = self.activation(gate_HD @ x_D) * (up_HD @ x_D)
        else:
            hidden_H = self.activation(self.up[number] @ x_D)
        result: Tensor = self.down[number] @ hidden_H
        return result
