"""The facts of the report's section on `merit diagnose`, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merit_hf.report import charts
from merit_hf.report.blocks import Cell, Table, change, count, decimals, estimate, group_cell, listed, number, text
from merit_hf.report.run_folder import RunFolder
from merit_hf.text import public_text


def diagnosis_facts(run: RunFolder) -> dict[str, Any] | None:
    """The verdict with its numbers; None without a diagnosis."""
    diagnosis = run.diagnosis
    if diagnosis is None:
        return None
    groups = diagnosis.get("groups") or []
    gains = {
        name: (entry["gain"]["measured"], entry["gain"]["ladder"])
        for name, entry in diagnosis["datasets"].items()
        if entry.get("gain")
    }
    return {
        "kind": diagnosis["kind"],
        "verdict": diagnosis["verdict"],
        "settings": diagnosis.get("settings") or {},
        "groups": _diagnosed_groups(groups) if groups else None,
        "gain": _gain_table(diagnosis) if groups else None,
        "rho": _rho_sentence(diagnosis),
        "barriers": _barrier_table(diagnosis),
        "changes": _change_table(diagnosis),
        "geometry": _cosine_table(diagnosis),
        "line_position": (diagnosis.get("geometry") or {}).get("line_position"),
        "perturbation": _perturbation_table(diagnosis),
        "layers": _layer_table(diagnosis),
        "skipped": diagnosis.get("skipped") or {},
        "charts": [charts.gain_chart(gains)] if gains else [],
    }


def _diagnosed_groups(groups: Sequence[Mapping[str, Any]]) -> Table:
    columns = [("group", "text"), ("distance from base", "number"), ("from the mean", "number"),
               ("share of the variance", "number"), ("share of the curvature", "number"),
               ("own rows, held out", "number"), ("own rows, training", "number"), ("mean without it", "number"),
               ("left the basin on", "text")]  # fmt: skip
    rows = []
    for entry in groups:
        own = entry.get("own") or {}
        left = [public_text(name, 40) for name in entry.get("left_basin_on") or []]
        rows.append(
            [
                group_cell(entry["group"]), number(entry["displacement"], 2), number(entry["distance_from_mean"], 2),
                number(entry.get("variance_share"), 2), number(entry.get("curvature_share"), 2),
                estimate(own.get("held_out"), lower_is_better=True),
                estimate(own.get("training"), lower_is_better=True),
                # A lower loss without the group speaks against the group.
                estimate(entry.get("exclude"), lower_is_better=False),
                Cell(listed(left) if left else "none", tone="bad" if left else ""),
            ]
        )  # fmt: skip
    return Table("diagnosed-groups", "What each group did", columns, rows)


def _entries(diagnosis: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(diagnosis["datasets"].items())


def _gain_table(diagnosis: Mapping[str, Any]) -> Table:
    ladders = [entry["gain"]["ladder"] for _, entry in _entries(diagnosis) if entry.get("gain")]
    ladder: list[dict[str, Any]] = ladders[0] if ladders else []
    epsilons = [step["epsilon"] for step in ladder]
    columns = [("dataset", "text"), ("group", "number"), ("measured gain", "number"), ("predicted gain", "number")]
    columns += [(f"ρ at ε = {epsilon:g}", "number") for epsilon in epsilons] + [("highest barrier", "number")]

    def cells(name: str, entry: Mapping[str, Any]) -> list[Cell]:
        gain = entry.get("gain") or {}
        steps = gain.get("ladder") or [{} for _ in epsilons]
        highest = max(entry.get("barriers") or [], key=lambda barrier: barrier["height"]["value"], default=None)
        return [
            Cell(name), group_cell(entry["group"]) if "group" in entry else text(None),
            estimate(gain.get("measured"), lower_is_better=False),
            number((steps[0].get("predicted") or {}).get("value") if steps else None),
            *(number((step.get("rho") or {}).get("value"), 2) for step in steps),
            estimate(highest["height"], lower_is_better=True) if highest else text(None),
        ]  # fmt: skip

    rows = [cells(name, entry) for name, entry in _entries(diagnosis)]
    overall = diagnosis.get("overall")
    return Table("gain-table", "What averaging gained", columns, rows, cells("mean", overall) if overall else ())


def _rho_sentence(diagnosis: Mapping[str, Any]) -> str | None:
    gain = (diagnosis.get("overall") or {}).get("gain")
    if not gain or not gain.get("ladder"):
        return None
    rhos = [(step["epsilon"], (step.get("rho") or {}).get("value")) for step in gain["ladder"]]
    told = ", ".join(f"{decimals(rho, 2)} at ε = {epsilon:g}" for epsilon, rho in rhos if rho is not None)
    measured = gain["measured"]
    done = "lowered" if measured["value"] >= 0 else "raised"
    interval = ""
    if measured.get("low") is not None:
        interval = f" (95 % interval of the gain: {decimals(measured['low'])} to {decimals(measured['high'])})"
    first = (
        f"Averaging {done} the loss by {decimals(abs(measured['value']))} against the groups' own losses{interval}."
    )
    return f"{first} Measured ÷ predicted, ρ: {told}." if told else first


def _barrier_table(diagnosis: Mapping[str, Any]) -> Table | None:
    overall = (diagnosis.get("overall") or {}).get("barriers") or []
    if not overall:
        return None
    rows = []
    for barrier in overall:
        worst = None
        for name, entry in _entries(diagnosis):
            same = [b for b in entry.get("barriers") or [] if (b["from"], b["to"]) == (barrier["from"], barrier["to"])]
            if same and (worst is None or same[0]["height"]["value"] > worst[1]):
                worst = (name, same[0]["height"]["value"])
        rows.append([Cell(f"{barrier['from']} → {barrier['to']}"), estimate(barrier["height"], lower_is_better=True),
                     text(worst[0] if worst else None), change(worst[1]) if worst else text(None)])  # fmt: skip
    columns = [("path", "text"), ("barrier, mean over datasets", "number"), ("highest on", "text"),
               ("height there", "number")]  # fmt: skip
    return Table("barriers-table", "Barriers between the models", columns, rows)


def _change_table(diagnosis: Mapping[str, Any]) -> Table | None:
    """Loss of one point less that of another, with its interval, for every dataset."""
    overall = diagnosis.get("overall") or {}
    wanted = [key for key in ("mean-base", "mean-line", "mean-joint", "merged-mean") if key in
              (overall.get("changes") or {})]  # fmt: skip
    if not wanted:
        return None
    columns = [("dataset", "text"), ("held-out examples", "number")]
    columns += [(key.replace("-", " − "), "number") for key in wanted]

    def cells(name: str, entry: Mapping[str, Any]) -> list[Cell]:
        changes = entry.get("changes") or {}
        return [Cell(name), count(entry.get("num_examples")),
                *(estimate(changes.get(key), lower_is_better=True) for key in wanted)]  # fmt: skip

    rows = [cells(name, entry) for name, entry in _entries(diagnosis)]
    return Table(
        "changes-table", "Differences of held-out loss, with intervals", columns, rows, cells("mean", overall)
    )


def _cosine_table(diagnosis: Mapping[str, Any]) -> Table | None:
    geometry = diagnosis.get("geometry")
    if not geometry:
        return None
    labels = list(geometry["labels"])
    columns = [("model", "text"), ("distance from base", "number"), *((f"cos with {of}", "number") for of in labels)]
    rows = [
        [Cell(label), number(norm, 2), *(number(value, 2) for value in cosines)]
        for label, norm, cosines in zip(labels, geometry["norms"], geometry["cosines"], strict=True)
    ]
    return Table("geometry-table", "Distances and directions from the base", columns, rows)


def _perturbation_table(diagnosis: Mapping[str, Any]) -> Table | None:
    entries = _entries(diagnosis)
    sigmas = [step["sigma"] for step in next((e["perturbation"] for _, e in entries if e.get("perturbation")), [])]
    if not sigmas:
        return None
    columns = [("dataset", "text"), *((f"σ = {sigma:g}", "number") for sigma in sigmas)]

    def cells(name: str, entry: Mapping[str, Any]) -> list[Cell]:
        steps = entry.get("perturbation") or [{} for _ in sigmas]
        return [Cell(name), *(estimate(step.get("increase")) for step in steps)]

    overall = diagnosis.get("overall")
    rows = [cells(name, entry) for name, entry in entries]
    last = cells("mean", overall) if overall and overall.get("perturbation") else ()
    return Table("perturbation-table", "Loss of the base with noise added", columns, rows, last)


def _layer_table(diagnosis: Mapping[str, Any]) -> Table | None:
    layers = diagnosis.get("layers") or []
    if not layers:
        return None
    columns = [("layer", "text"), ("parameters", "number"), ("share of the variance", "number"),
               ("share of the curvature", "number")]  # fmt: skip
    rows = [[Cell(entry["layer"]), count(entry["num_parameters"]), number(entry.get("variance_share")),
             number(entry.get("curvature_share"))] for entry in layers]  # fmt: skip
    return Table("layers-table", "Where the groups disagree, layer by layer", columns, rows)
