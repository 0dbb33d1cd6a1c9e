"""Text that came from elsewhere (a dataset's name, a stranger's manifest), made safe to publish.

Such text is data. In a card it never becomes markup, a link, a table cell of its own or a template, and no path of
the machine that wrote it is shown. `{{ value }}` in a card template runs through [`escape_markdown`] unless the value
is a [`Markdown`] string, so that forgetting to escape is not possible.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

MAX_LENGTH = 200

# What ends a path in running text: white space, quotes, brackets, separators of a list.
_SEGMENT = r"[^\s/\\\"'`<>|:;,(){}\[\]*?]+"
_LOCAL_PATH = re.compile(
    rf"file://[^\s\"'`<>|]*"
    rf"|(?<![\w./~<)%\]}}*‖-])/{_SEGMENT}(?:/{_SEGMENT})*/?"  # /a/b, but neither a URL, nor </tag>, nor tokens/s
    rf"|(?<![\w/])~[\w-]*/{_SEGMENT}(?:/{_SEGMENT})*/?"
    rf"|(?<![A-Za-z0-9])[A-Za-z]:[\\/](?![\\/]){_SEGMENT}(?:[\\/]{_SEGMENT})*[\\/]?"
    rf"|\\\\{_SEGMENT}(?:\\{_SEGMENT})+"
)
_MARKUP = {ord(character): f"&#{ord(character)};" for character in "&<>|`*[]{}\\~$#"}
# Renderers turn these into links even without markup; an empty comment parts them and shows nothing.
_AUTOLINK = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)
_LONE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")


class Markdown(str):
    """A string that is markup already and goes into a card as it is."""


def one_line(value: Any, max_length: int = MAX_LENGTH) -> str:
    """`value` as one line: white space, control and direction characters become one space; long text is cut."""
    # The joiners belong to the spelling of several scripts; every other invisible character can only disguise.
    text = "".join(c if unicodedata.category(c)[0] not in "CZ" or c in "\u200c\u200d" else " " for c in str(value))
    text = " ".join(text.split())
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def find_local_paths(text: str) -> list[str]:
    """The absolute local paths, home paths and `file://` addresses that occur in `text`, in order."""
    return [match.group() for match in _LOCAL_PATH.finditer(text)]


def hide_local_paths(text: str) -> str:
    """`text` with every local path cut to its last part (`/data/me/chat.jsonl` → `chat.jsonl`)."""
    if (match := _LOCAL_PATH.match(text)) and "\n" not in text and match.group() != text:
        # A path with a blank or a comma in it ends later than the pattern can know.
        return _last_part(text)
    return _LOCAL_PATH.sub(lambda match: _last_part(match.group()), text)


def public_text(value: Any, max_length: int = MAX_LENGTH) -> str:
    """One line without local paths: what a table or a picture may show of `value`."""
    return one_line(hide_local_paths(one_line(value, max_length=10 * MAX_LENGTH)), max_length)


def escape_markdown(value: Any, max_length: int = MAX_LENGTH) -> Markdown:
    """`value` as inert Markdown for a table cell or the middle of a line; `None` is empty, [`Markdown`] stays.

    Punctuation becomes character references, which are never read as structure, not even in a table.
    """
    if value is None:
        return Markdown()
    if isinstance(value, Markdown):
        return value
    text = _LONE_UNDERSCORE.sub("\ufffe", public_text(value, max_length)).translate(_MARKUP).replace("\ufffe", "&#95;")
    return Markdown(_AUTOLINK.sub("<!-- -->", text))


def code(value: Any) -> Markdown:
    """`value` as a code span where it is a plain identifier (a hash, a dtype, a version); else escaped."""
    text = public_text(value)
    return Markdown(f"`{text}`") if re.fullmatch(r"[\w.+@:/-]+", text) else escape_markdown(text)


def fenced(text: str, language: str = "") -> Markdown:
    """A code block that `text` cannot close: its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


MAX_ROWS = 60


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown:
    """A Markdown table whose cells are inert text; long ones are cut with a line that says so."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(escape_markdown(cell) for cell in row) + " |" for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        lines.append(f"\n{len(rows) - MAX_ROWS} more are in the tables under data/.")
    return Markdown("\n".join(lines))


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "…"
