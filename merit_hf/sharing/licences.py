"""Which licence a merged model can carry, from those of its base and its data: a table of what is known, no advice."""

from __future__ import annotations

from collections.abc import Collection

from merit_hf.config import ConfigError

# Ask for attribution at most, so that they go into anything.
PERMISSIVE = frozenset(
    {
        "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "isc", "unlicense", "wtfpl", "zlib",
        "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "pddl", "odc-by", "cdla-permissive-1.0",
        "cdla-permissive-2.0", "ms-pl", "postgresql", "afl-3.0", "ncsa",
    }
)  # fmt: skip
# A licence on the left passes on its conditions, and may take in those on the right besides what is permissive.
_TAKES_IN: dict[str, frozenset[str]] = {
    "cc-by-sa-4.0": frozenset({"cc-by-sa-3.0"}),
    "cc-by-sa-3.0": frozenset(),
    "cc-by-nc-4.0": frozenset({"cc-by-nc-2.0", "cc-by-nc-3.0"}),
    "cc-by-nc-3.0": frozenset({"cc-by-nc-2.0"}),
    "cc-by-nc-2.0": frozenset(),
    "cc-by-nc-sa-4.0": frozenset({"cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0"}),
    "cc-by-nc-sa-3.0": frozenset({"cc-by-nc-2.0", "cc-by-nc-3.0"}),
    "gpl-3.0": frozenset({"lgpl-3.0"}),
    "agpl-3.0": frozenset({"gpl-3.0", "lgpl-3.0"}),
    "lgpl-3.0": frozenset(),
    "odbl": frozenset(),
}


def merged_licence(base: str | None, parts: Collection[str | None]) -> str:
    """The licence of a merged model.

    Args:
        base: of the base model. parts: of datasets and group checkpoints; None where none is stated.

    Raises:
        ConfigError: a licence is missing or unknown, or two do not go together; the user has to decide.
    """
    found = {base, *parts}
    stated = ", ".join(sorted(licence for licence in found if licence)) or "none"
    if None in found:
        raise ConfigError(
            f"the licence of the merged model is not clear: its base or some of its data state none (stated: "
            f"{stated}). Decide it with --license ID (hub.license in CONFIG)."
        )
    demanding = {licence for licence in found if licence is not None and licence not in PERMISSIVE}
    if not demanding:
        assert base is not None
        return base
    for licence in sorted(demanding):
        if demanding - {licence} <= _TAKES_IN.get(licence, frozenset()) and licence in _TAKES_IN:
            return licence
    if len(demanding) == 1 and base in demanding:
        # A model's own licence, such as a community licence, goes on in what is made of it.
        assert base is not None
        return base
    raise ConfigError(
        f"the licence of the merged model is not clear: {', '.join(sorted(demanding))} are not known to go together. "
        "Decide it with --license ID (hub.license in CONFIG)."
    )
