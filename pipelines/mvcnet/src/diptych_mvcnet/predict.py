"""A new recording or a folder of them -> class probabilities of every trial, and the export."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.contract import Exportable, Facts, Trained
from diptych.errors import DataError, UsageError
from diptych.files import write_atomically
from diptych.findings import Finding, Findings
from diptych.progress import progress
from diptych_mvcnet.align import (
    References,
    align_test,
    alignment_of,
    apply_alignment,
    mean_covariance,
    online_alignment,
    prior_reference,
)
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.epochs import Cut, cut_epochs, find_cues
from diptych_mvcnet.evaluate import ALIGNMENT, probabilities
from diptych_mvcnet.layout import excluded
from diptych_mvcnet.parts import for_strangers
from diptych_mvcnet.read import SUPPORTED_SUFFIXES, format_of, read_recording
from diptych_mvcnet.recordings import Recording, refuse
from diptych_mvcnet.task import MODEL

if TYPE_CHECKING:
    from diptych.prepared import Prepared

WARMUP_TRIALS = 5
# Findings about a recording that are differences to the model here, and their remedies.
MISMATCHES = {
    "channel.missing": "--set data.interpolate=true fills in electrodes, at most 20 % of them; "
    "--set 'data.rename={THIS: THAT}' uses channel THIS as THAT",
    "sfreq.differs": "train a model for this rate with data.resample_hz",
}
PHI_FIX = "nothing to do: predictions hold no header; they name the file as it is called"
_EXPORT_BATCH = 4


@dataclass(frozen=True)
class Decoder:
    """A trained model, ready for trials that were cut as its training trials were.

    Args:
        network: With ``decode``.
        facts: What it was trained with.
        config: The run's configuration with ``align.test`` decided.
        references: References of its training sessions.
        subject: The subject whose own model it is, None for the pooled one.
    """

    network: nn.Module
    facts: Facts
    config: MVCNetConfig
    references: References
    subject: str | None

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the probabilities."""
        return list(self.facts["classes"])

    def align(
        self, x: Float[np.ndarray, "n c t"], usable: Bool[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, "n c t"], list[int]]:
        """Align the trials of one recording; nothing is learnt from unusable ones.

        Args:
            x: Trials in the order of recording.
            usable: Which trials may enter the reference.

        Returns:
            Aligned trials, and of how many trials of this recording each reference was made.
        """
        settings = self.config.align
        if settings.test == "online":
            online = online_alignment(self.references, self.subject, "", settings)
            aligned, seen = np.empty_like(x), []
            for place, (trial, learns) in enumerate(zip(x, usable, strict=True)):
                aligned[place] = online.push(trial, update=bool(learns))
                seen.append(online.n_trials)
            return aligned, seen
        if settings.test == "block":
            chosen = x[usable] if usable.any() else x
            reference, count = mean_covariance(chosen)
            block = alignment_of(reference, count, shrinkage=settings.shrinkage)
            return apply_alignment(x, block), [count] * len(x)
        return align_test(x, self.subject, "", self.references, self.config), [0] * len(x)

    def probabilities(self, aligned: Float[np.ndarray, "n c t"]) -> Float[np.ndarray, "n k"]:
        """Class probabilities of aligned trials."""
        return probabilities(self.network, aligned)

    def flags(self, reasons: Sequence[str], seen: Sequence[int], filled: bool) -> list[str]:
        """What should be known before a decision is trusted, words joined by ``;``."""
        online = self.config.align.test == "online"
        return [
            ";".join(
                word
                for word, applies in (
                    (reason, bool(reason)),
                    ("channel_interpolated", filled),
                    ("warmup", online and count < WARMUP_TRIALS),
                )
                if applies
            )
            for reason, count in zip(reasons, seen, strict=True)
        ]


