"""A rank's reading of blocks: by threads, verified, with the first fault kept and no more read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

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
        self._files = files
        self.read_bytes = 0
        """Of all blocks that were asked for; with a fault nobody uses any."""
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

    def start(self, blocks: Sequence[int]) -> dict[int, Block]:
        """Have blocks under way."""
        self.read_bytes += sum(map(self._files.block_bytes, blocks))
        return {block: self._pool.submit(self._read, block) for block in blocks}

    def _read(self, block: int) -> NDArray[Any]:
        file, number = self._files.place(block)
        path, expected = self._files.files[file].path, self._files.files[file].fingerprint
        try:
            if self.fault is None:
                # Opened for each block: a step may have more files than a process may have open.
                with open_saved(path, expected) as opened:
                    return read_block(opened, expected, number)
        except CheckpointError as error:
            self.fault = self.fault or f"{path.name} {error}"
        except OSError as error:
            self.fault = self.fault or f"{path.name} cannot be read: {reason(error, path.name)}"
        return np.zeros(self._files.block_bytes(block), dtype=np.uint8)
