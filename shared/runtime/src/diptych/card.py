"""``model_card.md``: what a model is, how well it does, and what it must not be used for."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from diptych.contract import Metric, Pipeline
from diptych.files import write_text
from diptych.results import (
    interval,
    metric_decimals,
    metric_of,
    number,
    read_results,
    verdict,
)


def model_card(run: Path, pipeline: Pipeline, *, target: Path | None = None) -> Path:
    """Write the model card of an evaluated run, with the metadata header of Hugging Face.

    Args:
        run: A run folder with an evaluation.
        pipeline: Gives the title and the metrics.
        target: The file, default ``RUN/model_card.md``.

    Returns:
        The file.

    Raises:
        DataError: If the run was not evaluated, or its results are damaged.
    """
    target = target or run / "model_card.md"
    results = read_results(run / "evaluation")
    identity = _json(run / "run.json")
    version = identity.get("version", "")
    parts = [
        _header(results, pipeline),
        f"# {results['pipeline']}: {pipeline.title}",
        f"{verdict(results, pipeline.metrics)}.",
        _measured(results, pipeline.metrics),
        _notes(results["notes"]),
        _training(run, results, version),
        _use(results["pipeline"]),
        _limits(results),
    ]
    write_text(target, "\n\n".join(part for part in parts if part) + "\n")
    return target


def _header(results: Mapping[str, Any], pipeline: Pipeline) -> str:
    scores = results["methods"].get(results["pipeline"], {})
    values = [
        {
            "type": name,
            "name": metric_of(pipeline.metrics, name).title,
            "value": round(score["value"], 6),
        }
        for name, score in scores.items()
        if score["value"] is not None
    ]
    header: dict[str, Any] = {
        "library_name": "diptych",
        "tags": ["diptych", results["pipeline"], "contrastive-learning"],
    }
    if values:
        data = {"type": "private", "name": f"{results['n_subjects']} {results['subject']}s"}
        task = {"type": "other", "name": pipeline.title}
        result = {"task": task, "dataset": data, "metrics": values}
        header["model-index"] = [{"name": results["pipeline"], "results": [result]}]
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(header, stream)
    return f"---\n{stream.getvalue()}---"


def _measured(results: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str:
    names = list(dict.fromkeys(name for scores in results["methods"].values() for name in scores))
    titles = [
        f"{metric.title} ({metric.unit})" if metric.unit else metric.title
        for metric in (metric_of(metrics, name) for name in names)
    ]
    lines = [f"| method | {' | '.join(titles)} |", "|---" + "|---:" * len(names) + "|"]
    for method, scores in results["methods"].items():
        cells = [_cell(scores.get(name), name, results, metrics) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    subjects = f"{results['n_subjects']} {results['subject']}s"
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    return (
        "## Results\n\n"
        + "\n".join(lines)
        + f"\n\nProtocol {results['protocol']}, {subjects}, seeds {seeds}; in brackets the 95 % "
        f"bootstrap interval over {results['subject']}s. Every method was scored on the same "
        "splits."
    )


def _cell(
    score: Mapping[str, Any] | None,
    name: str,
    results: Mapping[str, Any],
    metrics: Mapping[str, Metric],
) -> str:
    if score is None:
        return ""
    metric = metric_of(metrics, name)
    digits = metric_decimals(results, name, metric)
    return f"{number(score['value'], metric, digits)} {interval(score, metric, digits)}".rstrip()


def _notes(notes: list[str]) -> str:
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _training(run: Path, results: Mapping[str, Any], version: str) -> str:
    manifest = _json(run / "manifest.json")
    environment = _json(run / "environment.json")
    lines = []
    if manifest:
        files = len(manifest["sources"])
        plural = "" if files == 1 else "s"
        lines.append(f"- {files} source file{plural}, known by SHA-256 alone")
    if environment.get("command"):
        lines.append(f"- command: `{environment['command']}`")
    if version:
        lines.append(f"- diptych-{results['pipeline']} {version}")
    torch = environment.get("packages", {}).get("torch")
    if torch:
        lines.append(f"- torch {torch}")
    lines.append("- the whole configuration: `config.yaml` in the run folder")
    return "## Training\n\n" + "\n".join(lines)


def _use(name: str) -> str:
    return (
        "## Use\n\n```\n"
        f"pip install diptych-{name}\n"
        f"diptych {name} predict RUN INPUT --out OUT\n"
        "```"
    )


def _limits(results: Mapping[str, Any]) -> str:
    subject = results["subject"]
    return (
        "## Limits and intended use\n\n"
        "Research software, not a medical device: its output must not guide the diagnosis or "
        f"treatment of anyone. The figures describe {results['n_subjects']} {subject}s under the "
        f"protocol above; a group's average says nothing about one {subject}, and other devices, "
        "sites or populations need their own evaluation."
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return stored
