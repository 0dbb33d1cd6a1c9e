"""The two kinds of error that are told in one line."""

from __future__ import annotations


class MeritError(Exception):
    """A failure told in one line: what, where, found, expected, cure."""


class ConfigError(MeritError):
    """A mistake in a call or in a CONFIG file."""
