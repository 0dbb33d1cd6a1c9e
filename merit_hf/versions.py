"""Versions of the libraries that had a part in a result."""

from __future__ import annotations

import importlib.metadata
import platform

_LIBRARIES = ("merit_hf", "torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "peft", "mergekit")


def library_versions() -> dict[str, str]:
    """{library: version} of what is installed, and Python's."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
