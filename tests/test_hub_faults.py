"""A Hub that fails, and what merit makes of it. The whole table: `pytest -m slow`, or benchmarks/hub_faults.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_table import FAULTS, OPERATIONS, Operation, Table
from hub_world import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    with World(tmp_path_factory.mktemp("world")) as world:
        Table.prepare(world)
        yield Table(world)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_and_the_second_run_succeeds(table: Table, fault: str, operation: Operation) -> None:
    for outcome in table.cell(fault, operation):
        if outcome.line is not None:
            assert "un the command again" in outcome.line, outcome
