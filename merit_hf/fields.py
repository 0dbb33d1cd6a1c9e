"""A CONFIG section against the dataclass of a library: are the names and types ones that it takes?"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


def check_fields(values: Mapping[str, Any], section: str, kind: type) -> None:
    """Hold the keys and values of a CONFIG section against the init fields of the dataclass `kind`.

    Raises:
        ValueError: an unknown key, a value of another type, or no member of an enumeration; with the nearest match.
    """
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind) if field.init]
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"unknown key `{section}.{key}` (value {value!r}). {nearest(key, fields)}")
        if not _fits(value, hints[key]):
            expected = str(hints[key]).replace("typing.", "") if typing.get_args(hints[key]) else hints[key].__name__
            raise ValueError(f"{section}.{key}={value!r} ({type(value).__name__}): expected {expected}.")
        choices = [member.value for hint in _members(hints[key]) if _is_enum(hint) for member in hint]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{section}.{key}={value!r} is not a valid choice. {nearest(value, choices)}")


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _fits(value: Any, hint: Any) -> bool:
    for member in _members(hint):
        origin = typing.get_origin(member) or member
        if member is type(None) or origin is type(None):
            if value is None:
                return True
        elif origin is Any or (origin is Literal and value in typing.get_args(member)):
            return True
        elif origin is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif origin is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif _is_enum(origin):
            if isinstance(value, str):
                return True
        elif isinstance(origin, type) and isinstance(value, origin):
            return True
    return False


def nearest(key: object, choices: Iterable[Any]) -> str:
    """The sentence that helps after a word that is not among `choices`."""
    names = [str(choice) for choice in choices]
    match = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    return f"Did you mean `{match[0]}`?" if match else f"Valid: {', '.join(names)}."
