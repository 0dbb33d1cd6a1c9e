"""`merit report DIR`: one HTML page that says what was planned, trained and merged, and why it is as it is.

The page is one file: figures, their library (Plotly, in full), style and script are in it, and its own policy forbids
it to load anything. The same folder gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from plotly.offline import get_plotlyjs

from merit_hf.cards import EVALUATION_FIGURE
from merit_hf.checkpoint import check_output_folder
from merit_hf.config import ConfigError, MeritError
from merit_hf.figures import save_comparison, save_losses
from merit_hf.report.blocks import decimals
from merit_hf.report.charts import extremes
from merit_hf.report.diagnosed import diagnosis_facts
from merit_hf.report.results import compared_losses, evaluation_facts
from merit_hf.report.run_folder import RunFolder, read_run
from merit_hf.report.sections import in_short, merge_facts, plan_facts, provenance_facts, training_facts, training_logs
from merit_hf.text import public_text

REPORT_NAME = "report.html"
# Names are cut early; a sentence has room.
_MAX_PROSE = 2000


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of the run, or the plan, in `folder`.

    Args:
        folder (`str` or `Path`): what `merit run` made, a folder with a plan in plan/, or a plan.
        output (`str` or `Path`, *optional*, defaults to `folder`/report.html): the file to write.

    Returns:
        The page's path. A page that would not change is not written again.

    Raises:
        ConfigError: no plan in `folder`, or the output cannot be a file. MeritError: a file of it cannot be read.
    """
    folder = Path(folder)
    path = Path(output) if output is not None else folder / REPORT_NAME
    run = read_run(folder)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, and --output takes a file. Give {path / REPORT_NAME}.")
    check_output_folder(path.parent)
    page = render_report(run).encode("utf-8")
    if path.is_file() and path.read_bytes() == page:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(page)
    os.replace(part, path)
    return path


def save_run_figures(folder: str | Path) -> list[Path]:
    """The page's figures of training and results as PNG, in `folder`/figures; those of the plan lie in the plan.

    Raises:
        ConfigError, MeritError: as [`write_report`].
    """
    run, target = read_run(Path(folder)), Path(folder) / "figures"
    written = []
    target.mkdir(exist_ok=True)
    if logs := training_logs(run):
        written.append(target / "training_loss.png")
        save_losses(logs, written[-1])
    if run.evaluation is not None:
        written.append(save_evaluation_figure(run.evaluation, run.merged, Path(folder)))
    return written


def save_evaluation_figure(evaluation: Mapping[str, Any], merged: Mapping[str, Any] | None, folder: Path) -> Path:
    """Write `folder`/[`EVALUATION_FIGURE`]: what the card of a merged model shows of its evaluation.

    Args:
        merged: merit.json of the merged model.
    """
    path = folder / EVALUATION_FIGURE
    path.parent.mkdir(exist_ok=True)
    rows = compared_losses(evaluation, merged)
    save_comparison({name: rows[name] for name in extremes(list(rows))}, path)
    return path


def render_report(run: RunFolder) -> str:
    """The page as text.

    Raises:
        MeritError: a manifest, the evaluation or the diagnosis lacks what its format promises.
    """
    training = _facts("groups/*/merit.json", training_facts, run)
    merge = _facts("merged/merit.json", merge_facts, run)
    evaluation = _facts("evaluation.json", evaluation_facts, run)
    diagnosis = _facts("diagnosis.json", diagnosis_facts, run)
    plan = plan_facts(run.plan)
    sections = [plan, training, evaluation, diagnosis]
    figures = {chart["id"]: chart for section in sections if section for chart in section["charts"]}
    scripts = {"plotly": get_plotlyjs(), "page": _template("report.js")}
    return _environment().from_string(_template("report.html")).render(
        run=run, plan=run.plan, facts=plan, training=training, merge=merge, evaluation=evaluation,
        diagnosis=diagnosis, provenance=provenance_facts(run), short=in_short(run, training, merge),
        figures=htmlsafe_json_dumps(figures, sort_keys=True, separators=(",", ":"), allow_nan=False),
        style=_template("report.css"),
        scripts=scripts, script_hashes=" ".join(_csp_hash(source) for source in scripts.values()),
    )  # fmt: skip


def _facts(what: str, function: Callable[[RunFolder], dict[str, Any] | None], run: RunFolder) -> Any:
    try:
        return function(run)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MeritError(
            f"{what}: not as its command writes it ({type(error).__name__}: {error}). Run that command again."
        ) from error


def _environment() -> jinja2.Environment:
    """Everything is escaped; text that is not markup is one line without local paths."""

    def finalize(value: Any) -> Any:
        return public_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value

    environment = jinja2.Environment(
        autoescape=True, finalize=finalize, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "block": lambda text: jinja2.filters.escape(text),
        "prose": lambda text: jinja2.filters.escape(public_text(text, _MAX_PROSE)),
        "decimals": decimals,
    }
    return environment


def _template(name: str) -> str:
    return importlib.resources.files("merit_hf.templates").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}'"
