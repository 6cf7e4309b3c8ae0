"""Print the tables of planted bugs in docs/collectives.md again: ``python docs/mutants.py``.

The tests plant them too; what is planted is written there. Takes some 20 s of one core.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from pure import mutants, test_programs_windows  # noqa: E402

KINDS = (
    "dropped",
    "doubled",
    "other source",
    "other target",
    "other chunk",
    "swapped",
    "dropped everywhere",
)


def of_windows(sizes: tuple[int, ...]) -> str:
    """Mutants of the window programs, as ``mutants.table`` has those of the others."""
    lines = [
        f"| algorithm | {' | '.join(KINDS)} | planted | caught | harmless |",
        f"|---|{'---:|' * (len(KINDS) + 3)}",
    ]
    total: Counter[str] = Counter()
    for named in test_programs_windows.PROGRAMS:
        planted: Counter[str] = Counter()
        passed = test_programs_windows.survivors(named, sizes, planted)
        count = Counter({"harmless": passed.total(), "planted": planted.total()})
        for kind, number in planted.items():
            count[next(one for one in reversed(KINDS) if kind.endswith(one))] += number
        lines.append(f"| {named} | {_cells(count)} |")
        total += count
    return "\n".join([*lines, f"| all | {_cells(total)} |"])


def _cells(count: Counter[str]) -> str:
    caught = count["planted"] - count["harmless"]
    numbers = [*(count[kind] for kind in KINDS), count["planted"], caught, count["harmless"]]
    return " | ".join(map(str, numbers))


if __name__ == "__main__":
    print(of_windows((2, 3, 4)))
    print()
    print(mutants.table([2, 3, 4, 5, 6]))
