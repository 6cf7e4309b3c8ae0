"""What papers count of a transformer: activations, states, FLOPs, and how many microbatches live.

Korthikanti et al. 2022 ("Reducing activation recomputation", sections 4 and 5) count for a layer,
of 16-bit activations and one-byte masks of dropout, s tokens, b sequences, h wide, a heads, on t
ranks:

    none                 s b h (34 + 5 a s / h)
    tensor               s b h (10 + 24 / t + 5 a s / (h t))
    tensor + sequence    s b h (34 / t + 5 a s / (h t))
    tensor + selective   s b h (10 + 24 / t)
    all three            34 s b h / t
    full                 2 s b h

Each is the sum of a list of tensors, and ``tensors`` is that list for an activation of any size:
our modules store the same where attention weights are dropped and one type is used throughout.

Shapes: s tokens of a sequence, b sequences of a microbatch, h width, a heads, L layers, V
vocabulary, P parameters, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A layer as the paper has it: GELU, four times as many hidden units, dropout in three places.

    ``itemsize`` are the bytes of an activation: 2 in the paper.
    """

    tokens: int
    sequences: int
    width: int
    heads: int
    itemsize: int = 2

    @property
    def sbh(self) -> int:
        """Elements of the hidden states."""
        return self.tokens * self.sequences * self.width

    @property
    def pairs(self) -> int:
        """Elements of the scores."""
        return self.heads * self.tokens**2 * self.sequences


def tensors(
    layer: Layer, ranks: int = 1, *, sequence: bool = False, recompute: str = "none"
) -> dict[str, float]:
    """Bytes of each tensor that a rank keeps of a layer, by the operation that keeps it."""
    size, sbh, cut = layer.itemsize, layer.sbh, 1 / ranks
    if recompute == "full":  # kept whole on each rank, which the formula has, too
        return {"input of the layer": size * sbh}
    between = cut if sequence else 1.0
    """Part of what lies between the cut layers."""
    kept = {
        "norm: input": size * sbh * between,
        "queries, keys, values: input": size * sbh * between,
        "scores: queries, keys": 2 * size * sbh * cut,
        "softmax: output": size * layer.pairs * cut,
        "dropout of weights: mask": layer.pairs * cut,
        "mixture: weights that are left": size * layer.pairs * cut,
        "mixture: values": size * sbh * cut,
        "output: input": size * sbh * cut,
        "dropout behind attention: mask": sbh * between,
        "second norm: input": size * sbh * between,
        "up: input": size * sbh * between,
        "GELU: input": 4 * size * sbh * cut,
        "down: input": 4 * size * sbh * cut,
        "dropout behind the feed-forward: mask": sbh * between,
    }
    if recompute == "selective":
        for scores in ("softmax: output", "dropout of weights: mask"):
            del kept[scores]
        del kept["mixture: weights that are left"]
    return kept


def formula(
    layer: Layer, ranks: int = 1, *, sequence: bool = False, recompute: str = "none"
) -> float:
    """The printed formulas, of 16-bit activations."""
    assert layer.itemsize == 2
    sbh, t = layer.sbh, ranks
    if recompute == "full":
        return 2 * sbh
    scores = 0.0 if recompute == "selective" else 5 * layer.heads * layer.tokens / layer.width / t
    return sbh * ((34 / t if sequence else 10 + 24 / t) + scores)


def alive(stage: int, stages: int, microbatches: int, chunks: int = 1) -> float:
    """Microbatches of all its layers that a rank holds at once, under 1F1B or interleaved.

    The first of p ranks holds min(m, p) and each next one less; with v chunks a rank 1 +
    (p - 1)/(p v) times p (section 4.2.3).
    """
    if chunks == 1:
        return min(microbatches, stages - stage)
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(microbatches * chunks, warm_up) / chunks


def state_bytes(
    parameters: float, ranks: int, stage: int, each: tuple[float, float, float] = (2, 2, 12)
) -> float:
    """Weights, gradients and optimizer states of a rank (Rajbhandari et al. 2019, "ZeRO").

    ``each``: bytes of the three for a parameter; 2, 2, 12 for 16-bit weights with Adam and float32
    masters; 4, 4, 8 where all is float32.
    """
    shares = (ranks if stage >= 3 else 1, ranks if stage >= 2 else 1, ranks if stage >= 1 else 1)
    return sum(parameters * size / share for size, share in zip(each, shares, strict=True))


def model_flops(
    sequences: int, layers: int, tokens: int, width: int, vocabulary: int, recompute: str = "none"
) -> float:
    """Of a step of a GPT, B sequences: 72 B L s h^2 (1 + s/6h + V/12hL), and what is done again.

    Full recomputation repeats all layers but not the logits, which gives 96 B L s h^2 (1 + s/6h +
    V/16hL) (Narayanan et al. 2021, section 5.1). Of selective the paper prints s/3h in place of
    s/6h; the forward of the scores alone, as ``layers.py`` adds it up, would be s/4.5h.
    """
    B, L, s, h, V = sequences, layers, tokens, width, vocabulary
    if recompute == "full":
        return 96 * B * L * s * h**2 * (1 + s / (6 * h) + V / (16 * h * L))
    scores = s / (3 * h) if recompute == "selective" else s / (6 * h)
    return 72 * B * L * s * h**2 * (1 + scores + V / (12 * h * L))
