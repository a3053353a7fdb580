"""``report.html``, assembled from the files of a run alone."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from ruamel.yaml import YAML

from diptych.contract import Pipeline
from diptych.files import write_text
from diptych.report import curves, views
from diptych.report.pictures import listed
from diptych.results import read_results, tone, verdict

LARGEST = 4_900_000  # bytes; the report can be sent by mail
WORST_ROWS = 15
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
_WORD = r"[^\s'\",\]}]*"
_LOCAL_PATH = re.compile(
    rf"(?<![\w:/.])(?:~[\\/]|[A-Za-z]:[\\/]|/(?=\w)){_WORD}(?: {_WORD}[\\/]{_WORD})*"
)


def render(
    run: Path, pipeline: Pipeline, *, evaluation: Path | None = None, target: Path | None = None
) -> Path:
    """Write the report of a run: one file, no network, no script, light and dark, below 5 MB.

    Args:
        run: A run folder with an evaluation; what is missing beside it leaves its section out.
        pipeline: Gives the title and the metrics.
        evaluation: The evaluation folder, default ``RUN/evaluation``.
        target: The file, default ``RUN/report.html``.

    Returns:
        The file.

    Raises:
        DataError: If the run was not evaluated, or its results are damaged.
    """
    evaluation = evaluation or run / "evaluation"
    target = target or run / "report.html"
    context = _context(run, evaluation, pipeline)
    template = _environment().get_template("page.html.jinja")
    html = template.render(context)
    while len(html.encode()) > LARGEST and _drop_largest_picture(context):
        html = template.render(context)
    write_text(target, html)
    return target


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diptych", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["typeset"] = views.typeset
    return environment


def _context(run: Path, evaluation: Path, pipeline: Pipeline) -> dict[str, Any]:
    results = read_results(evaluation)
    metrics = pipeline.metrics
    config_text = without_paths(_text(run / "config.yaml"))
    split = _json(run / "split.json")
    sentences, pairs = views.split_notes(results["notes"])
    statement, judgement = said_apart(verdict(results, metrics))
    pictures = [_picture(evaluation / "pictures", p) for p in listed(evaluation / "pictures")]
    logged = curves.read_curves(run, results["pipeline"])
    return {
        "style": resources.files("diptych.report").joinpath("style.css").read_text("utf-8"),
        "title": pipeline.title,
        "identity": _json(run / "run.json"),
        "results": results,
        "parts": statement.split("; "),
        "judgement": judgement,
        "kind": tone(judgement),
        "alarms": alarms(config_text, split, _findings(run / "findings.json"), results["subject"]),
        "evaluation_findings": views.grouped_findings(_findings(evaluation / "findings.json")),
        "sentences": sentences,
        "pairs": pairs,
        "table": views.score_table(results, results, metrics),
        "forests": views.forests(results, results, metrics),
        "overview": views.condition_overview(results, metrics),
        "tables": [
            {
                "title": views.table_title(table),
                "n_subjects": table["n_subjects"],
                "protocol": table["protocol"],
                "scores": views.score_table(table, results, metrics),
                "forests": views.forests(table, results, metrics),
            }
            for table in results["tables"]
        ],
        "pictures": [p for p in pictures if not p["name"].startswith("worst")],
        "worst_pictures": [p for p in pictures if p["name"].startswith("worst")],
        "left_out": [],
        "worst": worst_units(evaluation),
        "curves": curves.draw(logged),
        "curves_left_out": max(0, len(logged) - curves.MOST_PANELS),
        "data": _data(run),
        "findings": views.grouped_findings(_findings(run / "findings.json")),
        "split": views.split_table(split, results["pipeline"]) if split else [],
        "config": config_text,
        "environment": _environment_rows(run),
        "command": (_json(run / "environment.json") or {}).get("command", ""),
    }


def alarms(
    config_text: str,
    split: Mapping[str, Any] | None,
    findings: Sequence[Mapping[str, str]],
    subject: str,
) -> list[str]:
    """What must stand in red before every number: leakage, transduction, other split levels.

    Args:
        config_text: The run's ``config.yaml``.
        split: The content of ``split.json``.
        findings: The findings of the check and of the split.
        subject: The domain's word for the independent source.

    Returns:
        Sentences; empty for a sound split by subject.
    """
    config = YAML(typ="safe", pure=True).load(config_text) or {}
    section = config.get("split", {})
    said = []
    if section.get("allow_leakage"):
        overlaps = [f for f in findings if f["code"] == "split.overlap"]
        shown = "; ".join(f"{f['where']}: {f['found']}" for f in overlaps[:3])
        said.append(
            f"Leakage was allowed (split.allow_leakage) and parts overlap ({shown}). "
            "These numbers are too good and say nothing about new data."
            if overlaps
            else "Leakage was allowed (split.allow_leakage), though no overlap was found."
        )
    if section.get("transductive"):
        said.append(
            f"Transductive: label-free stages were permitted to see test {subject}s "
            f"(split.transductive). A new {subject} is not served this well."
        )
    # a split without a test part only chooses an epoch
    parts = (split or {"splits": {}})["splits"].values()
    levels = {part["disjoint_by"] for part in parts if part["test"]}
    words = {
        "session": f"sessions: other sessions of the test {subject}s were trained on",
        "recording": f"recordings: other recordings of the test {subject}s were trained on",
        "item": f"single items: other items of the test {subject}s were trained on",
        "time": f"time: training saw earlier data of the same {subject}s, and data of other "
        f"{subject}s from after a test event",
    }
    said += [
        f"Split by {words[level]}. Nothing here is measured on a new {subject}."
        for level in words
        if level in levels
    ]
    return said


def said_apart(sentence: str) -> tuple[str, str]:
    """The verdict's sentence without its last words, and those: "better", "unanchored: ..."."""
    head, sign, tail = sentence.rpartition("; unanchored: ")
    if sign:
        return head, f"unanchored: {tail}"
    head, sign, tail = sentence.rpartition(": ")
    return (head, tail) if "; difference" in head else (sentence, "")


