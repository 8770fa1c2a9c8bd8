"""Let a long calculation keep the memory that it frees.

By default glibc gives every freed tensor above 32 MiB back to the kernel, which then clears the
same pages again for the next one. A calibration makes thousands of (n_rows, vocab) tensors.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Serve allocations below 1 GiB from the heap and never shrink it.

    Returns:
        False where the C library has no such setting (other than glibc): nothing has changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2 * _GIB - 1) and mallopt(_M_MMAP_THRESHOLD, _GIB))
