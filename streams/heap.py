"""The C heap of a worker, where it is glibc's (mallopt(3), malloc_trim(3)); elsewhere these do nothing.

Left alone, glibc takes ever larger blocks from a heap a thread and keeps the holes: 250-350 MiB of a worker with
100,000 items.
"""

import ctypes
from typing import Final

from streams.settings import is_heap_told

# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (bytes), M_ARENA_MAX. What torch takes for a layer is below them: where each of
# those is mapped anew, at 1 MiB, the encoder loses 8 to 19 % of its texts.
OPTIONS: Final = {-3: 16 << 20, -1: 64 << 20, -8: 2}

_libc: Final = ctypes.CDLL(None)


def tune() -> None:
    """Large blocks are mapped, so that they go back at once; two heaps for all threads. Call it before there are any.

    Does nothing where the environment sets an option of the heap.
    """
    if hasattr(_libc, "mallopt") and not is_heap_told():
        for option, value in OPTIONS.items():
            _libc.mallopt(option, value)


def trim() -> None:
    """Gives free pages in the midst of the heaps back: tens of ms, in which other threads may wait for memory."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
