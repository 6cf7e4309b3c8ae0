"""Attention in one piece, and in blocks that are put together, against softmax written down."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mpmp.parallel import attention_block
from mpmp.parallel.attention import Heads, Rule, attention, grouped_product
from mpmp.parallel.attention_block import Mask, block_backward, block_forward, merge_
from mpmp.parallel.dropout import Dropout

LIMIT = 1e-12
B, T, K = 2, 7, 4


def tensors(h, g, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(B, n, T, K, dtype=torch.float64, generator=generator).to(dtype)
        for n in (h, g, g, h)
    ]


def definition(q, k, v, kv_of_head, seen, kept=1.0):
    scores = q @ k[:, kv_of_head].mT / K**0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) * kept @ v[:, kv_of_head]


def test_heads_know_what_they_read():
    """8 heads on 2 KV heads over 3 ranks; 2 KV heads on 4 ranks; as many as heads."""
    assert Heads.of(8, 2, (0, 3)) == Heads(8, (0, 3), (0, 1), (0, 0, 0))
    assert Heads.of(8, 2, (3, 6)) == Heads(8, (3, 6), (0, 2), (0, 1, 1))
    assert Heads.of(8, 2, (6, 8)) == Heads(8, (6, 8), (1, 2), (0, 0))
    assert [Heads.of(4, 2, (n, n + 1)).kv for n in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert Heads.of(3, 3, (1, 3)) == Heads(3, (1, 3), (1, 3), (0, 1))
    assert Heads.of(8, 2, (2, 8)).part(1, 4) == Heads(8, (3, 6), (0, 2), (0, 1, 1))
    assert Heads.of(8, 2, (2, 8)).part(3, 3) == Heads(8, (5, 5), (0, 0), ())
    assert [Heads.of(8, 2, own).grouped for own in ((0, 8), (2, 6), (3, 6))] == [True, True, False]


@pytest.mark.parametrize("drops", (False, True))
@pytest.mark.parametrize("own", ((0, 6), (1, 5), (2, 3)))
def test_attention_is_softmax_written_down(own, drops):
    heads, samples = Heads.of(6, 2, own), torch.tensor([5, 1])
    q, k, v, _ = tensors(own[1] - own[0], heads.kv[1] - heads.kv[0])
    dropout = Dropout(0.5, 1, "x") if drops else None
    kept = 1.0
    if dropout is not None:
        kept = 2.0 * dropout.kept(samples, (6, T, T), (own, (0, T), (0, T)))
    lengths = torch.tensor([7, 3])
    padding = (torch.arange(T) < lengths[:, None])[:, None, None]
    at = torch.tensor([2, 3, 6])
    later = torch.ones(T, T, dtype=torch.bool).tril()
    for rule, seen in (
        (Rule(True, lengths), later),
        (Rule(False), torch.ones(T, T, dtype=torch.bool)),
        (Rule(False, lengths), padding),
    ):
        rule = Rule(rule.causal, rule.lengths_B, dropout, samples)
        expected = definition(q, k, v, list(heads.kv_of_head), seen, kept)
        assert (attention(q, k, v, heads, rule) - expected).abs().max() <= LIMIT
        some = attention(q[:, :, at], k, v, heads, rule, q_positions=at)
        assert (some - expected[:, :, at]).abs().max() <= LIMIT


def test_a_query_may_come_after_its_keys():
    """As where text is written token by token: the last query, all keys so far."""
    q, k, v, _ = tensors(4, 2)
    heads, rule = Heads.of(4, 2, (0, 4)), Rule(True)
    whole = attention(q, k, v, heads, rule)
    last = attention(
        q[:, :, 4:5], k[:, :, :5], v[:, :, :5], heads, rule, q_positions=torch.tensor([4])
    )
    assert (last - whole[:, :, 4:5]).abs().max() <= LIMIT


def test_dropped_attention_keeps_weights_and_masks_only():
    """For backward, beside q, k and v: the softmax, a byte for the mask, the weights after it."""
    q, k, v, _ = (one.bfloat16().requires_grad_() for one in tensors(4, 4))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append((x.dtype, x.numel())) or x, lambda x: x
    )
    rule = Rule(True, None, Dropout(0.1, 1, "x"), torch.tensor([0, 1]))
    with hooks:
        attention(q, k, v, Heads.of(4, 4, (0, 4)), rule)
    scores = [dtype for dtype, numel in kept if numel == B * 4 * T * T]
    assert scores.count(torch.bool) == 1
    assert set(scores) == {torch.bool, torch.bfloat16}
    assert len(kept) - len(scores) == 3


# --- blocks ---------------------------------------------------------------------------------------


@pytest.fixture(params=("kernel", "written"))
def way(request, monkeypatch):
    """torch's kernel, or matrix products, as where there is none."""
    if request.param == "written":
        monkeypatch.setattr(attention_block, "_FLASH", None)
    else:
        assert attention_block._FLASH is not None
    return request.param


