"""The layers of a model, operation by operation: FLOPs, weights, and bytes kept for backward.

      norm -> queries, keys, values -> attention -> output -> norm -> up -> activation -> down
    keeps x   norm's result           q k v out     mixed     x       norm's r.  up's r.  activated

What is kept is what the modules of models/ and parallel/ hand to autograd, each memory counted
where it is kept first; tests count the bytes that autograd holds and find these. So they follow our
choices: scores are not kept but where attention weights are dropped, a product keeps this rank's
piece of what it gathers, 16-bit products keep the weights that they cast, and a view keeps all that
it is a view of. ``layers_published.py`` has what papers count.

Keys that a causal mask hides are counted in FLOPs, as papers do. Experts get even shares of tokens.

Shapes: B rows (sequences) of a microbatch, D model, F hidden, V vocabulary, E experts, k choices.
This rank holds t positions, of them u between cut layers, f hidden units, v of the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from mpmp.programs.layers_attention import attention
from mpmp.programs.operations import Operation, Work
from mpmp.programs.partition import partition


def stage(
    work: Work, layers: int | None = None, *, first: bool = True, last: bool = True
) -> tuple[Operation, ...]:
    """All operations of a pipeline stage; without arguments of the whole model."""
    shape = work.shape
    number = shape.layers if layers is None else layers
    operations = embedding(work) if first else ()
    operations += turns(work) if number else ()
    operations += block(work) * number
    if last:
        operations += head(work, holds_table=not (first and shape.tied))
    return operations


# --- the two ends ---------------------------------------------------------------------------------


def embedding(work: Work) -> tuple[Operation, ...]:
    """Tokens to hidden states; the tokens themselves are the caller's."""
    shape, own = work.shape, work.share.of_tensor(work.shape.vocabulary)
    # Which tokens are this rank's, and where in its piece of the table.
    kept = work.tokens * (8 + 1) if work.share.tensor > 1 else 0
    operations = [Operation("embedding", kept, parameters=own * shape.width)]
    if shape.kind in ("gpt", "bert"):
        operations.append(Operation("positions", parameters=shape.context * shape.width))
    if shape.kind == "bert":
        operations.append(Operation("types", parameters=shape.token_types * shape.width))
        operations.append(work.norm("embedding norm"))
    return (*operations, *work.dropout("embedding dropout"))


def turns(work: Work) -> tuple[Operation, ...]:
    """Cosines and sines of RoPE, of which all blocks of a stage keep the same.

    Under full recomputation the blocks' arguments hold them: autograd does not.
    """
    shape, wide = work.shape, max(4, work.sizes.stored)
    if shape.kind != "llama" or work.share.recompute == "full":
        return ()
    return (Operation("turns", 2 * work.t * shape.head * wide),)


def head(work: Work, *, holds_table: bool = True) -> tuple[Operation, ...]:
    """Hidden states to losses; ``holds_table`` unless the embedding's is on the same rank."""
    shape, own = work.shape, work.share.of_tensor(work.shape.vocabulary)
    operations = []
    if shape.kind in ("gpt", "llama"):
        operations.append(work.norm("last norm", rms=shape.kind == "llama"))
    if shape.kind == "bert":
        operations += _transform(work)
    bias = own if shape.kind == "bert" else 0
    scores = work.linear("logits", shape.width, own, work.own_tokens, bias=bias)
    if not holds_table:
        scores = replace(scores, parameters=bias)
    # Logits, a sum of exponentials, the target's place, whether it is here, whether it counts.
    loss = work.tokens * (own * work.sizes.product + work.sizes.wide + 8 + 1 + 1)
    return (*operations, scores, Operation("cross entropy", loss))


def _transform(work: Work) -> list[Operation]:
    """The layer of its own that BERT's head has; its norm keeps what the activation gives."""
    width, own = work.shape.width, work.own_tokens
    layer = work.linear("transform", width, width, own, bias=width)
    return [
        replace(layer, flops=2.0 * own * width * width),
        Operation("transform activation", own * width * work.sizes.product),
        work.norm("transform norm"),
    ]


# --- a block --------------------------------------------------------------------------------------


def block(work: Work) -> tuple[Operation, ...]:
    """One layer of the model."""
    shape, rms = work.shape, work.shape.kind == "llama"
    operations: tuple[Operation, ...] = ()
    if shape.kind != "mlp":
        operations += (work.norm("norm of attention", rms=rms), *attention(work))
        operations += work.dropout("dropout behind attention")
        operations += (work.norm("norm of the feed-forward", rms=rms),)
    operations += _experts(work) if shape.experts else _feed_forward(work)
    operations += work.dropout("dropout behind the feed-forward")
    if work.share.recompute != "full":
        return operations
    again = (replace(one, kept=0.0, again=True) for one in operations)
    return (Operation("input", work.hidden_bytes), *again)


def _feed_forward(work: Work) -> tuple[Operation, ...]:
    """Two products with GELU between them, or SwiGLU's three."""
    shape, product = work.shape, work.sizes.product
    own, gated = work.share.of_tensor(shape.hidden), shape.kind == "llama"
    bias = (0, 0) if gated else (own, shape.width)
    up = work.linear("up", shape.width, (1 + gated) * own, work.own_tokens, bias=bias[0])
    # SwiGLU: gate and up lie in one memory, silu of the gate beside it.
    kept = (3 if gated else 1) * work.tokens * own * product
    down = work.linear("down", own, shape.width, work.tokens, bias=bias[1])
    return up, Operation("activation", kept), down


def _experts(work: Work) -> tuple[Operation, ...]:
    """A feed-forward of which each token takes the best few; every expert gets as many tokens."""
    shape, share, product = work.shape, work.share, work.sizes.product
    width, wide, k = shape.width, max(4, work.sizes.stored), shape.top_k
    own, blocks = share.of_tensor(shape.hidden), 2 if shape.kind == "llama" else 1
    matrix = partition(shape.experts, share.expert)[0][1] * own * width
    rows = work.tokens * k
    # Probabilities, choices and, where there are several, their gates and the sum of these.
    chosen = shape.experts * wide + 8 * k + (wide * (k + 1) if k > 1 else 0)
    # Of the auxiliary loss: which tokens are real, lengths, and every expert's share.
    balance = work.own_tokens + work.rows * (8 + shape.experts * wide)
    router = work.own_tokens * (width * wide + chosen) + balance
    # Places of tokens and of choices; and the order in which they arrive and go back.
    places = rows * 8 * (4 if share.expert > 1 else 2)
    # What comes back, its gate, and both multiplied.
    weighted = rows * (width * (product + wide) + wide)
    return (
        Operation(
            "router", router, 2.0 * work.own_tokens * width * shape.experts, shape.experts * width
        ),
        Operation("places", places),
        Operation("up", rows * width * product, 2.0 * rows * width * own * blocks, matrix * blocks),
        Operation("activation", (3 if blocks == 2 else 1) * rows * own * product),
        Operation("down", rows * own * product, 2.0 * rows * width * own, matrix),
        Operation("weighted sum", weighted),
    )
