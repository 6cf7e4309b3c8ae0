"""Attention on a cut sequence equals that of one process: results, gradients and masks."""

from __future__ import annotations

import pytest
import torch

import mpmp
from mpmp.parallel import ring, ulysses
from mpmp.parallel.attention import Heads
from mpmp.parallel.context import WAYS, context_attention
from mpmp.parallel.dropout import Dropout
from mpmp.programs.partition import partition
from mpmp.programs.sequence import count, cut_sequence, positions, zigzag

LIMIT = 1e-12
B, K = 2, 5
LENGTHS = (16, 13, 5, 1)  # even, uneven, and fewer positions than 2 x 4 pieces or 4 ranks
HEADS = ((4, 4), (4, 2), (6, 1), (6, 3), (3, 3))  # query heads, KV heads


@pytest.fixture(scope="module")
def group(world):
    return mpmp.mesh(context=world.size).context


def definition(q, k, v, kv_of_head, causal, lengths, kept):
    """Softmax of all scores, written down; float64."""
    k, v = k[:, kv_of_head], v[:, kv_of_head]
    T = q.shape[2]
    seen = torch.ones(B, 1, T, T, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    elif lengths is not None:
        seen = seen & (torch.arange(T) < lengths[:, None])[:, None, None]
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) * kept @ v


