"""The pipeline as the runtime sees it; every room is imported when it is first used."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from diptych.config import Section
from diptych.contract import Metric, Pipeline, Verb, lazy
from diptych_mvcnet.config import CLOSED_FORM_BASELINES, MVCNetConfig


class StreamOptions(Section):
    """What the verb ``stream`` listens to."""

    lsl: str | None = Field(None, description="Name of a Lab Streaming Layer stream.")
    replay: str | None = Field(None, description="Recording that is played as if it were live.")
    step_s: float = Field(0.5, gt=0, description="Seconds between decisions without cues.")
    out: str | None = Field(None, description="CSV file for the decisions; null prints them.")
    seconds: float | None = Field(None, gt=0, description="Stop a live stream after this long.")
    allow_phase_mismatch: bool = Field(
        False, description="Decode with causal filters although training was zero-phase."
    )


METRICS = {
    "accuracy": Metric("Accuracy", "%", "higher", headline=True, margin=0.01),
    "balanced_accuracy": Metric("Balanced accuracy", "%", "higher", margin=0.01),
    "kappa": Metric("Cohen's kappa", "", "higher", margin=0.02),
    "auc": Metric("ROC AUC", "", "higher", margin=0.01),
    "nll": Metric("Negative log-likelihood", "nats", "lower", margin=0.02),
    "ece": Metric("Expected calibration error", "", "lower", margin=0.01),
    "itr": Metric("Information transfer rate", "bit/min", "higher", margin=0.1),
}

PIPELINE = Pipeline(
    name="mvcnet",
    title="Motor-imagery EEG decoding: MVCNet beside CSP, tangent space and plain CNNs",
    subject="participant",
    config=MVCNetConfig,
    metrics=METRICS,
    check=lazy("diptych_mvcnet.check:check"),
    prepare=lazy("diptych_mvcnet.prepare:prepare"),
    plan=lazy("diptych_mvcnet.plan:plan"),
    modules=lazy("diptych_mvcnet.task:modules"),
    build=lazy("diptych_mvcnet.task:build"),
    evaluate=lazy("diptych_mvcnet.evaluate:evaluate"),
    baselines={
        name: partial(lazy("diptych_mvcnet.evaluate:evaluate_baseline"), name)
        for name in CLOSED_FORM_BASELINES
    },
    predict=lazy("diptych_mvcnet.predict:predict"),
    sample=lazy("diptych_mvcnet.sample:write_sample"),
    pictures=lazy("diptych_mvcnet.pictures:pictures"),
    export=lazy("diptych_mvcnet.predict:export"),
    verbs={
        "stream": Verb(
            help="Decode a live stream, or a recording as if it were live.",
            takes="run",
            run=lazy("diptych_mvcnet.stream:stream"),
            options=StreamOptions,
        )
    },
)
