"""Licences of a merged model: what is known to go together, and where the user has to decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merit_hf.config import ConfigError
from merit_hf.sharing.licences import PERMISSIVE, merged_licence

PERMISSIVE_ONES = st.sampled_from(sorted(PERMISSIVE))


@pytest.mark.parametrize(
    ("base", "parts", "expected"),
    [
        ("apache-2.0", [], "apache-2.0"),
        ("mit", ["apache-2.0", "cc-by-4.0"], "mit"),
        ("apache-2.0", ["cc-by-sa-4.0"], "cc-by-sa-4.0"),
        ("apache-2.0", ["cc-by-sa-3.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        ("mit", ["cc-by-nc-4.0", "cc-by-nc-2.0"], "cc-by-nc-4.0"),
        ("mit", ["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        ("gpl-3.0", ["mit"], "gpl-3.0"),
        ("agpl-3.0", ["gpl-3.0", "lgpl-3.0"], "agpl-3.0"),
        ("llama3.1", ["mit", "llama3.1"], "llama3.1"),
    ],
)
def test_what_goes_together(base: str, parts: list[str], expected: str) -> None:
    assert merged_licence(base, parts) == expected


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        (None, ["mit"]), ("mit", [None]), ("mit", ["other"]), ("mit", ["llama3.1"]), ("llama3.1", ["gemma"]),
        ("llama3.1", ["cc-by-nc-4.0"]), ("mit", ["gpl-3.0", "cc-by-sa-4.0"]), ("mit", ["cc-by-nc-4.0",
            "cc-by-sa-4.0"]),
        ("mit", ["cc-by-nd-4.0"]), ("mit", ["MIT License"]), ("mit", [""]),
    ],
)  # fmt: skip
def test_where_the_user_decides(base: str | None, parts: list[str | None]) -> None:
    with pytest.raises(ConfigError, match=r"not clear.*--license"):
        merged_licence(base, parts)


@given(base=PERMISSIVE_ONES, parts=st.lists(PERMISSIVE_ONES))
def test_permissive_parts_never_change_the_bases_licence(base: str, parts: list[str]) -> None:
    assert merged_licence(base, parts) == base


@given(base=PERMISSIVE_ONES, parts=st.lists(st.text()))
def test_an_unknown_licence_is_never_passed_over(base: str, parts: list[str]) -> None:
    unknown = [part for part in parts if part not in PERMISSIVE]
    try:
        found = merged_licence(base, parts)
    except ConfigError:
        assert unknown
    else:
        assert not unknown or found in unknown
