"""What merit does when the Hub fails: every fault × every operation, written as a table.

    python benchmarks/hub_faults.py > docs/faults.md

Runs against the Hub of the tests, on this machine. Stops at the first cell where something is lost, is half done, or
does not succeed when it is run again; started again, it goes on from faults.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_table import FAULTS, OPERATIONS, Outcome, Table  # noqa: E402
from hub_world import World  # noqa: E402

from merit_hf.versions import library_versions  # noqa: E402

HEAD = """# When the Hub fails

Made by `python benchmarks/hub_faults.py > docs/faults.md`, against the Hub that the tests run.

A fault hits a request of an operation: *ask* (what is there, who am I), *download* (a plan, a
model), *data* (a dataset's rows), *upload* (a large file), *write* (the commit, or the pull request), *after* (what
follows it: closing a pull request, the list of them, the collection). Each cell says what the user saw:

- **itself**: the client or merit tried again, and the command succeeded;
- **again**: the command ended with exit code 1 and one line, and the same command succeeded the second time.

After every first run, what is on the Hub was compared with what was there before and with a run without faults: no
commit holds a part of what it should, there is no second claim, pull request or collection, and no output folder is
incomplete. After every second run all of it was as without faults: the same commits, files, pull requests, hashes.
–: the operation has no such request.
"""


def collect(path: Path) -> list[Outcome]:
    """Every cell: those in `path` as they are there, the others run now and added to it."""
    known = [Outcome(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(outcome.fault, outcome.operation, outcome.target) for outcome in known}
    missing = [
        (fault, operation, target)
        for operation in OPERATIONS
        for fault, (_, targets) in FAULTS.items()
        for target in targets
        if target in operation.targets and (fault, operation.name, target) not in done
    ]
    if not missing:
        return known
    with tempfile.TemporaryDirectory() as folder, World(Path(folder)) as world, path.open("a") as file:
        Table.prepare(world)
        table = Table(world)
        for fault, operation, target in missing:
            outcome = table.outcome(fault, operation, target)
            if outcome.line is not None:
                line = outcome.line.removeprefix("merit: error: ").replace(world.hub.endpoint, "https://hub.example")
                outcome = replace(outcome, line=line.replace(folder, "~"))
            sys.stderr.write(f"{operation.name}, {fault}, {target}: {outcome.line or 'by itself'}\n")
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            known.append(outcome)
    return known


def cell(outcomes: list[Outcome], fault: str, operation: str) -> str:
    told = [
        f"{outcome.target}: {'itself' if outcome.recovered else 'again'}"
        for outcome in outcomes
        if (outcome.fault, outcome.operation) == (fault, operation)
    ]
    return ", ".join(told) or "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--outcomes", type=Path, default=Path("faults.jsonl"), help="one line a cell; cells in it are not run again"
    )
    outcomes = collect(parser.parse_args().outcomes)
    lines = [HEAD, "| fault | " + " | ".join(operation.name for operation in OPERATIONS) + " |"]
    lines.append("|---" * (len(OPERATIONS) + 1) + "|")
    for fault in FAULTS:
        cells = [cell(outcomes, fault, operation.name) for operation in OPERATIONS]
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    lines.append("\nThe lines with which commands ended:\n")
    lines += sorted({f"- {o.operation}, {o.fault} ({o.target}): `{o.line}`" for o in outcomes if o.line is not None})
    versions = library_versions()
    lines.append("\nWith " + ", ".join(f"{name} {versions[name]}" for name in sorted(versions)) + ".")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
