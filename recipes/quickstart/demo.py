"""The quickstart: a real model, a real mixture, four groups, one merge, one table. `make demo` runs it.

    python recipes/quickstart/demo.py --output runs/quickstart

Fails where a group does not lower the held-out loss of its own datasets, or joint training the mean.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="runs/quickstart", help="folder for base, data and the run")
    options, overrides = parser.parse_known_args()
    output = Path(options.output)
    start = time.monotonic()
    run(sys.executable, str(HERE / "prepare.py"), "--output", str(output))
    config = output / "quickstart.yaml"
    config.write_text((HERE / "quickstart.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    run(
        sys.executable,
        "-m",
        "merit_hf.cli",
        "run",
        str(config),
        *overrides,
        "--output",
        str(output / "run"),
        "--joint",
    )
    failures = check(json.loads((output / "run" / "evaluation.json").read_text(encoding="utf-8")))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    say(f"Wall time {time.monotonic() - start:.0f} s, peak memory {peak:.1f} GiB.")
    if failures:
        sys.exit("The demo failed: " + "; ".join(failures) + ".")
    say("Every group lowered the held-out loss of its own datasets, and joint training the mean.")
    say(
        f"Read {output}/run/plan/README.md and {output}/run/merged/README.md, then put your own datasets into "
        f"{config}."
    )


def run(*command: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def check(evaluation: dict) -> list[str]:
    """What a working run must show, as sentences about what it does not."""
    failures = []
    rows = evaluation["datasets"].values()
    for group in sorted({row["group"] for row in rows}):
        own = [row["loss"] for row in rows if row["group"] == group]
        before = sum(loss["base"] for loss in own) / len(own)
        after = sum(loss[f"group-{group}"] for loss in own) / len(own)
        if not after < before:
            failures.append(f"group {group} went from {before:.3f} to {after:.3f} on its own datasets")
    if not evaluation["mean"]["joint"] < evaluation["mean"]["base"]:
        failures.append(
            f"joint went from {evaluation['mean']['base']:.3f} to {evaluation['mean']['joint']:.3f} on the mean"
        )
    return failures


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
