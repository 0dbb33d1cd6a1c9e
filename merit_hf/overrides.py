"""CONFIG as text: a YAML file, and `key=value` on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from merit_hf.errors import ConfigError
from merit_hf.fields import nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as a string, for want of a point; here it is the number that people mean."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, read as YAML."""
    return yaml.load(text, _Loader) if text else None


def read_mapping(path: Path, needs: str = "It needs at least `base:` and `datasets:`.") -> dict[str, Any]:
    """The content of a CONFIG file. Raises ConfigError where it is no YAML mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give the path of a CONFIG yaml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}: not valid YAML{line}: {getattr(error, 'problem', error)}.") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty. {needs}")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected a mapping with `base:` and `datasets:`, found a {type(content).__name__}."
        )
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set `key.key=value` in `content`; a dataset is named where its number would stand. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override `{override}`: expected key=value, such as plan.num_groups=2.")
    parts = key.split(".")
    node: Any = content
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            named = {item.get("name"): item for item in node if isinstance(item, dict)}
            if part not in named:
                raise ConfigError(f"override `{override}`: no dataset is named `{part}`. {nearest(part, named)}")
            node = named[part]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override `{override}`: `{'.'.join(parts[: depth + 1])}` holds a value, not keys.")
    if isinstance(node, list):
        raise ConfigError(f"override `{override}`: name a dataset and its key: datasets.NAME.KEY=VALUE.")
    try:
        node[parts[-1]] = parse_value(text)
    except yaml.YAMLError:
        raise ConfigError(f"override `{override}`: the value is not valid YAML.") from None
