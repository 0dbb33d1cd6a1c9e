"""Seeds that are made of names."""

from __future__ import annotations

import hashlib
import json


def seed_of(*parts: object) -> int:
    """A 64-bit seed from any values, the same in every process and session."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")
