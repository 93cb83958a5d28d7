"""How a script uses memory: keep what it has, and say what to do where there is too little."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common.console import UserError

TOO_LITTLE = ("can't allocate memory", "not enough memory", "out of memory",  # Linux; Windows; CUDA, MPS, page-locked
              "alloc_failed", "allocation_failed", "invalid buffer size")  # cuDNN and cuBLAS; MPS
GLIBC_TRIM_THRESHOLD, GLIBC_MMAP_MAX = -1, -4  # malloc.h: bytes free at the top before they are returned; large blocks
NEVER = -1


def reuse_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default glibc hands every large array back to the kernel, which must clear and map its pages again for the next
    one: a fifth of a step of the report's network. The price is that the process never shrinks, and grows somewhat.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(GLIBC_MMAP_MAX, 0)
        mallopt(GLIBC_TRIM_THRESHOLD, NEVER)


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Where the memory does not suffice, a `UserError` with the advice; nothing is ever made smaller unasked."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch says it in another way for each device, and not always by an exception of its own
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in TOO_LITTLE):
            raise
        what = str(error).splitlines()[0] if str(error) else "no more could be had"
        raise UserError(f"the memory is too small ({what}): {advice}") from None
