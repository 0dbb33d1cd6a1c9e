"""The facts of the report's sections on `merit evaluate` and `merit diagnose`, from their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merit_hf import charts
from merit_hf.blocks import Cell, Table, change, count, decimals, estimate, group_cell, listed, number, signed, text
from merit_hf.run_folder import RunFolder
from merit_hf.text import public_text

# Below this many held-out examples a dataset's numbers say little by themselves.
FEW_EXAMPLES = 30


def evaluation_facts(run: RunFolder) -> dict[str, Any] | None:
    """Losses, scores and answer lengths side by side, winners and losers; None without an evaluation."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    weights = {entry["group"]: entry["weight"] for entry in run.merged["groups"]} if run.merged else {}
    rows = {name: _losses(row, weights) for name, row in evaluation["datasets"].items()}
    models = list(evaluation["models"])
    reference = "base" if "base" in models else None
    best = "merged" if "merged" in models else None
    pair = (best, reference) if best and reference else None
    facts: dict[str, Any] = {
        "metric": evaluation["metric"],
        "table": _loss_table(evaluation, rows),
        "all": _models_table(evaluation),
        "sentences": _sentences(evaluation, rows),
        "fewest": min((row["num_examples"] for row in evaluation["datasets"].values()), default=0),
        "few_examples": FEW_EXAMPLES,
        "scores": _score_table(evaluation),
        "notes": list(evaluation.get("notes") or []),
        "harness": _harness_table(evaluation),
        "charts": [charts.comparison_chart(rows, pair)] if rows else [],
        "shown_rows": charts.MAX_ROWS if len(rows) > charts.MAX_ROWS else None,
    }
    return facts


def diagnosis_facts(run: RunFolder) -> dict[str, Any] | None:
    """The verdict with its numbers; None without a diagnosis."""
    diagnosis = run.diagnosis
    if diagnosis is None:
        return None
    groups = diagnosis.get("groups") or []
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
    }


def _losses(row: Mapping[str, Any], weights: Mapping[int, float]) -> dict[str, float]:
    """{model: loss} under the names of the figure: `own group` is the dataset's, `groups' mean` the weighted mean."""
    losses = row["loss"]
    found = {label: float(losses[label]) for label in ("base", "joint", "merged") if label in losses}
    own = losses.get(f"group-{row['group']}")
    if own is not None:
        found["own group"] = float(own)
    groups = {group: losses.get(f"group-{group}") for group in weights}
    if weights and all(loss is not None for loss in groups.values()):
        found["groups' mean"] = sum(weights[group] * groups[group] for group in weights)
    return found


def _loss_table(evaluation: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]) -> Table:
    shown = [model for model in ("base", "own group", "groups' mean", "joint", "merged")
             if rows and all(model in row for row in rows.values())]  # fmt: skip
    against = [model for model in ("base", "groups' mean", "joint") if model in shown and "merged" in shown]
    columns = [("dataset", "text"), ("group", "number"), ("held-out examples", "number")]
    columns += [(model, "number") for model in shown] + [(f"merged − {model}", "number") for model in against]
    body = []
    for name, losses in rows.items():
        row = evaluation["datasets"][name]
        body.append([Cell(name), group_cell(row["group"]), count(row["num_examples"]),
                     *(number(losses[model]) for model in shown),
                     *(change(losses["merged"] - losses[model]) for model in against)])  # fmt: skip
    means = {model: sum(row[model] for row in rows.values()) / len(rows) for model in shown}
    last = [Cell("mean"), text(None), text(None), *(number(means[model]) for model in shown),
            *(change(means["merged"] - means[model]) for model in against)]  # fmt: skip
    return Table("losses-table", "Held-out loss of every dataset", columns, body, last)


def _models_table(evaluation: Mapping[str, Any]) -> Table:
    models = list(evaluation["models"])
    columns = [("dataset", "text"), ("group", "number"), *((label, "number") for label in models)]
    rows = []
    for name, row in evaluation["datasets"].items():
        lowest = min(row["loss"][label] for label in models)
        rows.append([Cell(name), group_cell(row["group"]),
                     *(number(row["loss"][label], tone="note" if row["loss"][label] == lowest else "")
                       for label in models)])  # fmt: skip
    last = [Cell("mean"), text(None), *(number(evaluation["mean"][label]) for label in models)]
    return Table("models-table", "Held-out loss under every model", columns, rows, last)


