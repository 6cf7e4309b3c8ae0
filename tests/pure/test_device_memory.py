"""The calls of the CUDA runtime, made on a library that stands in for it.

The stand-in has the declarations of CUDA's own header and memory that can be mapped twice. A wrong
argument here is a wrong argument there.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mpmp.comm import device_memory
from mpmp.comm.device_memory import HANDLE_BYTES, Card, CardError, Lease, Pool

SOURCE = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
typedef struct { char reserved[64]; } cudaIpcMemHandle_t;  /* as in driver_types.h */
enum cudaMemcpyKind { cudaMemcpyHostToHost = 0, cudaMemcpyDefault = 4 };
static int number, last, files[9];
static cudaIpcMemHandle_t handles[9];
static void *addresses[9];
static size_t lengths[9];

static void *map(int i) {
    return mmap(0, lengths[i], PROT_READ | PROT_WRITE, MAP_SHARED, files[i], 0);
}
int cudaMalloc(void **address, size_t length) {
    if (length > 1 << 30) return last = 2;
    lengths[number] = length;
    files[number] = memfd_create("block", 0);
    if (files[number] < 0 || ftruncate(files[number], length)) return last = 2;
    memset(handles[number].reserved, 'A' + number, 64);
    *address = addresses[number] = map(number);
    number++;
    return 0;
}
int cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *address) {
    for (int i = 0; i < number; i++)
        if (addresses[i] == address) { *handle = handles[i]; return 0; }
    return last = 1;
}
int cudaIpcOpenMemHandle(void **address, cudaIpcMemHandle_t handle, unsigned flags) {
    for (int i = 0; i < number; i++)
        if (flags == 1 && !memcmp(handle.reserved, handles[i].reserved, 64)) {
            *address = map(i);
            return 0;
        }
    return last = 201;
}
int cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, void *stream) {
    if (kind != cudaMemcpyDefault || stream != (void *)77) return last = 21;
    memcpy(to, from, n);
    return 0;
}
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "invalid"; }
int cudaGetLastError(void) { int code = last; last = 0; return code; }
"""


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, source = tmp_path / "libcudart.so.13", tmp_path / "cudart.c"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    ctypes.CDLL(str(library))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    device_memory._runtime.cache_clear()
    yield Card(torch.device("cuda", 0))
    device_memory._runtime.cache_clear()


# First: later tests have loaded the stand-in.
def test_without_a_runtime_it_says_so() -> None:
    device_memory._runtime.cache_clear()
    names = {Path(line.split()[-1]).name for line in open("/proc/self/maps")}
    if any(name.startswith("libcudart") for name in names):
        pytest.skip("torch has loaded one")
    with pytest.raises(CardError, match="no libcudart"):
        device_memory._runtime()


def at(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


def test_memory_is_mapped_by_its_handle(card: Card) -> None:
    address = card.allocate(1 << 12)
    ctypes.memmove(address, b"seen by all", 11)
    handle = card.export(address)
    there = card.open(handle)
    assert len(handle) == HANDLE_BYTES
    assert there not in (0, address)
    assert at(there, 11) == b"seen by all"
    assert card.open(handle) == there
    card.copy(there + 100, address, 4)
    assert at(address + 100, 4) == b"seen"


def test_a_refusal_is_an_error_and_leaves_no_other(card: Card) -> None:
    with pytest.raises(CardError, match="cudaMalloc on cuda:0: out of memory"):
        card.allocate(1 << 40)
    with pytest.raises(CardError, match="cudaIpcGetMemHandle on cuda:0: invalid"):
        card.export(12345)
    with pytest.raises(CardError, match="cudaIpcOpenMemHandle"):
        card.open(b"?" * HANDLE_BYTES)
    assert card._cuda.cudaGetLastError() == 0  # torch would raise it after its next kernel


def test_the_pool_says_no(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = []

    def tensor(lease: Lease) -> Tensor:
        leases.append(lease)
        return torch.zeros(lease.nbytes, dtype=torch.uint8)

    monkeypatch.setattr(card, "tensor", tensor)
    pool = Pool(card)
    assert pool.empty((1 << 40,), torch.float32) is None
    found = pool.empty((3, 5), torch.bfloat16)
    scalar = pool.empty((), torch.float32)
    assert found is not None and found.shape == (3, 5) and found.dtype is torch.bfloat16
    assert scalar is not None and scalar.shape == ()
    assert len(pool.blocks) == 1
    assert leases[0].address != leases[1].address
