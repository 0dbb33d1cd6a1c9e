"""What the report is put together from: tables whose cells know their number, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown. value: what the column sorts by, where that is not the text.
        tone: `good`, `bad` or `note`: shown as a word beside a colour, never by colour alone.
        group: a group whose colour goes in front.
    """

    text: str
    value: float | None = None
    tone: str = ""
    group: int | None = None


@dataclass(frozen=True)
class Table:
    """A table of the page; the first column heads its row.

    Attributes:
        columns: (title, "number" or "text"). searchable: long tables get a box that filters their rows.
        last: a row of sums or means that stays below whatever the sorting.
    """

    name: str
    caption: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    last: Sequence[Cell] = ()

    @property
    def searchable(self) -> bool:
        return len(self.rows) > 20

    @property
    def sortable(self) -> bool:
        return len(self.rows) > 2


def text(value: Any) -> Cell:
    return Cell(NONE if value is None or value == "" else str(value))


def number(value: Any, digits: int = 3, tone: str = "") -> Cell:
    """A number with so many decimals; a dash where there is none."""
    return Cell(decimals(value, digits), None if value is None else float(value), tone)


def count(value: Any, tone: str = "") -> Cell:
    """A whole number with thousands separated."""
    return Cell(NONE if value is None else f"{int(value):,}", None if value is None else float(value), tone)


def change(value: Any, digits: int = 3, lower_is_better: bool = True) -> Cell:
    """A signed difference, called good or bad where it is not zero at these digits."""
    if value is None:
        return Cell(NONE)
    zero = round(float(value), digits) == 0
    tone = "" if zero else "good" if (value < 0) == lower_is_better else "bad"
    return Cell(signed(value, digits), float(value), tone)


def group_cell(group: int) -> Cell:
    return Cell(str(group), group, group=group)


def estimate(value: Mapping[str, Any] | None, digits: int = 3, lower_is_better: bool | None = None) -> Cell:
    """`value [low, high]`, toned only where the interval leaves zero out."""
    if value is None or value.get("value") is None:
        return Cell(NONE)
    shown = signed(value["value"], digits) if lower_is_better is not None else decimals(value["value"], digits)
    tone = ""
    if value.get("low") is not None and value.get("high") is not None:
        shown += f" [{decimals(value['low'], digits)}, {decimals(value['high'], digits)}]"
        if lower_is_better is not None and (value["low"] > 0 or value["high"] < 0):
            tone = "good" if (value["value"] < 0) == lower_is_better else "bad"
    return Cell(shown, float(value["value"]), tone)


def decimals(value: Any, digits: int = 3) -> str:
    if value is None:
        return NONE
    shown = f"{float(value):,.{digits}f}"
    # A rounded zero has no sign; a minus is as wide as a plus.
    return shown.replace("-", "") if float(shown.replace(",", "")) == 0 else shown.replace("-", "−")


def signed(value: Any, digits: int = 3) -> str:
    shown = decimals(value, digits)
    return f"+{shown}" if float(value) > 0 and shown.strip("0.,") else shown


def listed(names: Sequence[str], limit: int = 3) -> str:
    """`a, b and c`, or `a, b, c and 9 more`."""
    shown = list(names[:limit])
    if len(names) > limit:
        return ", ".join(shown) + f" and {len(names) - limit} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def plural(number_of: int, word: str) -> str:
    return f"{number_of:,} {word}" + ("" if number_of == 1 else "s")
