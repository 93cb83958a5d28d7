"""Keep freed memory for reuse, and tell the user what to do when the memory is too small."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common.console import UserError

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory",  # Linux; Windows; CUDA, MPS, pinned
                 "alloc_failed", "allocation_failed", "invalid buffer size")  # cuDNN and cuBLAS; MPS
GLIBC_TRIM_THRESHOLD, GLIBC_MMAP_MAX = -1, -4  # numbers of two parameters in malloc.h


def reuse_memory() -> None:
    """Let this process keep the memory that it frees, if its C library is glibc.

    By default glibc returns every large array to the kernel, which must clear and map the pages of the next one.
    docs/performance.md says what that costs. In exchange the process never shrinks, and it grows somewhat.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(GLIBC_MMAP_MAX, 0)
        mallopt(GLIBC_TRIM_THRESHOLD, -1)  # -1: never


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn an error about too little memory into a `UserError` with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        message = str(error)  # torch words it differently for each device, and often raises a plain RuntimeError
        if not isinstance(error, MemoryError) and not any(words in message.lower() for words in OUT_OF_MEMORY):
            raise
        reason = message.splitlines()[0] if message else "no details"
        raise UserError(f"the memory is too small ({reason}): {advice}") from None
