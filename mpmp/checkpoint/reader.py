"""A rank's reading of blocks: by threads, verified, with the first fault kept and no more read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpmp.checkpoint.blocks import open_saved, read_block
from mpmp.checkpoint.needs import Catalogue
from mpmp.comm.agreement import reason
from mpmp.errors import CheckpointError

Block = Future[NDArray[Any]]
_THREADS = 2
"""One reads while the other hashes."""


class Reader:
    """Gives blocks of files, of zeros from the first ``fault`` on."""

    def __init__(self, files: Catalogue) -> None:
        self._files, self._stack = files, ExitStack()
        self._open: dict[int, BinaryIO] = {}
        self.read_bytes = 0
        self.fault: str | None = None

    def __enter__(self) -> Reader:
        self._pool = ThreadPoolExecutor(_THREADS, "read")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._stack.close()

    def start(self, blocks: Sequence[int]) -> dict[int, Block]:
        """Have blocks under way."""
        return {block: self._pool.submit(self._read, *self._place(block)) for block in blocks}

    def _place(self, block: int) -> tuple[int, int]:
        """The file of a block, opened, and the block's number in it."""
        file, number = self._files.place(block)
        if file not in self._open and self.fault is None:
            one = self._files.files[file]
            with self._noting(file):
                opened = open_saved(one.path, one.fingerprint)
                self._open[file] = self._stack.enter_context(opened)
        return file, number

    def _read(self, file: int, number: int) -> NDArray[Any]:
        expected = self._files.files[file].fingerprint
        with self._noting(file):
            if self.fault is None:
                block = read_block(self._open[file], expected, number)
                self.read_bytes += len(block)
                return block
        start, stop = expected.bounds(number)
        return np.zeros(stop - start, dtype=np.uint8)

    @contextmanager
    def _noting(self, file: int) -> Iterator[None]:
        """Keep what goes wrong with a file, in a sentence."""
        name = self._files.files[file].path.name
        try:
            yield
        except CheckpointError as error:
            self.fault = self.fault or f"{name} {error}"
        except OSError as error:
            self.fault = self.fault or f"{name} cannot be read: {reason(error, '')}"