def without_paths(text: str) -> str:
    """A text whose absolute paths have become the word PATH."""
    return _LOCAL_PATH.sub("PATH", text)


def worst_units(evaluation: Path) -> dict[str, Any] | None:
    """The first rows of the table that a pipeline wrote as ``worst``: errors worth looking at.

    Args:
        evaluation: The evaluation folder.

    Returns:
        Columns and formatted rows, or None where there is no such table.
    """
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".csv": pl.read_csv,
        ".json": pl.read_json,
    }
    file = next((f for s in readers if (f := evaluation / f"worst{s}").is_file()), None)
    if file is None:
        return None
    table = readers[file.suffix](file)
    rows = [[_shown(value) for value in row] for row in table.head(WORST_ROWS).iter_rows()]
    return {"columns": table.columns, "rows": rows, "total": table.height}


def _shown(value: object) -> str:
    if value is None:
        return views.DASH
    return views.typeset(f"{value:.3g}") if isinstance(value, float) else str(value)


def _picture(folder: Path, entry: Mapping[str, str]) -> dict[str, Any]:
    file = folder / entry["file"]
    content = file.read_bytes()
    source = f"data:{_TYPES[file.suffix]};base64,{base64.b64encode(content).decode()}"
    return {**entry, "source": source}


def _drop_largest_picture(context: dict[str, Any]) -> bool:
    shown = [*context["pictures"], *context["worst_pictures"]]
    if not shown:
        return False
    largest = max(shown, key=lambda picture: len(picture["source"]))
    for key in ("pictures", "worst_pictures"):
        context[key] = [picture for picture in context[key] if picture is not largest]
    context["left_out"].append(largest)
    return True


def _data(run: Path) -> list[tuple[str, str]]:
    manifest = _json(run / "manifest.json")
    rows: list[tuple[str, str]] = []
    if manifest:
        sources = manifest["sources"]
        rows += [
            ("source files", f"{len(sources):,}"),
            ("size", views.size(sum(source["size"] for source in sources))),
        ]
        if all("rows" in source for source in sources):
            rows.append(("rows of the index", f"{sum(source['rows'] for source in sources):,}"))
        if "digest" in manifest:
            rows.append(("digest", manifest["digest"]))
    fit = next(iter(sorted((run / "fits").rglob("fit.json"))), None)
    facts = json.loads(fit.read_text(encoding="utf-8")).get("facts", {}) if fit else {}
    for key, value in facts.items():
        rows.append((key, without_paths(_fact(value))))
    return rows


def _fact(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        text = ", ".join(str(item) for item in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


def _environment_rows(run: Path) -> list[tuple[str, str]]:
    stored = _json(run / "environment.json") or {}
    rows = []
    for key, value in stored.items():
        if isinstance(value, Mapping):
            rows += [(name, str(version)) for name, version in value.items()]
        elif key != "command" and value is not None:
            rows.append((key, without_paths(str(value))))
    return rows


def _findings(file: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = (_json(file) or {"findings": []})["findings"]
    return found


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return stored


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