def _sentences(evaluation: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    sentences = []
    if not rows or not all("merged" in row for row in rows.values()):
        return sentences
    for model, called in (("base", "the base"), ("groups' mean", "the weighted mean of the groups"),
                          ("joint", "joint training on everything")):  # fmt: skip
        if not all(model in row for row in rows.values()):
            continue
        gains = {name: row["merged"] - row[model] for name, row in rows.items()}
        wins = [name for name in sorted(gains, key=lambda name: gains[name]) if round(gains[name], 3) < 0]
        mean = sum(gains.values()) / len(gains)
        sentences.append(
            f"Against {called} ({decimals(sum(row[model] for row in rows.values()) / len(rows))} on average), the "
            f"merged model's held-out loss is lower on {len(wins)} of {len(rows)} datasets; the mean changes by "
            f"{signed(mean)}."
        )
    if all("base" in row for row in rows.values()):
        gains = {name: row["merged"] - row["base"] for name, row in rows.items()}
        order = sorted(gains, key=lambda name: gains[name])
        worse = [name for name in order[::-1] if round(gains[name], 3) > 0]
        told = [f"{public_text(name, 40)} ({signed(gains[name])})" for name in order[:3] if gains[name] < 0]
        if told:
            sentences.append(f"It improved most on {listed(told)}.")
        told = [f"{public_text(name, 40)} ({signed(gains[name])})" for name in worse]
        sentences.append(f"It got worse than the base on {listed(told)}." if told
                         else "On no dataset is it worse than the base.")  # fmt: skip
    return sentences


def _score_table(evaluation: Mapping[str, Any]) -> Table | None:
    """The task's own metric and the answer length; None where nothing was generated."""
    models = list(evaluation["models"])
    answered = {name: row for name, row in evaluation["datasets"].items() if row.get("num_answers")}
    if not answered:
        return None
    columns = [("dataset", "text"), ("metric", "text"), ("answers", "number"), ("tokens of a reference", "number")]
    columns += [(f"{label}: score", "number") for label in models]
    columns += [(f"{label}: length", "number") for label in models]
    rows = []
    for name, row in answered.items():
        scores, ratios = row.get("score") or {}, row.get("length_ratio") or {}
        rows.append(
            [
                Cell(name), text(row.get("metric")), count(row["num_answers"]), number(row.get("reference_tokens"), 0),
                *(number(scores.get(label), 2) for label in models),
                *(number(ratios.get(label), 2, "bad" if _is_short(row, ratios.get(label)) else "")
                  for label in models),
            ]
        )  # fmt: skip
    means, lengths = evaluation.get("mean_score") or {}, evaluation.get("mean_length_ratio") or {}
    last = [Cell("mean"), text(None), text(None), text(None), *(number(means.get(label), 2) for label in models),
            *(number(lengths.get(label), 2) for label in models)]  # fmt: skip
    return Table("scores-table", "Scores and answer lengths", columns, rows, last)


def _is_short(row: Mapping[str, Any], ratio: float | None) -> bool:
    return bool(row.get("free_form")) and ratio is not None and ratio < 0.5


def _harness_table(evaluation: Mapping[str, Any]) -> Table | None:
    harness = evaluation.get("harness")
    if not harness:
        return None
    models = list(evaluation["models"])
    columns = [("task", "text"), ("metric", "text"), *((label, "number") for label in models)]
    rows = [
        [Cell(task), text(metric), *(number((values.get(label) or {}).get("value")) for label in models)]
        for task, metrics in harness["tasks"].items()
        for metric, values in metrics.items()
    ]
    name = f"{public_text(harness['name'])} {public_text(harness.get('version') or '')}".strip()
    return Table("harness-table", f"Tasks of {name}", columns, rows)


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
    return [*diagnosis["datasets"].items()]


def _gain_table(diagnosis: Mapping[str, Any]) -> Table:
    ladder = next((entry["gain"]["ladder"] for _, entry in [*_entries(diagnosis), ("", diagnosis.get("overall") or {})]
                   if entry.get("gain")), [])  # fmt: skip
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
    first = (
        f"Averaging lowered the loss by {decimals(measured['value'])} against the groups' own losses "
        f"(95 % interval {decimals(measured['low'])} to {decimals(measured['high'])})."
        if measured.get("low") is not None
        else f"Averaging lowered the loss by {decimals(measured['value'])} against the groups' own losses."
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
    return Table("changes-table", "Differences of held-out loss, with intervals", columns, rows, cells("mean", overall))


def _cosine_table(diagnosis: Mapping[str, Any]) -> Table | None:
    geometry = diagnosis.get("geometry")
    if not geometry:
        return None
    labels = list(geometry["labels"])
    columns = [("model", "text"), ("distance from base", "number"), *((f"cos with {l}", "number") for l in labels)]
    rows = [
        [Cell(label), number(norm, 2), *(number(value, 2) for value in cosines)]
        for label, norm, cosines in zip(labels, geometry["norms"], geometry["cosines"], strict=True)
    ]
    return Table("geometry-table", "Distances and directions from the base", columns, rows)


def _perturbation_table(diagnosis: Mapping[str, Any]) -> Table | None:
    entries = [*_entries(diagnosis)]
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
