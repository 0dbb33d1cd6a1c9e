"""The errors that are told in one line."""

from __future__ import annotations


class MeritError(Exception):
    """A failure told in one line: what, where, found, expected, cure."""


class ConfigError(MeritError):
    """A mistake in a call or in a CONFIG file."""


class StoppedError(MeritError):
    """A signal asked for the machine's place; what was done is saved, and running again goes on."""
