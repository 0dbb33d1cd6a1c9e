"""What `Checkpoint.read_ahead` asks for is in memory soon, and nothing else of the file is."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merit_hf.align import Checkpoint

SIZE = 1 << 24  # elements, float32: 64 MiB
PART = 1 << 21


def resident(path: Path, start: int, count: int) -> float:
    """The share of the pages of a byte range that the system holds in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = (start + count - first) // mmap.PAGESIZE
        found = (ctypes.c_ubyte * pages)()
        address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data + first
        failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * mmap.PAGESIZE), found)
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(byte & 1 for byte in found) / pages


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system reads ahead by its own lights")
def test_the_asked_range_is_read_and_no_more(tmp_path: Path) -> None:
    save_file({"x": torch.arange(SIZE, dtype=torch.float32)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    checkpoint = Checkpoint(tmp_path)
    begin = checkpoint.tensors["x"].start + 4 * SIZE // 2
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path, begin, 4 * PART) > 0.01:
        pytest.skip("this file system keeps files in memory")
    checkpoint.read_ahead("x", SIZE // 2, SIZE // 2 + PART)
    deadline = time.monotonic() + 60
    while resident(path, begin, 4 * PART) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert resident(path, begin, 4 * PART) == 1
    assert resident(path, 0, 4 * SIZE // 4) < 0.2
    assert resident(path, begin + 4 * SIZE // 4, 4 * PART) < 0.2
