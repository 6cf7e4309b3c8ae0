"""Published costs, row by row: alpha, n beta and n gamma times what is found by following."""

from __future__ import annotations

import csv
from fractions import Fraction
from io import StringIO
from typing import Any

import pytest

from mpmp.programs.check import check
from mpmp.programs.simulate import Link, simulate_collective
from pure.oracle import ALGORITHMS

# The comments of MPICH's sources, after Thakur, Rabenseifner, Gropp 2005. n is the whole vector.
PUBLISHED = """\
collective,algorithm,condition,cost
allreduce,recursive doubling,pof2,lg(p)*a + n*lg(p)*b + n*lg(p)*g
allreduce,Rabenseifner (rec. halving RS + rec. doubling AG),pof2,2*lg(p)*a + 2*n*(p-1)/p*b + n*(p-1)/p*g
allreduce,Rabenseifner,non-pof2,(2*floor(lg p)+2)*a + (2*(p-1)/p+2)*n*b + n*(1+(p-1)/p)*g
allreduce,ring (RS+AG),any,2*(p-1)*a + 2*n*(p-1)/p*b + n*(p-1)/p*g
allgather,recursive doubling,pof2,lg(p)*a + n*(p-1)/p*b
allgather,Bruck,any,ceil(lg p)*a + n*(p-1)/p*b
allgather,ring,any,(p-1)*a + n*(p-1)/p*b
bcast,binomial,any,lg(p)*a + n*lg(p)*b
bcast,scatter + rec. doubling allgather,pof2,2*lg(p)*a + 2*n*(p-1)/p*b
bcast,scatter + ring allgather,any,(lg(p)+p-1)*a + 2*n*(p-1)/p*b
reduce,binomial,any,lg(p)*a + n*lg(p)*b + n*lg(p)*g
reduce,Rabenseifner RS + binomial gather,pof2,2*lg(p)*a + 2*n*(p-1)/p*b + n*(p-1)/p*g
reduce_scatter,recursive halving,pof2,lg(p)*a + n*(p-1)/p*b + n*(p-1)/p*g
reduce_scatter,pairwise exchange,any,(p-1)*a + n*(p-1)/p*b + n*(p-1)/p*g
reduce_scatter,recursive doubling (non-commutative),pof2,lg(p)*a + n*(lg(p)-(p-1)/p)*b + n*(lg(p)-(p-1)/p)*g
alltoall,Bruck,any,lg(p)*a + (n/2)*lg(p)*b
alltoall,pairwise,any,(p-1)*a + n*b
gather/scatter,binomial,any,lg(p)*a + n*(p-1)/p*b
"""  # noqa: E501

# The row of each algorithm here, by its place in the table; several where the row depends on p.
# Not here: reduce by halving and gather, and reduce-scatter of operations that do not commute.
OURS = {
    0: ["allreduce recursive_doubling"],
    1: ["allreduce rabenseifner", "allreduce swing", "allreduce hierarchical"],
    2: ["allreduce rabenseifner", "allreduce swing"],
    3: ["allreduce ring"],
    4: ["allgather recursive_doubling"],
    5: ["allgather bruck"],
    6: ["allgather ring"],
    7: ["broadcast binomial"],
    8: ["broadcast scatter_allgather"],
    9: ["broadcast scatter_allgather"],
    10: ["reduce binomial"],
    12: ["reduce_scatter recursive_halving"],
    13: ["reduce_scatter pairwise", "reduce_scatter ring"],
    15: ["alltoall bruck"],
    16: ["alltoall pairwise"],
    17: ["gather binomial", "scatter binomial"],
}
ROWS = list(csv.DictReader(StringIO(PUBLISHED)))


def holds(condition: str, size: int) -> bool:
    power_of_two = size & (size - 1) == 0
    return {"pof2": power_of_two, "non-pof2": not power_of_two, "any": True}[condition]


