"""The xet side: hf_xet's own local store stands in for the CAS server, the client reaching it through `local://`."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import hf_xet


def _hex(raw: bytes) -> str:
    """xet prints a hash as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


class LocalCas:
    """Reads what clients have put into the store: which xet hash belongs to which sha256, and the content."""

    def __init__(self, folder: Path):
        self.folder = folder

    def token(self) -> dict[str, str | int]:
        return {"casUrl": f"local://{self.folder}", "accessToken": "local", "exp": int(time.time()) + 3600}

    def _files(self) -> Iterator[tuple[str, str, int]]:
        """(sha256, xet hash, bytes) of every file in the store's shards, sha256 being what the client claimed."""
        for shard in self.folder.glob("xet/xorbs/shards/*.mdb"):
            data, position = shard.read_bytes(), 48  # 48 bytes: the shard's header, and every record after it
            while data[position : position + 32] != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, position + 32)
                size = sum(struct.unpack_from("<I", data, position + 48 * (i + 1) + 36)[0] for i in range(segments))
                end = position + 48 * (1 + segments * (2 if flags & 1 << 31 else 1))  # bit 31: verification records
                if flags & 1 << 30:  # bit 30: a last record that holds the sha256
                    yield _hex(data[end : end + 32]), _hex(data[position : position + 32]), size
                    end += 48
                position = end

    def find(self, sha256: str) -> tuple[str, int] | None:
        """(xet hash, bytes) of a file, None where it did not come through xet."""
        return next(((xet_hash, size) for found, xet_hash, size in self._files() if found == sha256), None)

    def fetch(self, sha256: str, path: Path) -> None:
        """Puts a file together at `path`; FileNotFoundError where the store does not have it."""
        if (found := self.find(sha256)) is None:
            raise FileNotFoundError(sha256)
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{self.folder}") as group:
            group.start_download_file(hf_xet.XetFileInfo(*found), str(path))
