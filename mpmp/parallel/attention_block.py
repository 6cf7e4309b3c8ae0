"""Attention of some queries on some of the keys, and how such blocks make a whole.

    lse = log sum_j exp(lse_j)          out = sum_j exp(lse_j - lse) out_j

``lse`` is the logarithm of the sum of a query's exponentials (Milakov & Gimelshein 2018). Knowing
the whole's, the weights of any block are exp(scores - lse), so backward needs no weights kept and
takes the blocks one by one, in any order (Dao 2023, "FlashAttention-2", section 3.1).

Shapes: B batch, T queries, S keys, K head width; h query heads in groups that share one of g KV
heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpmp.parallel.attention import as_bias, grouped_product

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)


@dataclass(frozen=True)
class Mask:
    """What of a block counts."""

    diagonal: bool = False
    """Queries and keys have the same places, and no later key is seen."""
    seen_B11S: Tensor | None = None
    """Keys that are no padding."""
    kept_BhTS: Tensor | None = None
    """Weights that are not dropped."""
    kept_share: float = 1.0
    """The probability to be kept, by which kept weights are scaled up."""

    def drop(self, x_BhTS: Tensor) -> Tensor:
        return x_BhTS if self.kept_BhTS is None else x_BhTS * self.kept_BhTS / self.kept_share


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of a type are kept: float32 for 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def block_forward(
    q_BhTK: Tensor, k_BgSK: Tensor, v_BgSK: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor]:
    """The block's own result (B, h, T, K), as if there were no other keys, and its lse (B, h, T).

    Both are of the wide type; a query that sees no key here has result 0 and lse -inf.
    """
    if _has_kernel(q_BhTK, mask):
        assert _FLASH is not None
        out, lse = _FLASH(
            q_BhTK, k_BgSK, v_BgSK, 0.0, mask.diagonal, attn_mask=_bias(mask, q_BhTK), scale=scale
        )
        if mask.seen_B11S is not None:  # where no key is seen the kernel says 0
            lse = lse.masked_fill(~mask.seen_B11S.any(-1), float("-inf"))
    else:
        scores_BhTS = _scores(q_BhTK, k_BgSK, mask, scale)
        lse = scores_BhTS.logsumexp(-1)
        weights_BhTS = mask.drop(_weights(scores_BhTS, lse)).to(v_BgSK.dtype)
        out = grouped_product(weights_BhTS, v_BgSK)
    return out.to(wide(out.dtype)), lse


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Take a block into the result so far, in place; all of the wide type."""
    whole = torch.logaddexp(lse, block_lse)
    finite = whole.masked_fill(whole == float("-inf"), 0.0)  # no key seen so far
    out.mul_((lse - finite).exp_().unsqueeze(-1))
    out.add_(block_out * (block_lse - finite).exp_().unsqueeze(-1))
    lse.copy_(whole)


def block_backward(
    grad_BhTK: Tensor,
    q_BhTK: Tensor,
    k_BgSK: Tensor,
    v_BgSK: Tensor,
    out_BhTK: Tensor,
    lse_BhT: Tensor,
    mask: Mask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the block gives to the gradients of q, k, v; ``out`` and ``lse`` are the whole's."""
    if _has_kernel(q_BhTK, mask):
        assert _FLASH_BACKWARD is not None
        q_grad, k_grad, v_grad = _FLASH_BACKWARD(
            grad_BhTK,
            q_BhTK,
            k_BgSK,
            v_BgSK,
            out_BhTK,
            lse_BhT,
            0.0,
            mask.diagonal,
            attn_mask=_bias(mask, q_BhTK),
            scale=scale,
        )
        return q_grad, k_grad, v_grad
    weights_BhTS = _weights(_scores(q_BhTK, k_BgSK, mask, scale), lse_BhT)
    dtype = weights_BhTS.dtype
    inner_BhT1 = (grad_BhTK.to(dtype) * out_BhTK.to(dtype)).sum(-1, keepdim=True)
    v_grad = _grouped_adjoint(mask.drop(weights_BhTS).to(grad_BhTK.dtype), grad_BhTK, k_BgSK)
    weights_grad_BhTS = mask.drop(grouped_product(grad_BhTK, v_BgSK.mT).to(dtype))
    scores_grad_BhTS = weights_BhTS * (weights_grad_BhTS - inner_BhT1) * scale
    scores_grad_BhTS = scores_grad_BhTS.to(q_BhTK.dtype)
    k_grad = _grouped_adjoint(scores_grad_BhTS, q_BhTK, k_BgSK)
    return grouped_product(scores_grad_BhTS, k_BgSK), k_grad, v_grad


def _has_kernel(q: Tensor, mask: Mask) -> bool:
    """Whether torch has a kernel that says its lse and that follows our mask."""
    return _FLASH is not None and q.device.type == "cpu" and mask.kept_BhTS is None


def _bias(mask: Mask, q: Tensor) -> Tensor | None:
    return None if mask.seen_B11S is None else as_bias(mask.seen_B11S, q.dtype)


def _scores(q_BhTK: Tensor, k_BgSK: Tensor, mask: Mask, scale: float) -> Tensor:
    """Of the wide type, -inf where a query does not see a key."""
    scores_BhTS = grouped_product(q_BhTK * scale, k_BgSK.mT)
    scores_BhTS = scores_BhTS.to(wide(scores_BhTS.dtype))
    if mask.diagonal:
        later_TS = scores_BhTS.new_ones(scores_BhTS.shape[-2:], dtype=torch.bool).triu(1)
        scores_BhTS = scores_BhTS.masked_fill_(later_TS, float("-inf"))
    if mask.seen_B11S is not None:
        scores_BhTS = scores_BhTS.masked_fill_(~mask.seen_B11S, float("-inf"))
    return scores_BhTS


def _weights(scores_BhTS: Tensor, lse_BhT: Tensor) -> Tensor:
    """The softmax, into the scores' memory; 0 where no key is seen."""
    finite_BhT = lse_BhT.masked_fill(lse_BhT == float("-inf"), 0.0)
    return scores_BhTS.sub_(finite_BhT.unsqueeze(-1)).exp_()


def _grouped_adjoint(x_BhTS: Tensor, y_BhTK: Tensor, like_BgSK: Tensor) -> Tensor:
    """``x.T @ y`` summed over the heads that share a KV head, (B, g, S, K)."""
    B, g, S, _ = like_BgSK.shape
    rows = x_BhTS.shape[1] // g * x_BhTS.shape[2]
    return x_BhTS.reshape(B, g, rows, S).mT @ y_BhTK.reshape(B, g, rows, -1)
