"""Random numbers from counters: right in distribution, and the same however they are asked for."""

from __future__ import annotations

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from mpmp.parallel import counter
from mpmp.parallel.dropout import Dropout


def splitmix(x):
    """The finaliser of SplitMix64 on unbounded integers, as its paper prints it."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_bits_are_splitmix_of_splitmix():
    """Initial weights of published runs hang on these bits."""
    digest = hashlib.sha256(b"5/blocks.0.mlp.up.weight").digest()
    key = counter.key_of(5, "blocks.0.mlp.up.weight")
    assert key % 2**64 == int.from_bytes(digest[:8], "little")
    for index in (0, 1, 2, 12345, 2**40):
        expected = splitmix(splitmix(index * 0x9E3779B97F4A7C15 % 2**64) ^ key % 2**64)
        assert int(counter.bits(key, torch.tensor(index))) % 2**64 == expected


def test_uniform_and_normal_have_their_moments():
    index = torch.arange(200_000)
    for seed in range(4):
        key = counter.key_of(seed, "x")
        u, z = counter.uniform(key, index), counter.normal(key, index)
        assert float(u.min()) >= 0 and float(u.max()) < 1
        assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / len(u)) ** 0.5
        assert abs(float(z.mean())) < 5 / len(z) ** 0.5
        assert abs(float(z.square().mean()) - 1) < 5 * (2 / len(z)) ** 0.5
        assert abs(float(z.pow(4).mean()) - 3) < 5 * (96 / len(z)) ** 0.5
        neighbours = torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1]
        assert abs(float(neighbours)) < 5 / len(u) ** 0.5


def test_keep_keeps_the_share_it_is_told():
    kept = counter.keep(3, torch.arange(100_000), 0.7).double().mean()
    assert abs(float(kept) - 0.7) < 0.01
    assert bool(counter.keep(3, torch.arange(1000), 1.0).all())


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_elements_are_numbered_in_the_whole_tensor(shape, data):
    ranges = []
    for length in shape:
        start = data.draw(st.integers(0, length))
        ranges.append((start, data.draw(st.integers(start, length))))
    whole = counter.element_index(tuple(shape), tuple((0, n) for n in shape))
    assert torch.equal(whole.flatten(), torch.arange(whole.numel()))
    part = counter.element_index(tuple(shape), tuple(ranges))
    assert torch.equal(part, whole[tuple(slice(*one) for one in ranges)])
    places = [torch.arange(*one) for one in ranges]
    assert torch.equal(counter.element_index(tuple(shape), places), part)
    backwards = [(one.flip(0) if place % 2 else one) for place, one in enumerate(places)]
    mixed = counter.element_index(tuple(shape), backwards)
    assert torch.equal(mixed, part.flip([dim for dim in range(part.ndim) if dim % 2]))


def test_masks_of_scattered_places_are_those_of_the_whole():
    """What a rank of a context group holds: an early and a late piece of each sequence."""
    dropout, samples = Dropout(0.4, 3, "here"), torch.tensor([4, 0])
    x = torch.rand(2, 9, 6)
    whole = dropout(x, samples, (9, 6), ((0, 9), (0, 6)))
    held = torch.tensor([0, 1, 7, 8])
    assert torch.equal(
        dropout(x[:, held, 2:5], samples, (9, 6), (held, (2, 5))), whole[:, held, 2:5]
    )
    assert 0.2 < float((whole == 0).double().mean()) < 0.6
    assert torch.equal(whole != 0, dropout.kept(samples, (9, 6), ((0, 9), (0, 6))))
    assert dropout(x, None, (9, 6), ((0, 9), (0, 6))) is x


def test_an_index_is_left_as_it_was():
    index = torch.arange(5)
    counter.bits(3, index), counter.keep(3, index, 0.5)
    assert torch.equal(index, torch.arange(5))


@given(st.integers(1, 3000), st.integers(-(2**63), 2**63 - 1))
def test_permute_is_a_bijection(length, key):
    assert sorted(counter.permute(key, one, length) for one in range(length)) == list(range(length))
