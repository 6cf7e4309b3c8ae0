"""ZeRO: whatever is shared out, numbers are those of one process; what is held and what sent."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpmp
from mpmp import config
from mpmp.comm.mesh import Mesh
from mpmp.optim.adamw import make_optimizer
from mpmp.optim.clip import clip_, global_norm
from mpmp.parallel import states, zero
from mpmp.parallel.maker import Maker
from mpmp.parallel.placement import placement_of

F64 = torch.float64
OPTIMIZER = config.Optimizer(learning_rate=1e-2, weight_decay=0.3)
STAGES = pytest.mark.parametrize("stage", (0, 1, 2, 3))


class Block(nn.Module):
    """Lengths that no group divides, and a weight that only some samples use."""

    def __init__(self, make, name):
        super().__init__()
        self.weight = make.parameter(f"{name}.weight", (5, 5), std=0.4)
        self.bias = make.parameter(f"{name}.bias", (5,), std=0.1)
        self.rare = make.parameter(f"{name}.rare", (1,), mean=1.0)

    def forward(self, x, sample):
        y = torch.tanh(x @ self.weight.t() + self.bias)
        return x + (y * self.rare if sample % 2 else y)


class Net(nn.Module):
    """Blocks, and weights before and behind them that belong to none; ``tied`` has both uses."""

    def __init__(self, make, blocks=5, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.tied = make.parameter("tied", (7, 5), std=0.5)
        self.scale = make.parameter("scale", (1,), mean=1.0)
        self.unused = make.parameter("unused", (2, 2), std=1.0)
        self.blocks = nn.ModuleList(Block(make, f"blocks.{n}") for n in range(blocks))

    def forward(self, sample):
        x = self.tied[sample % 7].unsqueeze(0) * self.scale
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, sample, use_reentrant=False)
            else:
                x = block(x, sample)
        return x

    def loss(self, x):
        return (x @ self.tied.t()).square().sum()


class Trainer:
    def __init__(self, mesh, stage, bucket_bytes=200, dtype=F64, **shape):
        self.mesh = mesh
        self.net = Net(Maker(mesh, seed=1, dtype=dtype), **shape)
        self.sharded = zero.make([self.net], mesh, stage, bucket_bytes)
        self.optimizer = make_optimizer(self.sharded.pieces(), OPTIMIZER)

    def gradients(self, samples, ahead=1):
        """Forward and backward of microbatches, ``ahead`` forwards before their backwards."""
        self.sharded.begin()
        live, left = [], len(samples)
        for sample in [*samples, *[None] * (ahead - 1)]:
            if sample is not None:
                live.append(self.net.loss(self.net(sample)))
            if sample is None or len(live) == ahead:
                left -= 1
                with self.sharded.writing(0, last=left == 0):
                    live.pop(0).backward()
        self.sharded.finish()

    def step(self, samples, ahead=1):
        self.gradients(samples, ahead)
        norm = global_norm(self.sharded.pieces(), self.mesh.everyone)
        clip_(self.sharded.pieces(), norm, 1.0)
        self.optimizer.step()
        self.sharded.step_done()
        return float(norm)


@pytest.fixture(scope="module")
def mesh(world):
    return mpmp.mesh(data=world.size)


def alone(world, samples_of_steps, **shape):
    """The same steps in one process: norms, and weights by name."""
    one = Trainer(Mesh.single(world), 0, **shape)
    norms = [one.step(samples) for samples in samples_of_steps]
    return norms, {name: tensor.clone() for name, (_, tensor) in one.sharded.weights().items()}


def assert_same(sharded, weights):
    found = sharded.weights()
    assert set(found) == set(weights)
    for name, (_, tensor) in found.items():
        assert torch.allclose(tensor, weights[name], rtol=1e-12, atol=1e-13), name


def compare(world, mesh, stage, microbatches, ahead, bucket_bytes, shape):
    """Three steps of the replicas of a mesh, and of one process."""

    def samples(step, rank):
        return [step + 3 * rank + micro for micro in range(microbatches)]

    size = mesh.data.size
    steps = [[x for rank in range(size) for x in samples(step, rank)] for step in range(3)]
    norms, weights = alone(world, steps, **shape)
    ours = Trainer(mesh, stage, bucket_bytes, **shape)
    found = [ours.step(samples(step, mesh.data.rank), ahead) for step in range(3)]
    assert found == pytest.approx(norms, rel=1e-12)
    assert_same(ours.sharded, weights)


@STAGES
@pytest.mark.parametrize(
    "microbatches, ahead, bucket_bytes, shape",
    (
        (1, 1, 200, {}),
        (3, 2, 1, {}),
        (2, 1, 1e9, {"recompute": True}),
        (2, 2, 1e9, {"blocks": 1}),
    ),
    ids=("one", "pipelined", "recomputed", "short"),
)
def test_steps_equal_those_of_one_process(
    world, mesh, stage, microbatches, ahead, bucket_bytes, shape
):
    compare(world, mesh, stage, microbatches, ahead, bucket_bytes, shape)


@STAGES
def test_steps_by_messages_which_a_thread_drives(world, stage):
    mesh = Mesh.over(world, settings=config.Comm(windows="off"))
    compare(world, mesh, stage, 2, 2, 100, {})
    mesh.free()


@STAGES
def test_gradients_are_the_sums_also_after_a_step_that_was_left_out(mesh, stage):
    ours, theirs = Trainer(mesh, stage), Trainer(mesh, 0, 1e9)
    for step in range(2):
        for one in (ours, theirs):
            one.gradients([step, mesh.data.rank])
        expected = theirs.sharded.gradients()
        for name, (_, tensor) in ours.sharded.gradients().items():
            assert torch.allclose(tensor, expected[name][1], rtol=1e-12, atol=1e-13), name


@STAGES
def test_bytes_held_are_those_of_the_formula(mesh, stage):
    one = Trainer(mesh, stage, bucket_bytes=100, dtype=torch.float32)
    one.step([1])
    parameters = sum(placement.numel for placement, _ in one.sharded.weights().values())
    expected = states.formula(parameters, mesh.data.size, stage)
    found = states.held(one.sharded, one.optimizer)
    ranges, pieces = len(one.sharded.buckets), len(one.sharded.pieces())
    # Pieces differ by one element a range; the optimizer counts steps once a piece.
    padding = 4 * ranges
    assert abs(found.weights - expected.weights) <= (padding if stage == 3 else 0)
    assert abs(found.gradients - expected.gradients) <= (padding if stage >= 2 else 0)
    counters = 4 * pieces
    assert abs(found.optimizer - counters - expected.optimizer) <= 2 * (padding if stage else 0)
    if mesh.data.size > 1:
        assert (found.passage > 0) == (stage >= 2)


@STAGES
def test_elements_sent_are_those_of_the_formula(mesh, stage):
    one = Trainer(mesh, stage)
    parameters = sum(placement.numel for placement, _ in one.sharded.weights().values())
    before = one.sharded.sent
    one.step([1])
    passes = (2, 2, 2, 3)[stage] * parameters
    if stage == 3:
        # The last two blocks, and what belongs to none, are still there when backward begins.
        blocks = [sum(p.numel() for p in block.parameters()) for block in one.net.blocks]
        passes -= parameters - sum(blocks[:-2])
    size = mesh.data.size
    assert one.sharded.sent - before == pytest.approx(passes * (size - 1) / size)


@pytest.mark.ranks(2, 3)
def test_weights_of_the_next_unit_are_under_way_and_gradients_are_reduced_meanwhile(
    mesh, monkeypatch
):
    one = Trainer(mesh, 3)
    seen = []
    shards = {one.flat: one for one in one.sharded._weights}
    for bucket in one.sharded.buckets:
        names = [placement_of(parameter).name for parameter in bucket.flat.parameters]
        if not names[0].startswith("blocks."):
            continue
        number, shard = names[0].split(".")[1], shards[bucket.flat]
        gather, start = shard._gather.start, bucket.start
        monkeypatch.setattr(
            shard._gather, "start", lambda n=number, go=gather: (seen.append(f"w{n}"), go())[1]
        )
        monkeypatch.setattr(
            bucket, "start", lambda n=number, go=start: (seen.append(f"g{n}"), go())[1]
        )
    for number, block in enumerate(one.net.blocks):
        block.register_forward_pre_hook(lambda *_, n=number: seen.append(f"F{n}"))
    one.gradients([1])
    assert " ".join(seen) == "w0 w1 F0 w2 F1 w3 F2 w4 F3 F4 g4 w2 g3 w1 g2 w0 g1 g0"


@pytest.mark.ranks(2, 3, 4)
def test_ranks_may_call_whole_weights_as_often_as_they_like(mesh):
    one = Trainer(mesh, 3)
    one.step([1])
    with one.sharded.whole(), torch.no_grad():
        values = [float(one.net.loss(one.net(3))) for _ in range(1 + mesh.data.rank)]
    one.step([2])
    assert len(set(values)) == 1
    first = mesh.data.broadcast(torch.tensor(values[:1], dtype=F64))
    assert float(first) == values[0]


@pytest.mark.ranks(4)
@STAGES
def test_cut_weights_and_those_used_apart_count_once_in_the_norm(world, stage):
    """Tensor parallel: a cut matrix, a replicated vector, and one used on pieces of sequences."""
    mesh = mpmp.mesh(data=2, tensor=2)
    make = Maker(mesh, seed=1, dtype=F64, sequence=True)
    net = nn.Module()
    net.cut = make.parameter("cut.weight", (3, 5), std=1.0, cut_dim=0)
    net.same = make.parameter("same", (3,), std=1.0)
    net.apart = make.parameter("apart", (7,), std=1.0, apart=True)
    net.forward = lambda: net.cut.sum() + 2 * net.same.sum() + 3 * net.apart.sum()
    sharded = zero.make([net], mesh, stage, 1e9)
    sharded.begin()
    loss = net()
    with sharded.writing(0, last=True):
        loss.backward()
    sharded.finish()
    # Two replicas add up; of what is used apart the two tensor ranks, too.
    squares = 15 * 2**2 + 3 * 4**2 + 7 * 12**2
    assert float(global_norm(sharded.pieces(), mesh.everyone)) == pytest.approx(squares**0.5)
    found = sharded.gradients()
    assert bool((found["apart"][1] == 12).all())
    assert bool((found["cut.weight"][1] == 2).all())
    counted = sum(piece.stop - piece.start for piece in sharded.pieces() if piece.counts)
    assert int(mesh.everyone.allreduce(torch.tensor([counted]))) == 15 + 3 + 7
    mesh.free()


@STAGES
def test_gradients_left_for_later_and_a_weight_of_two_chunks(mesh, stage):
    """Backwards leave the matrices; another action computes those of a microbatch."""
    make = Maker(mesh, seed=1, dtype=F64)
    chunks = [Net(make, blocks=1), nn.Module()]
    chunks[1].tied = chunks[0].tied
    chunks[1].own = make.parameter("own", (3,), std=1.0)
    chunks[1].forward = lambda: chunks[1].tied.sum() + chunks[1].own.sum()
    sharded = zero.make(chunks, mesh, stage, 100)
    x = mesh.data.rank + 1.0
    matrix = chunks[0].blocks[0].weight
    gradient = torch.arange(25.0, dtype=F64).view(5, 5)
    sharded.begin()
    for micro in (0, 1):
        loss = chunks[1]() * x
        with sharded.writing(1, last=micro == 1):
            loss.backward()
        (hidden,) = chunks[0](0).split(5, -1)
        with sharded.writing(0, complete=False):
            torch.autograd.backward(hidden.sum() * x, inputs=[chunks[0].tied, chunks[0].scale])
        with sharded.writing(0, last=micro == 1, deferred=[matrix]):
            sharded.add(matrix, x * gradient)
    sharded.finish()
    found = {name: tensor for name, (_, tensor) in sharded.gradients().items()}
    total = sum(range(1, mesh.data.size + 1))
    assert torch.allclose(found["blocks.0.weight"], 2 * total * gradient, rtol=1e-13)
    assert bool((found["own"] == 2 * total).all())
    assert torch.allclose(found["tied"][1:], torch.full((6, 5), 2.0 * total, dtype=F64))
    assert bool((found["tied"][0] != 2 * total).any())
    assert not found["unused"].any()
