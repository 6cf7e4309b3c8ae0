"""Compile the kernels on this machine, once for each processor model, and load them.

No torch extension (23 s) but plain C through ``cc`` and ctypes (half a second). The library lies in
``$XDG_CACHE_HOME/mpmp`` (``~/.cache/mpmp``) under the hash of source, flags, compiler and
processor: homes are shared by hosts that are not alike.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("window.c", "layers.c", "sha256.c"))
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno")
"""Sums are taken by lanes where `omp simd` says so, and there alone."""
NATIVE = ("-march=native", "-mcpu=native", "")
"""Ways to ask for all that the processor can; compilers know one or the other, or neither."""
_LIMIT_S = 60


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the text says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises BuildError where there is no compiler or it fails."""
    found = next((name for name in ("cc", "gcc") if shutil.which(name)), "cc")
    compiler = shlex.split(os.environ.get("CC", "")) or [found]
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"there is no C compiler ({compiler[0]}) on PATH")
    try:
        path = _cache() / f"window-{_key(compiler)}.so"
        if _ours(path):
            try:
                return _declared(ctypes.CDLL(str(path)))
            except OSError:
                pass  # damaged, by a full disk perhaps: made anew
        _compile(compiler, path)
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(str(error)) from error


@cache
def library_or_none() -> ctypes.CDLL | None:
    """The compiled kernels, where whoever asks has another way that is nearly as good."""
    try:
        return library()
    except BuildError:
        return None


def _cache() -> Path:
    """A folder that nobody else can write to: what lies there is executed."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(home) / "mpmp", Path(tempfile.gettempdir()) / f"mpmp-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        found = folder.lstat()
        private = found.st_uid == os.getuid() and not found.st_mode & 0o022
        if stat.S_ISDIR(found.st_mode) and private and os.access(folder, os.W_OK):
            return folder
    raise BuildError(f"neither {home}/mpmp nor the temporary directory can hold the compiled code")


def _ours(path: Path) -> bool:
    if not path.is_file():
        return False
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _key(compiler: list[str]) -> str:
    told = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_LIMIT_S)
    words = (
        *(source.read_bytes() for source in SOURCES),
        told.stdout,
        _processor().encode(),
        repr((compiler, FLAGS, NATIVE)).encode(),
    )
    digest = hashlib.sha256()
    for word in words:
        digest.update(len(word).to_bytes(8, "little") + word)
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Model and abilities of the processor, as Linux lists them for the first core."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = platform.processor()
    named = ("vendor_id", "model", "cpu family", "stepping", "flags", "Features", "CPU ", "cpu\t")
    lines = [line for line in first.splitlines() if line.startswith(named)]
    return "\n".join([platform.machine(), *lines])


def _compile(compiler: list[str], path: Path) -> None:
    said = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for native in NATIVE:
            options = [*FLAGS, *filter(None, [native])]
            command = [*compiler, *options, *map(str, SOURCES), "-o", str(made), "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
            if run.returncode == 0:
                made.chmod(0o700)
                made.replace(path)  # in one go: others may be loading it
                return
            said = said or run.stderr.strip()
    lines = said.splitlines() or ["no reason given"]
    first = next((line for line in lines if "error" in line), lines[0])
    raise BuildError(f"{compiler[0]} cannot compile the kernels: {first}")


class Lane(ctypes.Structure):
    """``struct lane`` of window.c."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("shares", ctypes.c_void_p),
        ("lines", ctypes.c_void_p),
        ("base", ctypes.c_uint64),
        ("turn", ctypes.c_uint64),
    ]


class Call(ctypes.Structure):
    """``struct call`` of window.c."""

    _fields_ = [
        ("lane", ctypes.POINTER(Lane)),
        ("steps", ctypes.c_void_p),
        ("num_steps", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("itemsize", ctypes.c_int64),
        ("divide", ctypes.c_double),
        ("signature", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
        ("input", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("pointers", ctypes.c_void_p),
        ("at", ctypes.c_int64),
        ("published", ctypes.c_int64),
        ("awaited", ctypes.c_int64),
        ("met", ctypes.c_int64),
        ("stranger", ctypes.c_int64),
    ]


LINE_BYTES = 192
"""``sizeof(struct line)``: a counter and two headers, each on a cache line of its own."""


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    found.mpmp_sum_publish.argtypes = [
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_double,
        ctypes.c_int64,
    ]
    number, address = ctypes.c_int64, ctypes.c_void_p
    for name, kinds in {
        "copy": [number, address, address],
        "gelu": [number, address, address],
        "gelu_backward": [number, address, address, address],
        "add": [number, address, address, address],
        "layer_norm": [number, number, *[address] * 3, ctypes.c_float, *[address] * 3],
        "layer_norm_backward": [number, number, *[address] * 8],
        "causal_softmax": [number, number, ctypes.c_float, address],
        "causal_softmax_backward": [number, number, ctypes.c_float, address, address],
        "maximum": [number, number, address, address],
        "exponentials": [number, number, address, address, address],
        "cross_entropy_backward": [number, number, *[address] * 5],
    }.items():
        function = getattr(found, f"mpmp_{name}")
        function.argtypes, function.restype = kinds, None
    found.mpmp_sha256_pair.argtypes = [number, address, address, address]
    # Without argtypes: a call then takes the prebuilt arguments as they are, 0.2 us sooner.
    found.mpmp_run.restype = ctypes.c_int
    return found
