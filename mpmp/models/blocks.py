"""Blocks that models are made of, cut over the tensor axis.

Shapes: B batch, T time, D model, H heads, K head, F hidden; a small letter is this rank's piece.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.parallel.dropout import Dropout
from mpmp.parallel.maker import Maker
from mpmp.parallel.tensor import ColumnParallelLinear, RowParallelLinear


class LayerNorm(nn.Module):
    """Mean and variance of each token taken out (Ba et al. 2016); replicated."""

    def __init__(self, make: Maker, name: str, features: int) -> None:
        super().__init__()
        self.weight = make.parameter(f"{name}.weight", (features,), mean=1.0)
        self.bias = make.parameter(f"{name}.bias", (features,))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class CausalAttention(nn.Module):
    """Each head attends to the past; every rank has its own heads."""

    def __init__(
        self,
        make: Maker,
        name: str,
        width: int,
        heads: int,
        *,
        std: float,
        residual_std: float,
        dropout: float,
    ) -> None:
        super().__init__()
        head = width // heads
        self.heads, self.head = heads, head
        start, stop = make.cut(width, head)
        self.own_heads = (start // head, stop // head)
        self.qkv = ColumnParallelLinear(
            make, f"{name}.qkv", width, width, std=std, blocks=3, unit=head
        )
        self.out = RowParallelLinear(make, f"{name}.out", width, width, std=residual_std, unit=head)
        self.dropout = Dropout(dropout, make.seed, f"{name}.weights")

    def forward(self, x_BTD: Tensor, samples_B: Tensor | None) -> Tensor:
        B, T, _ = x_BTD.shape
        qkv_BT3hK = self.qkv(x_BTD).view(B, T, 3, -1, self.head)
        q_BhTK, k_BhTK, v_BhTK = qkv_BT3hK.permute(2, 0, 3, 1, 4)
        if self.dropout.probability == 0.0 or samples_B is None:
            mixed_BhTK = F.scaled_dot_product_attention(q_BhTK, k_BhTK, v_BhTK, is_causal=True)
        else:
            # The library's own mask would depend on the layout.
            scores_BhTT = q_BhTK @ k_BhTK.transpose(-1, -2) * self.head**-0.5
            future_TT = scores_BhTT.new_ones(T, T).triu(1).bool()
            weights_BhTT = scores_BhTT.masked_fill(future_TT, float("-inf")).softmax(-1)
            weights_BhTT = self.dropout(
                weights_BhTT, samples_B, (self.heads, T, T), (self.own_heads, (0, T), (0, T))
            )
            mixed_BhTK = weights_BhTT.to(v_BhTK.dtype) @ v_BhTK
        return self.out(mixed_BhTK.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two layers with a GELU between them; every rank has its own hidden units."""

    def __init__(
        self, make: Maker, name: str, width: int, hidden: int, *, std: float, residual_std: float
    ) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(make, f"{name}.up", width, hidden, std=std)
        self.down = RowParallelLinear(make, f"{name}.down", hidden, width, std=residual_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(
        self,
        make: Maker,
        name: str,
        width: int,
        heads: int,
        *,
        std: float,
        residual_std: float,
        dropout: float,
    ) -> None:
        super().__init__()
        stds = {"std": std, "residual_std": residual_std}
        self.norm1 = LayerNorm(make, f"{name}.norm1", width)
        self.attention = CausalAttention(
            make, f"{name}.attention", width, heads, dropout=dropout, **stds
        )
        self.norm2 = LayerNorm(make, f"{name}.norm2", width)
        self.mlp = FeedForward(make, f"{name}.mlp", width, 4 * width, **stds)
        self.dropout1 = Dropout(dropout, make.seed, f"{name}.attention")
        self.dropout2 = Dropout(dropout, make.seed, f"{name}.mlp")

    def forward(self, x_BTD: Tensor, samples_B: Tensor | None) -> Tensor:
        """``samples_B`` numbers the sequences in the whole training; None drops nothing."""
        _, T, D = x_BTD.shape
        whole = ((T, D), ((0, T), (0, D)))
        x_BTD = x_BTD + self.dropout1(
            self.attention(self.norm1(x_BTD), samples_B), samples_B, *whole
        )
        return x_BTD + self.dropout2(self.mlp(self.norm2(x_BTD)), samples_B, *whole)
