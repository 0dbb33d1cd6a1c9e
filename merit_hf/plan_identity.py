"""What identifies a plan and a group: sha256 of canonical JSON, the same on every machine and version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from merit_hf.tables import PlannedDataset


def canonical_sha256(value: Any) -> str:
    """sha256 of the canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def group_identity(
    base: dict[str, Any], members: Sequence[PlannedDataset], sft: dict[str, Any], peft: dict[str, Any] | None = None
) -> str:
    """group_sha256: base weights, chat template, the members' data, the identity fields of the SFT settings, LoRA."""
    return canonical_sha256(
        {
            # Where nothing is frozen, the identity is the one from before anything could be.
            "base": {key: base[key] for key in ("weights_sha256", "chat_template_sha256", "freeze") if key in base},
            "datasets": [
                {
                    "name": member.name,
                    "fingerprint": member.fingerprint,
                    "tokens_digest": member.tokens_digest,
                    "num_examples": member.num_examples,
                    "num_input_tokens": member.num_input_tokens,
                    "num_loss_tokens": member.num_loss_tokens,
                }
                for member in sorted(members, key=lambda member: member.name)
            ],
            "sft": sft,
            # A plan that trains all weights keeps the identity that it had before there were adapters.
            **({"peft": peft} if peft else {}),
        }
    )
