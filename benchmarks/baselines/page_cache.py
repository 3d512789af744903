"""Evicting files from the page cache, and proving it."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE


def cached_pages(path: Path) -> int:
    """Pages of the file that lie in the page cache, by mincore."""
    size = path.stat().st_size
    if size == 0:
        return 0
    pages = (size + _PAGE - 1) // _PAGE
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as view,
    ):
        vector = (ctypes.c_ubyte * pages)()
        address = _address_of(view)
        if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) != 0:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        return sum(byte & 1 for byte in bytes(vector))


def _address_of(view: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def evict(paths: Iterable[Path]) -> None:
    """Drops the files' clean pages; raises if more than 1 % of one stays cached."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        left, all_pages = cached_pages(path), max(1, path.stat().st_size // _PAGE)
        if left > all_pages // 100 + 16:
            raise RuntimeError(f"{path}: {left} of {all_pages} pages stay cached after eviction")
