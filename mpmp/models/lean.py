"""Blocks as plain functions of their weights, for the single tokens of generation.

A module's call, its look-ups and its cares for autograd, autocast and pieces of sequences cost
more than the product of one token with a small matrix: 0.53 ms a token of two layers x 192 in place
of 0.39. Here are the same operations in the same order, and nothing else. What the functions close
over is the modules' own memory, so they hold as long as the weights stay where they are.

Shapes: B batch, t further tokens, D model, F hidden, K head; h own query heads, g KV heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmp.models.attention import Attention
from mpmp.models.blocks import Block, FeedForward
from mpmp.models.norms import LayerNorm, RMSNorm
from mpmp.models.rope import turn
from mpmp.models.tokens import Tokens
from mpmp.parallel.products import Use, own_matrix, own_vector, summed_product
from mpmp.parallel.tensor import ColumnParallelLinear, RowParallelLinear

Step = Callable[[Tensor, Tokens], tuple[Tensor, Tensor | None]]
"""What a block does: hidden states (B, t, D), and what is added to the objective."""
_Map = Callable[[Tensor], Tensor]


def lean(block: nn.Module) -> Step:
    """A block's step with a cache; the block itself where it has experts or pieces of T."""
    if not isinstance(block, Block) or not isinstance(block.mlp, FeedForward):
        return block
    if block.post_norm or block.mlp.up.way.sequence:
        return block
    norm2, feed = _norm(block.norm2), _feed_forward(block.mlp)
    if block.attention is None:
        return lambda x_BtD, tokens: (x_BtD + feed(norm2(x_BtD)), None)
    norm1, attend = _norm(block.norm1), _attention(block.attention)

    def step(x_BtD: Tensor, tokens: Tokens) -> tuple[Tensor, None]:
        x_BtD = x_BtD + attend(norm1(x_BtD), tokens)
        return x_BtD + feed(norm2(x_BtD)), None

    return step


def _attention(module: Attention) -> Callable[[Tensor, Tokens], Tensor]:
    heads, head, out = module.heads, module.head, _row(module.out)
    if module.stacked:
        qkv = _column(module.qkv)
    else:
        q_of, kv_of = _column(module.q), _column(module.kv)

    def attend(x_BtD: Tensor, tokens: Tokens) -> Tensor:
        B, t, _ = x_BtD.shape
        if module.stacked:
            stacked = qkv(x_BtD).view(B, t, 3, -1, head)
            q_BhtK, k_BgtK, v_BgtK = stacked.permute(2, 0, 3, 1, 4).unbind()
        else:
            q_BhtK = q_of(x_BtD).view(B, t, -1, head).transpose(1, 2)
            k_BgtK, v_BgtK = kv_of(x_BtD).view(B, t, 2, -1, head).permute(2, 0, 3, 1, 4).unbind()
        if tokens.turns is not None:
            q_BhtK, k_BgtK = turn(q_BhtK, tokens.turns), turn(k_BgtK, tokens.turns)
        assert tokens.cache is not None
        mixed_BhtK = tokens.cache.attend(module, q_BhtK, k_BgtK, v_BgtK, heads)
        return out(mixed_BhtK.transpose(1, 2).flatten(2))

    return attend


def _feed_forward(module: FeedForward) -> _Map:
    up, down, activation = _column(module.up), _row(module.down), module.activation

    def gated(x_BtD: Tensor) -> Tensor:
        gate_BtF, up_BtF = up(x_BtD).chunk(2, dim=-1)
        return down(F.silu(gate_BtF) * up_BtF)

    return gated if activation is None else lambda x_BtD: down(activation(up(x_BtD)))


def _norm(module: nn.Module) -> _Map:
    if isinstance(module, LayerNorm):
        weight, bias, eps = module.weight, module.bias, module.eps
        shape = weight.shape
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if isinstance(module, RMSNorm):
        weight, eps = module.weight, module.eps
        shape = weight.shape
        return lambda x: F.rms_norm(x, shape, weight, eps)
    return module


def _column(module: ColumnParallelLinear) -> _Map:
    use = Use(module.weight, module.bias, module.rows)
    # Of a weight that is held whole the own rows, side by side.
    matrix, vector = own_matrix(module.weight, use), own_vector(module.bias, use)
    return lambda x: F.linear(x, matrix, vector)


def _row(module: RowParallelLinear) -> _Map:
    weight, bias, way = module.weight, module.bias, module.way
    if way.group.size == 1:
        return lambda x: F.linear(x, weight, bias)
    use = Use(weight, bias)
    return lambda x: summed_product(x, weight, use, way)
