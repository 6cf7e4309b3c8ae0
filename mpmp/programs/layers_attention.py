"""Attention of one rank, operation by operation; see ``layers.py``.

                        kept, in elements of a token and head width
    one piece           q k v of h + 2 g heads in one memory, the result, a number a query
    dropped weights     copies of q, k and v, scores after softmax, a mask, scores that are left
    ring                as in one piece; the result twice, for the output takes it token by token
    ulysses             as in one piece, of whole sequences and some of the heads; the result, too
    selective           q k v, and the result as the output takes it

Shapes: B rows, T time, K head width; t positions of this rank, h own query heads, g KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpmp.programs.operations import Operation, Work
from mpmp.programs.partition import partition

_PRODUCTS_UP_TO = 512
"""Tokens up to which backward in 16 bits is made of products (``parallel/causal.py``)."""


@dataclass(frozen=True)
class _Heads:
    """Query heads of a rank, and the KV heads they read."""

    first: int
    query: int
    kv: int
    grouped: bool
    """Each KV head serves as many of them; otherwise keys are repeated for each."""

    @property
    def expanded(self) -> int:
        """KV heads as the products take them."""
        return self.kv if self.grouped else self.query


def attention(work: Work) -> tuple[Operation, ...]:
    """From the norm's result to what is added to the hidden states."""
    shape, share = work.shape, work.share
    lined_up = shape.kv_heads >= share.tensor
    unit = shape.heads // shape.kv_heads if lined_up else 1
    start, stop = partition(shape.heads // unit, share.tensor)[share.tensor_rank]
    heads = _read_by(work, start * unit, stop * unit)
    mixed = _mixed(work, heads)
    if share.recompute == "selective":
        mixed = replace(mixed, kept=_projections(work, heads), again=True)
    return (*_projected(work, heads, lined_up), mixed, _output(work, heads))


def _read_by(work: Work, first: int, stop: int) -> _Heads:
    shape = work.shape
    read = [head * shape.kv_heads // shape.heads for head in range(first, stop)]
    num = read[-1] - read[0] + 1 if read else 0
    even = num == 0 or len(read) % num == 0
    places = [one - read[0] for one in read]
    in_order = even and places == [place * num // len(read) for place in range(len(read))]
    return _Heads(first, stop - first, num, in_order)


def _projected(work: Work, heads: _Heads, lined_up: bool) -> tuple[Operation, ...]:
    """Queries, keys and values; with few KV heads each rank holds all of their weights."""
    shape, K = work.shape, work.shape.head
    biased = shape.kind != "llama"
    own, held = heads.kv, heads.kv if lined_up else shape.kv_heads
    outputs, weights = (heads.query + 2 * own) * K, (heads.query + 2 * held) * K
    used = work.linear("queries, keys, values", shape.width, outputs, work.own_tokens)
    parameters = weights * (shape.width + biased)
    cast = 0
    if work.sizes.product != work.sizes.stored:  # of all that is held
        cast = (weights - outputs) * shape.width * work.sizes.product
    return (replace(used, kept=used.kept + cast, parameters=parameters),)


def _projections(work: Work, heads: _Heads) -> float:
    """Bytes of q, k and v as the products gave them, or of turned ones and what v is a part of."""
    shape = work.shape
    stacked = shape.kv_heads == shape.heads
    held = heads.query + 2 * heads.kv
    if shape.kind == "llama":  # turned copies; v still lies in what keys (and queries) lie in
        held = heads.query + heads.kv + (3 * heads.query if stacked else 2 * heads.kv)
    return work.tokens * held * shape.head * work.sizes.product


def _mixed(work: Work, heads: _Heads) -> Operation:
    """Scores, softmax, and the mixture of values."""
    shape, share, sizes, K = work.shape, work.share, work.sizes, work.shape.head
    T, h = shape.context, heads.query
    flops = 4.0 * work.tokens * T * h * K
    result, sums = work.tokens * h * K * sizes.product, work.tokens * h * sizes.wide
    if share.context == 1:
        kept = _dropped(work, heads) if shape.dropped else _whole(work, heads)
        return Operation("attention", kept, flops)
    if share.way == "ring":
        kept = _projections(work, heads) + (result if h > 1 else 0) + sums
        return Operation("ring attention", kept, flops)
    start, stop = partition(h, share.context)[share.context_rank]
    part = _read_by(work, heads.first + start, heads.first + stop)
    product = work.rows * T * K * sizes.product
    taken = float(product * (part.query + 2 * part.expanded))
    if shape.dropped:
        taken += _scores(work, part)
    elif not _by_products(work, part):
        taken += work.rows * T * part.query * (K * sizes.product + sizes.wide)
    return Operation("ulysses attention", taken, 4.0 * work.rows * T * T * part.query * K)


def _whole(work: Work, heads: _Heads) -> float:
    """Bytes that the kernel keeps beside its result, which the output keeps."""
    sums = 0 if _by_products(work, heads) else work.tokens * heads.query * work.sizes.wide
    if heads.grouped:
        return _projections(work, heads) + sums
    # Keys and values that are repeated are copies.
    return work.tokens * 3 * heads.query * work.shape.head * work.sizes.product + sums


def _by_products(work: Work, heads: _Heads) -> bool:
    """Whether backward wants nothing but q, k and v."""
    shape, in_16_bits = work.shape, work.sizes.product == 2
    alike = heads.query == heads.expanded
    return in_16_bits and shape.kind != "bert" and shape.context <= _PRODUCTS_UP_TO and alike


def _dropped(work: Work, heads: _Heads) -> float:
    """Bytes where attention weights are dropped: no kernel does it."""
    shape = work.shape
    one = work.tokens * shape.head * work.sizes.product
    if heads.grouped and (work.rows == 1 or heads.kv == 1):
        # Products take keys and values where they lie, with the queries if all are stacked; the
        # queries that they take are scaled.
        beside = shape.kv_heads == shape.heads and shape.kind != "llama"
        return _projections(work, heads) + beside * one * heads.query + _scores(work, heads)
    return one * (heads.query + 2 * heads.expanded) + _scores(work, heads)


def _scores(work: Work, heads: _Heads) -> float:
    """The softmax, a mask of one byte, and the weights that are left."""
    pairs = work.rows * heads.query * work.shape.context**2
    return pairs * (2 * work.sizes.product + 1)


def _output(work: Work, heads: _Heads) -> Operation:
    """The row product; it keeps the result of attention, token by token."""
    shape = work.shape
    inputs = heads.query * shape.head
    bias = 0 if shape.kind == "llama" else shape.width
    return work.linear("output", inputs, shape.width, work.tokens, bias=bias)
