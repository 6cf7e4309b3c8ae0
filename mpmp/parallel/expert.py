"""Experts: feed-forwards of which each token takes the best few (Shazeer et al. 2017).

    tokens of this rank -- router, top k --> sorted by expert
        --all-to-all, uneven--> own experts' feed-forwards --all-to-all--> weighted sum

Ranks of the expert axis are replicas, each with its own sequences and its own experts, so a token
travels to its experts and back. The tensor axis cuts every expert's hidden units, as those of
a dense feed-forward.

What a token gets does not hang on the layout: the capacity of an expert and the auxiliary loss
are those of one sequence. Padding goes nowhere. A full expert takes first choices before second
ones, and early tokens before late ones. Gradients need no scale of their own: an expert sees the
tokens of all replicas that share it, and the loss is one (docs/whose-loss.md).

Shapes: B batch, T time, D model, H hidden, E experts, k choices; t positions of this context rank,
u the piece of them that this rank holds between cut layers; N rows of tokens that travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mpmp.comm.group import Group
from mpmp.parallel import adjoints
from mpmp.parallel.deferred import Deferred
from mpmp.parallel.maker import Maker
from mpmp.parallel.products import dtype_of_products
from mpmp.programs.partition import partition


class Places(NamedTuple):
    """Where a microbatch's tokens stand: T, own positions, and tokens before the padding."""

    length: int
    positions_t: Tensor
    positions_u: Tensor
    lengths_B: Tensor | None = None

    def is_real(self, rows: int) -> Tensor:
        """(B, T): True where a sequence has a token, False in its padding."""
        places = torch.arange(self.length, device=self.positions_t.device)
        return places < self.real_lengths(rows)[:, None]

    def real_lengths(self, rows: int) -> Tensor:
        """(B) tokens of each sequence."""
        if self.lengths_B is not None:
            return self.lengths_B
        return torch.full((rows,), self.length, device=self.positions_t.device)