def inputs(h, g, T, seed=1):
    """q, k, v and the gradient of the result, alike on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, h, T, K), (B, g, T, K), (B, g, T, K), (B, h, T, K))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def cut_error(group, kind, causal, h, g, T, *, lengths=None, dropout=None, own=None):
    """The largest error, over result and gradients, of what this rank has."""
    own = own or (0, h)
    heads, samples = Heads.of(h, g, own), torch.tensor([7, 3])
    q, k, v, grad = inputs(h, g, T)
    q, grad = q[:, slice(*own)], grad[:, slice(*own)]
    k, v = k[:, slice(*heads.kv)], v[:, slice(*heads.kv)]
    kept = 1.0
    if dropout is not None:
        every = (heads.own, (0, T), (0, T))
        kept = dropout.kept(samples, (h, T, T), every).double() / (1 - dropout.probability)
    whole = [one.clone().requires_grad_() for one in (q, k, v)]
    expected = definition(*whole, list(heads.kv_of_head), causal, lengths, kept)
    expected.backward(grad)
    at = torch.tensor(
        positions(cut_sequence(T, group.size, kind, causal)[group.rank]), dtype=torch.int64
    )
    pieces = [one[:, :, at].transpose(1, 2).contiguous().transpose(1, 2) for one in (q, k, v)]
    pieces = [one.requires_grad_() for one in pieces]
    out = context_attention(
        *pieces,
        group,
        heads,
        length=T,
        causal=causal,
        kind=kind,
        lengths_B=lengths,
        dropout=dropout,
        samples_B=samples,
    )
    out.backward(grad[:, :, at])
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(pieces, whole, strict=True))]
    errors = [(a - b[:, :, at]).abs().flatten() for a, b in pairs]
    return float(torch.cat([*errors, torch.zeros(1)]).detach().max())


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both-ways"))
@pytest.mark.parametrize("kind", WAYS)
def test_cut_attention_equals_one_process(group, kind, causal):
    errors = {(h, g, T): cut_error(group, kind, causal, h, g, T) for h, g in HEADS for T in LENGTHS}
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "both-ways"))
@pytest.mark.parametrize("kind", WAYS)
def test_masks_and_padding_are_those_of_one_process(group, kind, causal):
    dropout = Dropout(0.3, 5, "weights")
    errors = {}
    for h, g, T in ((4, 2, 13), (3, 3, 7), (6, 1, 5)):
        for lengths in (None, torch.tensor([T, (T + 1) // 2]), torch.tensor([1, 2])):
            for drop in (None, dropout):
                case = h, g, T, str(lengths), drop is not None
                errors[case] = cut_error(
                    group, kind, causal, h, g, T, lengths=lengths, dropout=drop
                )
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.parametrize("kind", WAYS)
def test_a_tensor_rank_may_have_uneven_heads(group, kind):
    """Heads 3, 4 and 5 of 8 read KV heads 0, 1, 1 of 2; a rank may have one head."""
    dropout = Dropout(0.3, 5, "weights")
    for own in ((3, 6), (1, 6), (7, 8)):
        for drop in (None, dropout):
            assert cut_error(group, kind, True, 8, 2, 7, own=own, dropout=drop) <= LIMIT, own


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("kind", WAYS)
def test_a_wrong_backward_is_found(group, kind, monkeypatch):
    """Gradients of keys that never come home from the other ranks, or a mean in place of a sum."""
    if kind == "ring":
        home = ring._Follower.come_home

        def forgets(self):
            before = self._home.clone()
            home(self)
            self._home.copy_(before)

        monkeypatch.setattr(ring._Follower, "come_home", forgets)
    else:
        scale_backward(ulysses._ToHeads, 1 / group.size, monkeypatch)
    assert cut_error(group, kind, True, 4, 2, 13) > 1e-3


def scale_backward(function, factor, monkeypatch):
    right = function.backward

    def wrong(ctx, *grads):
        nothing, *rest = right(ctx, *grads)
        return nothing, *(one * factor for one in rest)

    monkeypatch.setattr(function, "backward", staticmethod(wrong))


@pytest.mark.parametrize("kind", WAYS)
def test_autocast_is_followed(group, kind):
    """As torch's own attention does; sums of 16-bit gradients are rounded once, at home."""
    T, heads = 13, Heads.of(4, 2, (0, 4))
    q, k, v, grad = inputs(4, 2, T)
    whole = [one.clone().requires_grad_() for one in (q, k, v)]
    expected = definition(*whole, list(heads.kv_of_head), True, None, 1.0)
    expected.backward(grad)
    at = torch.tensor(positions(cut_sequence(T, group.size, kind, True)[group.rank]))
    pieces = [one[:, :, at].float().requires_grad_() for one in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = context_attention(*pieces, group, heads, length=T, causal=True, kind=kind)
    assert out.dtype is torch.bfloat16
    out.backward(grad[:, :, at].bfloat16())
    for one, other in (
        (out, expected),
        *((a.grad, b.grad) for a, b in zip(pieces, whole, strict=True)),
    ):
        assert (one - other[:, :, at]).abs().max() <= 0.03 * other.abs().max()
        assert one is out or one.dtype is torch.float32


# --- movements ------------------------------------------------------------------------------------


def exchange(group, T, zigzagged):
    cut = zigzag(T, group.size) if zigzagged else cut_sequence(T, group.size, "ulysses", True)
    heads = Heads.of(6, 3, (0, 6))
    cuts = partition(6, group.size)
    kv = [heads.part(*own).kv for own in cuts]
    return ulysses.Exchange(group, cut, (6, 3), (cuts, kv))


def adjoint_error(group, T, zigzagged, back):
    """|<Fx, y> - <x, F*y>| of both tensors at once; back: of the adjoint itself."""
    moved = exchange(group, T, zigzagged)
    generator = torch.Generator().manual_seed(group.rank)
    t = count(moved.cut[group.rank])

    def random(heads, positions):
        return [
            torch.randn(B, n, positions, K, dtype=torch.float64, generator=generator) for n in heads
        ]

    own = [ranges[group.rank][1] - ranges[group.rank][0] for ranges in moved.taken]
    x, y = random(moved.heads, t), random(own, T)
    if back:
        x, y = y, x
    x = [one.requires_grad_() for one in x]
    image = (ulysses.to_pieces if back else ulysses.to_heads)(moved, *x)
    gradients = torch.autograd.grad(image, x, y)
    sides = [
        sum((a.detach() * b).sum() for a, b in zip(*pair, strict=True)).view(1)
        for pair in ((image, y), (x, gradients))
    ]
    left, right = (float(group.allreduce(side)) for side in sides)
    return abs(left - right) / max(abs(left), abs(right))


@pytest.mark.parametrize("back", (False, True), ids=("to_heads", "to_pieces"))
def test_backward_is_the_adjoint(group, back):
    for T in (12, 13, 3):
        for zigzagged in (False, True):
            assert adjoint_error(group, T, zigzagged, back) <= LIMIT


@pytest.mark.ranks(2, 3, 4)
def test_a_wrong_adjoint_is_found(group, monkeypatch):
    scale_backward(ulysses._ToHeads, 1 / group.size, monkeypatch)
    assert adjoint_error(group, 13, False, False) > 1e-3
