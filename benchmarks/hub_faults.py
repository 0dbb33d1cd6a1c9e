"""What merit does when the Hub fails: every fault × every operation, written as a table.

    python benchmarks/hub_faults.py > docs/faults.md

Runs against the Hub of the tests, on this machine. Stops at the first cell where something is lost, is half done, or
does not succeed when it is run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_table import FAULTS, OPERATIONS, Outcome, Table  # noqa: E402
from hub_world import World  # noqa: E402

from merit_hf.versions import library_versions  # noqa: E402

HEAD = """# When the Hub fails

Made by `python benchmarks/hub_faults.py > docs/faults.md`, against the Hub that the tests run.

A fault hits a request of an operation: *ask* (what is there, who am I), *download*, *upload* (a large file), *write*
(the commit, or the pull request), *after* (what follows it: closing a pull request, the list of them, the collection).
Each cell says what the user saw:

- **itself**: the client or merit tried again, and the command succeeded;
- **again**: the command ended with exit code 1 and one line, and the same command succeeded the second time.

After every first run, what is on the Hub was compared with what was there before and with a run without faults: no
commit holds a part of what it should, there is no second claim, pull request or collection, and no output folder is
incomplete. After every second run all of it was as without faults: the same commits, files, pull requests, hashes.
–: the operation has no such request.
"""


def cell(outcomes: list[Outcome]) -> str:
    if not outcomes:
        return "–"
    return ", ".join(f"{o.target}: {'itself' if o.recovered else 'again'}" for o in outcomes)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, lines = [], {}
    with tempfile.TemporaryDirectory() as folder, World(Path(folder)) as world:
        Table.prepare(world)
        table = Table(world)
        for operation in OPERATIONS:
            cells = []
            for fault in FAULTS:
                outcomes = list(table.cell(fault, operation))
                cells.append(cell(outcomes))
                for outcome in outcomes:
                    lines.setdefault(outcome.line, outcome)
                    sys.stderr.write(f"{operation.name}, {fault}, {outcome.target}: {outcome.line or 'by itself'}\n")
            rows.append((operation.name, cells))
        endpoint = world.hub.endpoint
    print(HEAD)
    print("| fault | " + " | ".join(name for name, _ in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    for number, fault in enumerate(FAULTS):
        print(f"| {fault} | " + " | ".join(cells[number] for _, cells in rows) + " |")
    print("\nThe lines with which commands ended:\n")
    for line, outcome in sorted((line, outcome) for line, outcome in lines.items() if line is not None):
        said = line.removeprefix("merit: error: ").replace(endpoint, "https://hub.example").replace(folder, "~")
        print(f"- {outcome.operation}, {outcome.fault} ({outcome.target}): `{said}`")
    versions = library_versions()
    print("\nWith " + ", ".join(f"{name} {versions[name]}" for name in sorted(versions)) + ".")


if __name__ == "__main__":
    main()
