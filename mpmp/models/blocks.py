"""Blocks that all models are made of, cut over the tensor axis.

Shapes: B batch, T time, D model, F hidden; u is the piece of T that this rank holds between cut
layers (all that its context rank has, but under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mpmp import config
from mpmp.models.attention import Attention
from mpmp.models.norms import make_norm
from mpmp.models.style import Style
from mpmp.models.tokens import Tokens
from mpmp.parallel import fused
from mpmp.parallel.dropout import Dropout
from mpmp.parallel.expert import Experts, Places
from mpmp.parallel.maker import Maker
from mpmp.parallel.tensor import ColumnParallelLinear, RowParallelLinear

STD = 0.02
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": fused.gelu_tanh,
}


def stds(model: config.Model, style: Style) -> tuple[float, float]:
    """Of the initial weights of a branch's first and last layer (Radford et al. 2019).

    Where nothing norms the sums of branches, they would grow with their number.
    """
    return STD, STD if style.post_norm else STD / (2 * model.layers) ** 0.5


class FeedForward(nn.Module):
    """Two layers with a GELU between them, or SwiGLU; every rank has its own hidden units.

    SwiGLU is ``down(silu(gate x) * up x)``, gate and up stacked as one weight.
    """

    def __init__(self, make: Maker, name: str, model: config.Model, style: Style) -> None:
        super().__init__()
        first, last = stds(model, style)
        width, hidden = model.width, model.num_hidden
        self.activation = _ACTIVATIONS.get(style.feed_forward)
        blocks = 1 if self.activation else 2
        self.up = ColumnParallelLinear(
            make, f"{name}.up", width, hidden, std=first, blocks=blocks, bias=style.bias
        )
        self.down = RowParallelLinear(
            make, f"{name}.down", hidden, width, std=last, bias=style.bias
        )

    def forward(self, x_BuD: Tensor, places: Places) -> tuple[Tensor, None]:
        """Gives what experts give, and adds nothing to the objective."""
        up_BTF = self.up(x_BuD, len(places.positions_t))
        if self.activation is not None:
            return self.down(self.activation(up_BTF)), None
        gate_BTF, up_BTF = up_BTF.chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF), None


def _feed_forward(make: Maker, name: str, model: config.Model, style: Style) -> nn.Module:
    """One for all tokens, or experts."""
    if not model.experts:
        return FeedForward(make, name, model, style)
    first, last = stds(model, style)
    return Experts(
        make,
        name,
        model.width,
        model.num_hidden,
        experts=model.experts,
        top_k=model.top_k,
        capacity=model.capacity,
        balance=model.balance,
        std=first,
        residual_std=last,
        activation=_ACTIVATIONS.get(style.feed_forward, F.silu),
        gated=style.feed_forward == "swiglu",
    )


class Block(nn.Module):
    """Attention and a feed-forward, each a branch whose result is added to what came in.

    Gives hidden states, and what the experts add to the objective, where there are some.
    """

    def __init__(
        self,
        make: Maker,
        name: str,
        model: config.Model,
        style: Style,
        *,
        way: str,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.post_norm = style.post_norm
        self.attention: Attention | None = None
        if style.attention:
            narrow = not style.post_norm
            self.norm1 = make_norm(make, f"{name}.norm1", model, style, narrow)
            self.attention = Attention(
                make,
                f"{name}.attention",
                model,
                style,
                stds=stds(model, style),
                way=way,
                recompute=recompute,
            )
            self.dropout1 = Dropout(model.dropout, make.seed, f"{name}.attention")
        # The router of experts is not to choose by what 16 bits rounded.
        narrow = not (style.post_norm or model.experts)
        self.norm2 = make_norm(make, f"{name}.norm2", model, style, narrow)
        self.mlp = _feed_forward(make, f"{name}.mlp", model, style)
        self.dropout2 = Dropout(model.dropout, make.seed, f"{name}.mlp")

    def forward(self, x_BuD: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        if self.attention is not None:
            branch_BuD = self.attention(self._before(self.norm1, x_BuD), tokens)
            x_BuD = fused.add(x_BuD, tokens.drop(self.dropout1, branch_BuD))
            x_BuD = self._behind(self.norm1, x_BuD)
        branch_BuD, added = self.mlp(self._before(self.norm2, x_BuD), tokens.places)
        x_BuD = fused.add(x_BuD, tokens.drop(self.dropout2, branch_BuD))
        return self._behind(self.norm2, x_BuD), added

    def _before(self, norm: nn.Module, x_BuD: Tensor) -> Tensor:
        return x_BuD if self.post_norm else norm(x_BuD)

    def _behind(self, norm: nn.Module, x_BuD: Tensor) -> Tensor:
        return norm(x_BuD) if self.post_norm else x_BuD
