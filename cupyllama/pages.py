"""Host memory in large pages."""

import mmap
from contextlib import suppress

import numpy as np

PAGE = 4096
HUGE_PAGE = 2 << 20


def whole_pages(nbytes: int) -> int:
    """Bytes of as many pages as hold `nbytes`."""
    return -(-nbytes // PAGE) * PAGE


def huge_pages(nbytes: int) -> np.ndarray:
    """Untouched memory as bytes, of the largest pages that the kernel has."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    skipped = -whole.ctypes.data % HUGE_PAGE
    return whole[skipped : skipped + nbytes]
