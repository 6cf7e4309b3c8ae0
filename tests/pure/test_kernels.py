"""The compiled kernels: bit for bit their reference in torch; built once, trusted only if ours."""

from __future__ import annotations

import ctypes
import itertools
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mpmp_kernels import build
from mpmp_kernels.reference import sum_publish
from torch import Tensor

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float64: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
}
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
BLOCK = 256
PUBLISH_PAST_CACHE = 1 << 22
LENGTHS = [0, 1, 2, 3, 7, 16, 63, 64, 65, 1000, *(BLOCK + d for d in (-1, 0, 1)), 3 * BLOCK + 5]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return build.library()


def call(
    kernels: ctypes.CDLL,
    sources: list[Tensor],
    targets: list[Tensor],
    divide: float = 1.0,
    near: int = -1,
) -> int:
    def pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_uint64]:
        return (ctypes.c_uint64 * len(tensors))(*(one.data_ptr() for one in tensors))

    outcome: int = kernels.mpmp_sum_publish(
        DTYPES[sources[0].dtype],
        sources[0].numel(),
        len(sources),
        pointers(sources),
        len(targets),
        pointers(targets),
        divide,
        near,
    )
    return outcome


def values(length: int, seed: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Random numbers that begin ``offset`` elements into their memory."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        found = torch.randn(length + offset, generator=generator, dtype=torch.float64) * 3
        return found.to(dtype)[offset:]
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, (length + offset,), dtype=dtype, generator=generator)[
        offset:
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits; one NaN is as good as another, for torch has several."""
    if a.dtype.is_floating_point:
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.dtype.itemsize]
    return torch.equal(a.view(integer), b.view(integer))


def compare(
    kernels: ctypes.CDLL,
    sources: list[Tensor],
    num_targets: int | None = None,
    divide: float = 1.0,
    near: int = -1,
) -> None:
    """``num_targets`` new tensors, or the sources themselves, against the reference."""
    before = [one.clone() for one in sources]
    expected = [torch.empty_like(sources[0])]
    sum_publish(before, expected, divide)
    guard = 4
    if num_targets is None:
        targets = sources
    else:
        length, dtype = sources[0].numel(), sources[0].dtype
        rooms = [torch.full((length + 2 * guard,), 77).to(dtype) for _ in range(num_targets)]
        targets = [room[guard : guard + length] for room in rooms]
    assert call(kernels, sources, targets, divide, near) == 0
    for target in targets:
        assert same_bits(target, expected[0])
    if num_targets is not None:
        for source, old in zip(sources, before, strict=True):
            assert same_bits(source, old), "sources that are no targets stay"
        for room in rooms:
            assert (room[:guard] == 77).all() and (room[-guard:] == 77).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_sources_and_targets(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    for length, num_sources in itertools.product(LENGTHS, range(1, 6)):
        for num_targets in (1, 2, num_sources, None):
            sources = [values(length, seed, dtype) for seed in range(num_sources)]
            for near in (-1, 0):
                compare(kernels, sources, num_targets, near=near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_may_begin_anywhere(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    for first, second in itertools.product((0, 1, 3, 7), repeat=2):
        for length in (5, 1001, 2 * BLOCK + 3):
            sources = [values(length, 1, dtype, first), values(length, 2, dtype, second)]
            compare(kernels, sources, 2)
            compare(kernels, sources, 3)
            compare(kernels, sources)


@pytest.mark.parametrize("num_sources", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_go_past_the_cache(
    kernels: ctypes.CDLL, dtype: torch.dtype, num_sources: int
) -> None:
    """Around the length from which stores are streamed, to all targets but the near one."""
    most = PUBLISH_PAST_CACHE // dtype.itemsize
    for length, offset in ((most - 1, 0), (most, 1), (most + 1, 3), (2 * most + 77, 5)):
        sources = [values(length, seed, dtype, offset) for seed in range(num_sources)]
        for near in range(-1, num_sources):
            compare(kernels, [one.clone() for one in sources], None, near=near)
        shifted = [values(length, seed, dtype, offset + seed) for seed in range(num_sources)]
        compare(kernels, shifted, num_sources, near=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_averages_are_divided_once(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    for divide, num_sources in itertools.product((2.0, 3.0, 7.0), (1, 2, 3, 5)):
        for length in (1, 1001, 2049):
            sources = [values(length, seed, dtype) for seed in range(num_sources)]
            compare(kernels, sources, 2, divide)
            compare(kernels, sources, None, divide)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_quotients_of_integers_are_cut_towards_zero(
    kernels: ctypes.CDLL, dtype: torch.dtype
) -> None:
    sources = [torch.arange(-50, 51, dtype=dtype), torch.arange(-50, 51, dtype=dtype)]
    compare(kernels, sources, 2, 3.0)
    large = [torch.tensor([torch.iinfo(dtype).max // 2 - 3], dtype=dtype)] * 2
    target = torch.empty_like(large[0])
    assert call(kernels, large, [target], 2.0) == 0
    assert target.item() == large[0].item()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Signed zeros, infinities, NaN, the largest and the smallest, each with each."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan")]
    special += [info.max, -info.max, info.tiny, info.smallest_normal / 2, info.eps]
    pairs = list(itertools.product(special, repeat=2))
    sources = [torch.tensor([pair[k] for pair in pairs], dtype=dtype) for k in range(2)]
    compare(kernels, sources, 2)
    compare(kernels, sources, None)
    triple = [*(torch.tensor([pair[k] for pair in pairs], dtype=dtype) for k in (0, 1, 0))]
    compare(kernels, triple, 1)
    negative = [torch.tensor([-0.0], dtype=dtype) for _ in range(3)]
    target = torch.empty(1, dtype=dtype)
    call(kernels, negative, [target])
    assert target.signbit().all(), "the sum of negative zeros is one, and does not begin with 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_are_rounded_to_even(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every 16-bit number with half of its last place added, which is a tie; and a bit more."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = every.float()
    half = (torch.nextafter(wide, wide) * 0 + wide.abs() * torch.finfo(dtype).eps / 2).to(dtype)
    compare(kernels, [every, half], 2)
    compare(kernels, [every.clone(), half.clone()], None)
    compare(kernels, [every, half, half], 1)
    compare(kernels, [every, half, torch.full_like(half, 1e-7)], 1)
    one, tie = 1.0, torch.finfo(dtype).eps / 2
    ties = [torch.tensor([one, one + 2 * tie], dtype=dtype), torch.tensor([tie, tie], dtype=dtype)]
    target = torch.empty(2, dtype=dtype)
    call(kernels, ties, [target])
    assert target.tolist() == [one, one + 4 * tie], "down to even, then up to even"


def test_sixteen_bits_are_rounded_once(kernels: ctypes.CDLL) -> None:
    """256 + 1 + 1 is 258 in float32; rounded after each sum it would stay 256."""
    sources = [torch.full((3,), x, dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0)]
    target = torch.empty(3, dtype=torch.bfloat16)
    call(kernels, sources, [target])
    assert target.tolist() == [258.0] * 3


def test_integers_wrap(kernels: ctypes.CDLL) -> None:
    for dtype in (torch.int64, torch.int32):
        most = torch.iinfo(dtype).max
        compare(kernels, [torch.tensor([most], dtype=dtype), torch.ones(1, dtype=dtype)], 1)


def test_a_dtype_without_kernel_is_said(kernels: ctypes.CDLL) -> None:
    x = torch.ones(3)
    pointers = (ctypes.c_uint64 * 1)(x.data_ptr())
    assert kernels.mpmp_sum_publish(6, 3, 1, pointers, 1, pointers, 1.0, -1) == 1
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("structure", ["Lane", "Call"])
def test_structures_are_laid_out_as_in_c(structure: str, tmp_path: Path) -> None:
    """Offsets of all fields, as the compiler says them."""
    fields = [name for name, *_ in getattr(build, structure)._fields_]
    name = structure.lower()
    lines = [f'printf("%zu ", offsetof(struct {name}, {field}));' for field in fields]
    (tmp_path / "layout.c").write_text(
        f'#include "{build.SOURCES[0]}"\n#include <stddef.h>\n#include <stdio.h>\n'
        f"int main(void) {{ {' '.join(lines)} "
        f'printf("%zu %zu", sizeof(struct {name}), sizeof(struct line)); }}\n'
    )
    made = tmp_path / "layout"
    subprocess.run(["cc", "-std=gnu11", "-w", tmp_path / "layout.c", "-o", made], check=True)
    said = subprocess.run([made], capture_output=True, text=True, check=True).stdout
    found = list(map(int, said.split()))
    ours = getattr(build, structure)
    assert found[:-2] == [getattr(ours, field).offset for field in fields]
    assert found[-2:] == [ctypes.sizeof(ours), build.LINE_BYTES]


# --- the build ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("CC", raising=False)
    build.library.cache_clear()
    yield tmp_path / "cache"
    build.library.cache_clear()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def counting_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notes every call of the real compiler in a file."""
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("CC", str(script(tmp_path / "bin" / "cc", f'echo "$@" >> {log}; cc "$@"')))
    return log


def compilations(log: Path) -> int:
    return sum("-shared" in line for line in log.read_text().splitlines())


def test_it_compiles_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = counting_compiler(tmp_path, monkeypatch)
    build.library()
    assert compilations(log) == 1
    (made,) = (cache / "mpmp").iterdir()
    assert made.suffix == ".so" and made.stat().st_uid == os.getuid()
    assert not (cache / "mpmp").stat().st_mode & 0o077
    build.library.cache_clear()  # as another process, later
    build.library()
    assert compilations(log) == 1, "it lies in the cache"
    monkeypatch.setattr(build, "_processor", lambda: "another model")
    build.library.cache_clear()
    build.library()
    assert compilations(log) == 2 and len(list((cache / "mpmp").iterdir())) == 2
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DCHANGED"))
    build.library.cache_clear()
    build.library()
    assert compilations(log) == 3


def test_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(build.BuildError, match=r"no C compiler \(cc\) on PATH"):
        build.library()
    assert not list(cache.glob("mpmp/*"))


def test_a_compiler_that_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = script(tmp_path / "bin" / "cc", 'echo "planted: no space for objects" >&2; exit 1')
    monkeypatch.setenv("CC", str(failing))
    with pytest.raises(build.BuildError, match="planted: no space for objects"):
        build.library()
    assert not list(cache.glob("mpmp/*")), "nothing half made is left"


def test_a_compiler_that_hangs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(script(tmp_path / "bin" / "cc", "exec sleep 60")))
    monkeypatch.setattr(build, "_LIMIT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(build.BuildError, match="timed out"):
        build.library()
    assert time.monotonic() - began < 10


def test_a_compiler_that_does_not_know_the_processor(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = 'case "$*" in *=native*) echo "bad -march" >&2; exit 1;; esac; cc "$@"'
    monkeypatch.setenv("CC", str(script(tmp_path / "bin" / "cc", picky)))
    assert call(build.library(), [torch.ones(3)] * 2, [torch.empty(3)]) == 0


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o707])
def test_a_cache_that_others_can_write_to_is_not_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    (cache / "mpmp").mkdir(parents=True)
    (cache / "mpmp").chmod(mode)
    build.library()
    assert not list((cache / "mpmp").iterdir())
    (private,) = (tmp_path / "tmp").iterdir()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700 and len(list(private.iterdir())) == 1
    private.chmod(0o777)
    build.library.cache_clear()
    with pytest.raises(build.BuildError, match="can hold the compiled code"):
        build.library()