def open_decoder(config: MVCNetConfig, trained: Trained) -> tuple[Decoder, list[Finding]]:
    """The model that ``predict.subject`` names, or the one of all subjects.

    Args:
        config: The run's configuration with the values of this call.
        trained: The run's fits.

    Returns:
        The decoder, and a warning where its accuracy was not measured.

    Raises:
        UsageError: No subject of that name has a model.
    """
    own = [fit.name.removeprefix("final-") for fit in trained.fits if fit.name.startswith("final-")]
    subject = config.predict.subject
    if subject is not None and subject not in own:
        known = f"one of {', '.join(own)}" if own else "this run has one model for all subjects"
        raise UsageError(f"predict.subject={subject}: {known}")
    name = trained.final if subject is None else f"final-{subject}"
    findings = []
    if subject is None and own:
        findings.append(
            Finding(
                "warning",
                "predict.pooled",
                name,
                "the model of all subjects; the protocol measured models of single subjects",
                f"--set predict.subject=NAME uses a subject's own model: {', '.join(own[:3])}",
            )
        )
    decoder = Decoder(
        trained.modules(name)[MODEL],
        trained.facts(name),
        for_strangers(config),
        trained.artifacts(name)[ALIGNMENT],
        subject,
    )
    return decoder, findings


def predict(config: MVCNetConfig, trained: Trained, source: Path, out: Path) -> Findings:
    """Decode every trial of a recording or of all recordings of a folder.

    A recording with the classes' annotations or ``data.cues`` is cut at them, one without into
    windows every ``data.window_step_s``. Every recording is aligned by itself, in its time.

    Args:
        config: The run's configuration with the values of this call.
        trained: The run's fits.
        source: A recording or a folder.
        out: CSV file: recording, trial, onset_s, ``p_<class>``, label, confidence, aligned_with,
            n_seen (trials of the recording in its reference), flag.

    Returns:
        Findings; recordings with errors are left out of the file, which is not written where
        none is left.

    Raises:
        UsageError: There is no recording, or the subject has no model.
    """
    decoder, findings = open_decoder(config, trained)
    tables = []
    for path in progress(_recordings(source, config), "predict"):
        name = _called(path, source)
        try:
            recording = read_recording(path, data=config.data, name=name)
            findings += _heard(recording.findings)
            tables.append(predict_recording(decoder, recording))
        except DataError as error:
            findings += _as_mismatch(error, name)
    if tables:
        stream = io.BytesIO()
        pl.concat(tables).write_csv(stream)
        write_atomically(out, lambda file: file.write(stream.getvalue()))
    return Findings(tuple(findings))


def predict_recording(decoder: Decoder, recording: Recording) -> pl.DataFrame:
    """Decode the trials of one recording.

    Args:
        decoder: From :func:`open_decoder`.
        recording: From ``read_recording``, with its samples in memory.

    Returns:
        The columns of ``pred.csv``.

    Raises:
        DataError: Channels, rate or window differ from the model's.
    """
    cut = _cut(decoder, recording)
    usable = ~cut.rows["rejected"].to_numpy()
    aligned, seen = decoder.align(cut.x, usable)
    proba = decoder.probabilities(aligned) if len(cut.x) else np.zeros((0, len(decoder.classes)))
    filled = bool(cut.interpolated)
    flags = decoder.flags(cut.rows["reason"].to_list(), seen, filled)
    table = cut.rows.select(
        recording=pl.lit(recording.name), trial=pl.col("trial"), onset_s=pl.col("onset_s").round(6)
    )
    return table.with_columns(
        *(pl.Series(f"p_{name}", proba[:, n]) for n, name in enumerate(decoder.classes)),
        pl.Series("label", [decoder.classes[n] for n in proba.argmax(axis=1)], dtype=pl.String),
        pl.Series("confidence", proba.max(axis=1, initial=0.0)),
        pl.lit(decoder.config.align.test).alias("aligned_with"),
        pl.Series("n_seen", seen, dtype=pl.Int64),
        pl.Series("flag", [flag or None for flag in flags], dtype=pl.String),
    )