def in_blocks(q, k, v, grad, lengths, cuts):
    """Result and gradients from the keys between ``cuts``, one block after the other."""
    scale = K**-0.5
    out = torch.zeros(q.shape, dtype=attention_block.wide(q.dtype))
    lse = torch.full(q.shape[:-1], float("-inf"), dtype=out.dtype)
    blocks = []
    for start, stop in pairwise(cuts):
        seen = (torch.arange(start, stop) < lengths[:, None])[:, None, None]
        blocks.append((slice(start, stop), Mask(seen_B11S=seen)))
    for keys, mask in blocks:
        merge_(out, lse, *block_forward(q, k[:, :, keys], v[:, :, keys], mask, scale))
    out = out.to(q.dtype)
    gradients = [torch.zeros_like(one, dtype=lse.dtype) for one in (q, k, v)]
    for keys, mask in blocks:
        parts = block_backward(grad, q, k[:, :, keys], v[:, :, keys], out, lse, mask, scale)
        gradients[0] += parts[0]
        gradients[1][:, :, keys] += parts[1]
        gradients[2][:, :, keys] += parts[2]
    return [out, *gradients]


@pytest.mark.parametrize(
    ("dtype", "limit"),
    ((torch.float64, LIMIT), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)),
    ids=("float64", "float32", "bfloat16"),
)
@pytest.mark.parametrize("g", (4, 2, 1))
def test_blocks_make_the_whole(way, g, dtype, limit):
    """In any order, also where a block holds nothing but padding."""
    q, k, v, grad = tensors(4, g, dtype)
    lengths = torch.tensor([7, 2])
    exact = [one.double().requires_grad_() for one in (q, k, v)]
    seen = (torch.arange(T) < lengths[:, None])[:, None, None]
    kv_of_head = list(Heads.of(4, g, (0, 4)).kv_of_head)
    expected = definition(*exact, kv_of_head, seen)
    expected.backward(grad.double())
    found = in_blocks(q, k, v, grad, lengths, (0, 3, 4, 7))
    for one, other in zip(found, (expected, *(x.grad for x in exact)), strict=True):
        assert (one.double() - other).abs().max() <= limit * other.abs().max()


def test_nothing_but_padding_first(way):
    """A query that has seen no key so far has result 0, and takes the next block as it is."""
    q, k, v, _ = tensors(4, 4)
    nothing = Mask(seen_B11S=torch.zeros(B, 1, 1, T, dtype=torch.bool))
    out, lse = (one.clone() for one in block_forward(q, k, v, nothing, 0.5))
    assert bool((out == 0).all()) and bool((lse == float("-inf")).all())
    merge_(out, lse, out.clone(), lse.clone())
    assert bool((out == 0).all())
    merge_(out, lse, *block_forward(q, k, v, Mask(), 0.5))
    assert (out - (q @ k.mT * 0.5).softmax(-1) @ v).abs().max() <= LIMIT


def test_grouped_product_repeats_nothing():
    x, y = torch.randn(B, 6, T, 5), torch.randn(B, 2, 5, K)
    expected = x @ y.repeat_interleave(3, 1)
    assert torch.allclose(grouped_product(x, y), expected, atol=1e-6)
    assert torch.allclose(grouped_product(x[:, :, 1:4], y), expected[:, :, 1:4], atol=1e-6)