def test_a_link_in_place_of_the_cache_is_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.mkdir()
    (cache / "mpmp").symlink_to(tmp_path / "elsewhere")
    build.library()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to own files of another user")
def test_what_another_user_has_put_there_is_not_loaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = counting_compiler(tmp_path, monkeypatch)
    build.library()
    (made,) = (cache / "mpmp").iterdir()
    made.unlink()  # it is mapped here: written to, it would change under our feet
    made.write_bytes(b"planted by somebody else")
    os.chown(made, 12345, 12345)
    build.library.cache_clear()
    build.library()
    assert compilations(log) == 2 and made.stat().st_uid == 0, "it is made anew"
    os.chown(cache / "mpmp", 12345, 12345)
    build.library.cache_clear()
    build.library()
    assert compilations(log) == 3, "in another folder"


def test_a_file_that_others_can_write_to_is_not_loaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = counting_compiler(tmp_path, monkeypatch)
    build.library()
    (made,) = (cache / "mpmp").iterdir()
    (cache / "mpmp").chmod(0o755)
    made.chmod(0o666)
    build.library.cache_clear()
    build.library()
    assert compilations(log) == 2
    assert not made.stat().st_mode & 0o022


def test_a_damaged_library_is_made_anew(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full, a host that crashed: no reason to be slow for ever."""
    log = counting_compiler(tmp_path, monkeypatch)
    (cache / "mpmp").mkdir(parents=True, mode=0o700)
    (cache / "mpmp" / f"window-{build._key([os.environ['CC']])}.so").write_bytes(b"\x7fELF cut off")
    assert call(build.library(), [torch.ones(3)] * 2, [torch.empty(3)]) == 0
    assert compilations(log) == 1


def test_a_compiler_with_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -O1")
    assert call(build.library(), [torch.ones(3)] * 2, [torch.empty(3)]) == 0


def test_processes_that_build_at_once_all_succeed(cache: Path, tmp_path: Path) -> None:
    program = (
        "import torch; from mpmp_kernels import build; "
        "import sys; sys.exit(not build.library().mpmp_run)"
    )
    several = [
        subprocess.Popen([sys.executable, "-c", program], env={**os.environ}, stderr=-1)
        for _ in range(3)
    ]
    said = [one.communicate(timeout=120)[1] for one in several]
    assert [one.returncode for one in several] == [0, 0, 0], said
    assert len(list((cache / "mpmp").iterdir())) == 1, "one library, and no remains"
