"""Random numbers from counters: keyed by a name and an element, never by a rank's history.

A number depends on (seed, name, index of the element in the global tensor) alone, so initial
weights and dropout masks are the same however the model is cut, and nothing has to be saved to
resume. The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied
twice with the key in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Index = tuple[int, int] | Tensor
"""Places along a dim: (start, stop), or an int64 vector."""


def _signed(value: int) -> int:
    """A 64-bit pattern as the two's complement integer that torch's int64 holds."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def key_of(seed: int, name: str) -> int:
    """The 64-bit key of a named stream of random numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(x: Tensor) -> Tensor:
    """In place: masks of attention weights are large, and fresh memory is what would cost most."""
    x.bitwise_xor_(_logical_shift(x, 30)).mul_(_MIX1)
    x.bitwise_xor_(_logical_shift(x, 27)).mul_(_MIX2)
    return x.bitwise_xor_(_logical_shift(x, 31))


def bits(key: int, index: Tensor) -> Tensor:
    """64 random bits for each int64 index (int64, any shape)."""
    return _mix_(_mix_(index * _GOLDEN).bitwise_xor_(key))


def uniform(key: int, index: Tensor) -> Tensor:
    """float64 in [0, 1) for each int64 index, 53 random bits each."""
    return _logical_shift(bits(key, index), 11).to(torch.float64) * 2.0**-53


def keep(key: int, index: Tensor, probability: float) -> Tensor:
    """True, with the probability, for each int64 index."""
    return _logical_shift(bits(key, index), 11) < int(probability * 2**53)


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal float64 for each int64 index (Box and Muller 1958)."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(key, 2 * index)))
    return radius * torch.cos(2.0 * torch.pi * uniform(key, 2 * index + 1))


def element_index(
    shape: tuple[int, ...],
    ranges: Sequence[Index],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Row-major index, in the global tensor of ``shape``, of each element of a piece.

    ``ranges`` are the places of the piece along each dim. Returns int64 of the piece's shape.
    """
    index = torch.zeros((), dtype=torch.int64, device=device)
    for length, places in zip(shape, ranges, strict=True):
        if not isinstance(places, Tensor):
            places = torch.arange(*places, dtype=torch.int64, device=device)
        index = index.unsqueeze(-1) * length + places.to(device)
    return index


def permute(key: int, position: int, length: int) -> int:
    """Where a shuffle of ``range(length)`` puts ``position``: a bijection that needs no memory.

    Four Feistel rounds over the next even number of bits, repeated until the image falls inside
    (cycle walking; Black and Rogaway 2002).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            left, right = right, left ^ (_mix_int(key ^ (right * 4 + turn)) & mask)
        position = (left << half) | right
        if position < length:
            return position


def _mix_int(value: int) -> int:
    """The same finaliser for one Python integer."""
    value = (value * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return value ^ (value >> 31)
