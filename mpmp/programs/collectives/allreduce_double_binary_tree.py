"""Double binary tree allreduce: each half of the buffer goes up and down a tree of its own.

      tree 1    0        tree 2    7       p = 8. Leaves of one tree are inner in the other, so
                4                  3       all ranks work: none sends or receives more than 2 n
              2   6              5   1     bytes (p = 3: 3/2 n, p = 2: n) or reduces more than n
             1 3 5 7            6 4 2 0    (p = 2: n/2), in 2 ceil(lg p) + S - 1 rounds.

Each half is cut into S pieces, the fact ``segments``: while later ones go up, earlier ones come
down. Tree 1 hangs a rank below the next multiple of twice its lowest bit; tree 2 is its mirror
image, or for odd p the same moved on by one rank.

Sanders, Speck, Traeff 2009; the trees are NCCL's.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpmp.programs.collectives.binary_tree import BinaryTree
from mpmp.programs.steps import Algorithm, Cost, Ranks, Receive, Reduce, Round, Send


def allreduce_double_binary_tree(rank: Ranks, size: int, *, segments: int = 1) -> Iterator[Round]:
    trees = [BinaryTree(rank, size), BinaryTree(rank, size, second=True)]
    for number in range(cost(size, segments=segments).rounds):
        steps: list[Send | Receive | Reduce] = []
        for tree, first in zip(trees, (0, segments), strict=True):
            # The deepest begin; what a rank sends up now its children sent in the round before.
            rises = number - (tree.height - tree.depth)
            falls = number - (tree.height + tree.depth)
            lower, upper = tree.children
            steps += [
                Send(first + rises, to=tree.at(rises, segments, tree.parent)),
                Reduce(first + rises + 1, source=tree.at(rises + 1, segments, lower)),
                Reduce(first + rises + 1, source=tree.at(rises + 1, segments, upper)),
                Send(first + falls, to=tree.at(falls, segments, lower)),
                Send(first + falls, to=tree.at(falls, segments, upper)),
                Receive(first + falls + 1, source=tree.at(falls + 1, segments, tree.parent)),
            ]
        yield Round(*steps)


def num_chunks(size: int, *, segments: int = 1) -> int:
    return 2 * segments


def cost(size: int, *, segments: int = 1) -> Cost:
    height = (size - 1).bit_length()
    rounds = 2 * height + segments - 1 if size > 1 else 0
    # Edges of both trees at the busiest rank: 4 where one with two children is a leaf elsewhere.
    edges = min(size, 4) if size > 1 else 0
    return Cost(rounds, sent=Fraction(edges, 2), reduced=Fraction(min(size - 1, 2), 2))


ALLREDUCE_DOUBLE_BINARY_TREE = Algorithm(
    allreduce_double_binary_tree, num_chunks, cost, facts=("segments",)
)
