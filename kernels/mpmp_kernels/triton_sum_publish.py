"""Sum and publish on a GPU: read every peer's piece once, write the sum to all, in one pass.

The peers' memory is named by device pointers in a table of int64 on the device, so that one
kernel serves any number of peers: windows opened by CUDA IPC, on this card or on another in reach.
16-bit floats are added in float32, in the order of the table, and rounded once, as in
``reference.sum_publish``, which defines it.

Order in memory. The kernel has no fence of its own and needs none, used like this:
- before: whoever fills a source waits on the host for the stream that fills it, and only then lets
  the launching host know. A kernel reads what was complete before its launch;
- after: the host waits for this kernel's stream, and only then lets the peers know. The end of a
  kernel shows its writes to all cards and processes that map the memory; nothing is sure earlier;
- between the two nobody else touches these elements. A program reads before it writes, and no two
  programs share an element, so targets may be the sources.

Importing this module needs Triton. CUDA wheels of torch bring it; the first launch of a kernel
compiles it and calls a C compiler for its launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""What the kernel adds, and Triton's words for it."""

_WIDE_BYTES = 16  # the widest load of a thread
_BLOCK_BYTES, _WARPS = 8192, 8  # two loads of 16 bytes a thread, source and block


def sum_publish(
    sources: Sequence[int],
    targets: Sequence[int],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    divide: float = 1.0,
) -> None:
    """Queue the sum of ``length`` elements of all sources, over ``divide``, into all targets.

    Sources and targets are addresses that ``device`` reaches; the kernel goes to its current
    stream. Addresses that are multiples of 16 bytes make the widest loads.
    """
    if length == 0:
        return
    with _on(device):
        tables = [_table(tuple(addresses), device) for addresses in (sources, targets)]
        if device.type == "cuda":
            for table in tables:  # another thread may drop it from the cache meanwhile
                table.record_stream(torch.cuda.current_stream(device))
        block = _BLOCK_BYTES // dtype.itemsize
        _sum_publish[(triton.cdiv(length, block),)](
            *tables,
            length,
            float(divide),
            len(sources),
            len(targets),
            divides=divide != 1,
            dtype=DTYPES[dtype],
            wide=all(address % _WIDE_BYTES == 0 for address in (*sources, *targets)),
            block=block,
            num_warps=_WARPS,
        )


def _on(device: torch.device) -> AbstractContextManager[object]:
    # Triton launches on the thread's current card, and a new thread begins with card 0.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=4096)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device; buckets stay where they are, so that they are copied once."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


# --- on the device --------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _peer(
    table: tl.tensor, peer: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr
) -> tl.tensor:
    base = tl.load(table + peer).to(tl.pointer_type(dtype))
    if wide:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_up(
    sources: tl.tensor,
    targets: tl.tensor,
    at: tl.tensor,
    within: tl.tensor,
    divide: tl.tensor,
    num_sources: tl.constexpr,
    num_targets: tl.constexpr,
    divides: tl.constexpr,
    dtype: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    # Not from zero: the sum of -0.0 and -0.0 is -0.0.
    total = tl.load(_peer(sources, 0, dtype, wide) + at, mask=within).to(tl.float32)
    for peer in tl.static_range(1, num_sources):
        total += tl.load(_peer(sources, peer, dtype, wide) + at, mask=within).to(tl.float32)
    if divides:
        total = tl.div_rn(total, tl.zeros_like(total) + divide)  # plain / is rounded carelessly
    for peer in tl.static_range(num_targets):
        tl.store(_peer(targets, peer, dtype, wide) + at, total.to(dtype), mask=within)


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator, unused-ignore]
def _sum_publish(
    sources: tl.tensor,
    targets: tl.tensor,
    length: tl.tensor,
    divide: tl.tensor,
    num_sources: tl.constexpr,
    num_targets: tl.constexpr,
    divides: tl.constexpr,
    dtype: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * block
    at = first + tl.arange(0, block)
    # A mask would make all loads narrow where the length is odd; only the last block has one.
    if first + block <= length:
        _add_up(sources, targets, at, None, divide, num_sources, num_targets, divides, dtype, wide)
    else:
        _add_up(
            sources,
            targets,
            at,
            at < length,
            divide,
            num_sources,
            num_targets,
            divides,
            dtype,
            wide,
        )