class Experts(nn.Module):
    """A feed-forward of ``experts`` parts, of which each token takes ``top_k``.

    Gives (B, u, D) and what the auxiliary loss adds to the objective, summed over the sequences:
    ``balance`` E sum_e f_e P_e (Fedus et al. 2021, "Switch transformer", section 2.2), f the share
    of choices that went to an expert and P its mean probability. An expert takes at most
    ``capacity`` k T / E tokens of a sequence; 0 drops none. ``activation`` takes (N, H); with
    ``gated`` it is applied to a gate beside the rest (SwiGLU).
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        width: int,
        hidden: int,
        *,
        experts: int,
        top_k: int,
        capacity: float,
        balance: float,
        std: float,
        residual_std: float,
        activation: Callable[[Tensor], Tensor],
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.make, self.top_k, self.capacity, self.balance = make, top_k, capacity, balance
        self.num_experts, self.activation, self.gated = experts, activation, gated
        self.router = make.parameter(
            f"{name}.router.weight", (experts, width), std=std, apart=make.sequence
        )
        up = (experts, 2, hidden, width) if gated else (experts, hidden, width)
        self.up = make.parameter(
            f"{name}.up.weight", up, std=std, expert_dim=0, cut_dim=len(up) - 2
        )
        self.down = make.parameter(
            f"{name}.down.weight",
            (experts, width, hidden),
            std=residual_std,
            expert_dim=0,
            cut_dim=2,
        )

    def forward(self, x_BuD: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        B = x_BuD.shape[0]
        probabilities_BuE = self._probabilities(x_BuD)
        gates_Buk, choices_Buk = probabilities_BuE.topk(self.top_k, dim=-1)
        if self.top_k > 1:  # with one choice the gate must tell the router how good it was
            gates_Buk = gates_Buk / gates_Buk.sum(-1, keepdim=True)
        choices_BTk = self._all_choices(choices_Buk, places)
        chosen_BTkE = F.one_hot(choices_BTk, self.num_experts)
        chosen_BTkE *= places.is_real(B)[:, :, None, None]
        kept_BTk = self._kept(chosen_BTkE, places.real_lengths(B))
        own = places.positions_t
        sent = _Sent.of(choices_BTk[:, own], kept_BTk[:, own], self.num_experts)
        x_BtD = self._to_all(x_BuD.to(dtype_of_products(x_BuD)), len(own))
        gates_Btk = self._to_all(gates_Buk, len(own))
        rows_ND = x_BtD.flatten(0, 1)[sent.tokens]
        found_ND = self._through_experts(rows_ND, sent)
        weighted_ND = found_ND * gates_Btk.flatten()[sent.choices].unsqueeze(-1)
        y_BtD = weighted_ND.new_zeros(x_BtD.flatten(0, 1).shape)
        y_BtD = y_BtD.index_add(0, sent.tokens, weighted_ND).view(x_BtD.shape)
        return self._sum(y_BtD), self._balance(probabilities_BuE, chosen_BTkE, places)

    # --- who goes where ---------------------------------------------------------------------------

    def _probabilities(self, x_BuD: Tensor) -> Tensor:
        """In float32 at least: 16 bits would choose by rounding."""
        wide = torch.promote_types(self.router.dtype, torch.float32)
        with torch.autocast(x_BuD.device.type, enabled=False):
            return F.linear(x_BuD.to(wide), self.router.to(wide)).softmax(-1)

    def _all_choices(self, choices_Buk: Tensor, places: Places) -> Tensor:
        """The choices of whole sequences, (B, T, k), on every rank that shares them."""
        B, _, k = choices_Buk.shape
        all_BTk = choices_Buk.new_zeros(B, places.length, k)
        all_BTk[:, places.positions_u] = choices_Buk
        if self.make.sequence:
            all_BTk = self.make.tensor.allreduce(all_BTk)
        if self.make.context.size == 1 or len(places.positions_t) == places.length:
            return all_BTk
        return self.make.context.allreduce(all_BTk)

    def _kept(self, chosen_BTkE: Tensor, lengths_B: Tensor) -> Tensor:
        """Which choices find room, (B, T, k)."""
        if self.capacity == 0:
            return chosen_BTkE.any(-1)
        share_B = self.capacity * self.top_k * lengths_B / self.num_experts
        # First choices of all tokens come before second ones.
        in_turn_BkTE = chosen_BTkE.transpose(1, 2)
        before = in_turn_BkTE.flatten(1, 2).cumsum(1).view_as(in_turn_BkTE)
        has_room = before <= share_B.ceil()[:, None, None, None]
        return (in_turn_BkTE.bool() & has_room).any(-1).transpose(1, 2)

    def _balance(
        self, probabilities_BuE: Tensor, chosen_BTkE: Tensor, places: Places
    ) -> Tensor | None:
        """This rank's part of the auxiliary loss: own probabilities, everybody's choices."""
        if self.balance == 0:
            return None
        B = len(probabilities_BuE)
        lengths_B1 = places.real_lengths(B)[:, None]
        chosen_BE = chosen_BTkE.sum((1, 2)).to(probabilities_BuE.dtype)
        share_BE = chosen_BE / (self.top_k * lengths_B1)
        is_real_Bu = places.is_real(B)[:, places.positions_u]
        mean_BE = (probabilities_BuE * is_real_Bu.unsqueeze(-1)).sum(1) / lengths_B1
        return self.balance * self.num_experts * (share_BE * mean_BE).sum()

    # --- travelling -------------------------------------------------------------------------------

    def _to_all(self, x_Bu: Tensor, count: int) -> Tensor:
        """To every rank of the tensor group, each going its own way with it."""
        if self.make.sequence:
            return adjoints.allgather(x_Bu, self.make.tensor, count, dim=1)
        return adjoints.replicate(x_Bu, self.make.tensor)

    def _sum(self, y_BtD: Tensor) -> Tensor:
        if self.make.sequence:
            return adjoints.reduce_scatter(y_BtD, self.make.tensor, dim=1)
        return adjoints.allreduce(y_BtD, self.make.tensor)

    def _through_experts(self, rows_ND: Tensor, sent: _Sent) -> Tensor:
        """What the experts make of rows that are sorted by expert; same order."""
        group = self.make.expert
        if group.size == 1:
            return self._feed_forward(rows_ND, sent.counts)
        cuts = partition(self.num_experts, group.size)
        every = group.numbers(sent.counts)
        there = [sum(sent.counts[start:stop]) for start, stop in cuts]
        start, stop = cuts[group.rank]
        here = [theirs[start:stop] for theirs in every]
        lengths = [sum(counts) for counts in here]
        taken_ND = alltoall(rows_ND, group, there, lengths)
        # They come sorted by rank, then by expert.
        order = _sorted_by_expert(here).to(rows_ND.device)
        totals = [sum(counts) for counts in zip(*here, strict=True)]
        found_ND = self._feed_forward(taken_ND[order], totals)
        return alltoall(found_ND[order.argsort()], group, lengths, there)

    def _feed_forward(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        deferred = self.make.deferred
        up = _products(rows_ND, self.up, counts, deferred)
        if self.gated:
            gate, rest = up.chunk(2, dim=-1)
            up = self.activation(gate) * rest
        else:
            up = self.activation(up)
        return _products(up, self.down, counts, deferred)


class _Sent(NamedTuple):
    """The choices that are sent, sorted by expert: numbers in (B t k), their tokens in (B t)."""

    choices: Tensor
    tokens: Tensor
    counts: list[int]
    """How many go to each expert."""

    @classmethod
    def of(cls, choices_Btk: Tensor, kept_Btk: Tensor, experts: int) -> _Sent:
        if isinstance(choices_Btk, FakeTensor):
            return cls._even(choices_Btk, experts)
        kept = kept_Btk.flatten().nonzero().squeeze(-1)
        expert = choices_Btk.flatten()[kept]
        kept = kept[expert.argsort(stable=True)]
        counts = torch.bincount(expert, minlength=experts).tolist()
        return cls(kept, kept // choices_Btk.shape[-1], counts)

    @classmethod
    def _even(cls, choices_Btk: Tensor, experts: int) -> _Sent:
        """Where tensors have no values: every expert gets as many, none is left out."""
        kept = torch.arange(choices_Btk.numel())
        counts = [stop - start for start, stop in partition(len(kept), experts)]
        return cls(kept, kept // choices_Btk.shape[-1], counts)


def _sorted_by_expert(counts: list[list[int]]) -> Tensor:
    """The order by expert of rows that lie by rank, then by expert."""
    experts = [number for ranks in counts for number, n in enumerate(ranks) for _ in range(n)]
    return torch.tensor(experts, dtype=torch.int64).argsort(stable=True)


def alltoall(x: Tensor, group: Group, there: list[int], here: list[int]) -> Tensor:
    """Rows to whom they are for: ``there`` to each rank, ``here`` from each; its own adjoint."""
    result: Tensor = _Alltoall.apply(x, group, there, here)  # type: ignore[no-untyped-call]
    return result


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: list[int], here: list[int]) -> Tensor:
        ctx.group, ctx.there, ctx.here = group, there, here
        return group.alltoall(x.detach().contiguous(), there, take_lengths=here)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (
            ctx.group.alltoall(grad.contiguous(), ctx.here, take_lengths=ctx.there),
            None,
            None,
            None,
        )


def _products(x_ND: Tensor, weight: nn.Parameter, counts: list[int], later: Deferred) -> Tensor:
    """Rows, sorted by expert, each times its own expert's matrix."""
    result: Tensor = _Products.apply(x_ND, weight, counts, later)  # type: ignore[no-untyped-call]
    return result


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight: nn.Parameter, counts: list[int], later: Deferred
    ) -> Tensor:
        dtype = dtype_of_products(x_ND)
        x_ND = x_ND.to(dtype)
        ctx.counts, ctx.later, ctx.dtype = counts, later, dtype
        # What was saved comes back as another tensor where it is computed again.
        ctx.parameter = weight
        ctx.save_for_backward(x_ND, weight)
        matrices = weight.to(dtype).flatten(1, -2)
        parts = zip(torch.split(x_ND, counts), matrices, strict=True)
        return torch.cat([rows @ matrix.t() for rows, matrix in parts])

    @staticmethod
    @once_differentiable  # the product below has no graph
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_ND, weight = ctx.saved_tensors
        counts = ctx.counts
        grads = torch.split(grad, counts)

        @torch.no_grad()  # it may be computed when backward is over
        def weight_gradient() -> Tensor:
            pairs = zip(grads, torch.split(x_ND, counts), strict=True)
            return torch.stack([g.t() @ x for g, x in pairs]).to(weight.dtype).view_as(weight)

        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            matrices = weight.to(ctx.dtype).flatten(1, -2)
            x_grad = torch.cat([g @ matrix for g, matrix in zip(grads, matrices, strict=True)])
        if ctx.needs_input_grad[1]:
            if ctx.later.active:
                ctx.later.keep(ctx.parameter, weight_gradient)
            else:
                weight_grad = weight_gradient()
        return x_grad, weight_grad, None, None