def factors(formula: str, size: int, lg: int) -> tuple[Fraction, Fraction, Fraction]:
    """The numbers before a, n b and n g, with ``lg`` for the logarithm of p, rounded or not."""
    formula = formula.replace("floor(lg p)", str(lg)).replace("ceil(lg p)", str(lg))
    formula = formula.replace("lg(p)", str(lg))
    words = {"p": Fraction(size), "n": Fraction(1)}
    found = []
    for letter in "abg":
        alone = {other: Fraction(other == letter) for other in "abg"}
        found.append(Fraction(eval(formula, {"__builtins__": {}}, {**words, **alone})))
    return found[0], found[1], found[2]


def cases(*sizes: int) -> pytest.MarkDecorator:
    """(row, algorithm, size) wherever the row's condition holds; scatter + allgather is a ring
    only where p is no power of two."""
    found = [
        (row, ours, size)
        for row, names in OURS.items()
        for ours in names
        for size in sizes
        if holds(ROWS[row]["condition"], size) and not (row == 9 and holds("pof2", size))
    ]
    return pytest.mark.parametrize(("row", "ours", "size"), found)


@cases(2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 31, 32, 64)
def test_rounds_bytes_and_sums_are_the_published_ones(row: int, ours: str, size: int) -> None:
    """The bytes of a row are those of its longest chain: the longest message of every round.

    Where p is no power of two lg p is rounded up, as trees have it, and down for Rabenseifner's.
    """
    published = ROWS[row]
    collective, name = ours.split()
    report: Any = check(collective, name, size)
    down, up = size.bit_length() - 1, (size - 1).bit_length()
    if row == 2:
        # Halving and doubling are on the p' = 2^floor(lg p) ranks that are left after the fold: the
        # published (p-1)/p is (p'-1)/p', and only the first and the last round move n.
        rounds, nbytes, sums = factors(published["cost"], 1 << down, down)
    else:
        rounds, nbytes, sums = factors(published["cost"], size, up)
    if row == 16:
        nbytes *= Fraction(size - 1, size)  # the published n counts the own piece, which stays
    if row == 15 and down != up:
        # n/2 lg p is for powers of two: else fewer slots have the highest bit set.
        assert report.chain < nbytes
        nbytes = Fraction(sum(slot.bit_count() for slot in range(size)), size)
    assert (report.rounds, report.chain, report.reduced) == (rounds, nbytes, sums)


@cases(2, 4, 8, 32)
def test_the_most_any_rank_sends_is_published_where_all_do_alike(
    row: int, ours: str, size: int
) -> None:
    collective, name = ours.split()
    published = ROWS[row]
    cost = ALGORITHMS[collective, name].cost(size)
    nbytes = factors(published["cost"], size, (size - 1).bit_length())[1]
    if row == 16:
        nbytes *= Fraction(size - 1, size)
    assert max(cost.sent, cost.received) == nbytes


def test_every_algorithm_has_a_row_or_none_was_published() -> None:
    ours = {tuple(one.split()) for names in OURS.values() for one in names}
    assert set(ALGORITHMS) - ours == {
        ("allreduce", "reduce_broadcast"),
        ("allreduce", "double_binary_tree"),
        ("allreduce", "direct"),
        ("reduce_scatter", "direct"),
        ("broadcast", "chain"),
        ("barrier", "dissemination"),
    }


@cases(2, 4, 8, 32, 64)
def test_simulated_time_is_the_published_one(row: int, ours: str, size: int) -> None:
    collective, name = ours.split()
    link, n = Link(alpha_s=2e-6, beta_s_per_byte=3e-10, gamma_s_per_byte=7e-11), 1 << 22
    rounds, nbytes, sums = map(float, factors(ROWS[row]["cost"], size, (size - 1).bit_length()))
    if row == 16:
        nbytes *= (size - 1) / size
    published = rounds * link.alpha_s + n * (
        nbytes * link.beta_s_per_byte + sums * link.gamma_s_per_byte
    )
    found = simulate_collective(ALGORITHMS[collective, name], size, n, link)
    assert found == pytest.approx(published, rel=1e-12)
