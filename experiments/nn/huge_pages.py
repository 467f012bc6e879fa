"""Large results in pages of 2 MB, which the kernel hands out more seldom than those of 4 kB, and so in less time."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

MAPPED = 2**25  # bytes from which on malloc gives memory of its own, fresh from the kernel at every call


def in_huge_pages(new: Tensor) -> Tensor:
    """Ask the kernel for pages of 2 MB for a new tensor, where it is large, on a CPU, under Linux.

    Memory is handed out, and zeroed, page by page as it is first written to. For the weights of an attention, which
    are new in every call, 4 kB at a time takes a seventh of the whole forward pass. The kernel may refuse, and
    nothing else changes.
    """
    ask, size = madvise(), new.numel() * new.element_size()
    if ask is not None and size >= MAPPED and new.device.type == "cpu" and type(new) is Tensor:
        start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        ask(start, new.data_ptr() + size - start)
    return new


@functools.cache
def madvise() -> Callable[[int, int], int] | None:
    """Return the system's call that asks for huge pages at an address, for a length; None without one."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda start, length: int(call(start, length, advice))