class ExportedDecoder(nn.Module):
    """Alignment and network as one graph: ``x`` (B, C, T), ``whitener`` (C, C) -> ``logits``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Float[Tensor, "B C T"], whitener: Float[Tensor, "C C"]
    ) -> Float[Tensor, "B K"]:
        """Logits of band-passed trials in microvolt."""
        logits: Tensor = self.network.decode(torch.matmul(whitener, x))  # type: ignore[operator]
        return logits


def export(
    config: MVCNetConfig, trained: Trained, prepared: Prepared | None
) -> Mapping[str, Exportable]:
    """The graph that decodes trials in another program.

    Args:
        config: The run's configuration.
        trained: The run's fits.
        prepared: The run's data, whose first trials check the export; without them noise of
            10 microvolt does.

    Returns:
        One part, ``decoder``. The whitener is the inverse square root of the reference that
        ``diptych_mvcnet.align`` keeps; the identity means no alignment.
    """
    decoder, _ = open_decoder(config, trained)
    facts = decoder.facts
    reference = prior_reference(decoder.references)
    whitener = alignment_of(reference, 0, shrinkage=config.align.shrinkage).whitener
    if prepared is not None:
        x = np.array(prepared.array("epochs")[:_EXPORT_BATCH])
    else:
        shape = (_EXPORT_BATCH, len(facts["ch_names"]), int(facts["n_times"]))
        x = 10 * np.random.default_rng(0).standard_normal(shape)
    graph = Exportable(
        module=ExportedDecoder(decoder.network).eval().cpu(),
        examples={
            "x": torch.from_numpy(x.astype(np.float32)),
            "whitener": torch.from_numpy(whitener.astype(np.float32)),
        },
        outputs=("logits",),
        dynamic_axes={"x": {0: "batch"}},
        tolerance=config.export.tolerance,
    )
    return {"decoder": graph}


def _recordings(source: Path, config: MVCNetConfig) -> list[Path]:
    paths = [source] if source.is_file() else sorted(source.rglob("*"))
    found = {_called(path, source): path for path in paths if path.is_file() and format_of(path)}
    if not found:
        raise UsageError(
            f"{source}: no recording ({', '.join(SUPPORTED_SUFFIXES)}, also as .xz or .gz): "
            "give a file or a folder of them"
        )
    left_out = excluded(found, config.data.exclude)
    if len(left_out) == len(found):
        raise UsageError(f"{source}: data.exclude leaves out every recording: exclude fewer")
    return [path for name, path in found.items() if name not in left_out]


def _called(path: Path, source: Path) -> str:
    """What findings and predictions call a recording."""
    return path.name if source.is_file() else path.relative_to(source).as_posix()


def _cut(decoder: Decoder, recording: Recording) -> Cut:
    section = decoder.config.data
    events = {name: section.events[name] for name in section.classes}
    marked = recording.raw is not None and not section.cues
    labelled = marked and bool(find_cues(recording, events).sample)
    cut = cut_epochs(
        recording,
        decoder.config,
        labelled=labelled,
        channels=decoder.facts["ch_names"],
        sfreq=float(decoder.facts["sfreq"]),
    )
    samples = int(decoder.facts["n_times"])
    if cut.x.shape[2] != samples:
        raise mismatch(
            recording.name,
            f"trials of {cut.x.shape[2]} samples, the model decodes {samples}",
            "cut them as the training trials were",
        )
    broken = cut.rows["trial"].to_numpy()[~np.isfinite(cut.x).all(axis=(1, 2))]
    if len(broken):
        raise refuse(
            "signal.nonfinite",
            recording.name,
            f"values that are not finite in trials {', '.join(map(str, broken[:8]))}",
            "repair or leave out this part of the recording",
        )
    return cut


def mismatch(where: str, found: str, fix: str) -> DataError:
    """The refusal of data that the model was not made for."""
    return refuse("model.mismatch", where, found, fix)


def _heard(findings: Sequence[Finding]) -> list[Finding]:
    """What the reader saw, but for notes."""
    return [
        replace(one, fix=PHI_FIX) if one.code == "header.phi" else one
        for one in findings
        if one.severity != "note"
    ]


def _as_mismatch(error: DataError, name: str) -> list[Finding]:
    """The findings of a refused recording; a difference to the model is called one."""
    found: list[Any] = list(error.findings or ())
    if not found:
        found = [Finding("error", "file.unreadable", name, str(error), "check the file")]
    return [
        replace(one, code="model.mismatch", fix=MISMATCHES[one.code])
        if one.code in MISMATCHES
        else one
        for one in _heard(found)
    ]
