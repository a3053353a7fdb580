"""From a recording to trials: one function for training and for prediction.

Channels, filters, resampling, cutting and rejection happen here and nowhere else, so that a model
predicts on exactly what it was trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from diptych.findings import Finding
from diptych_mvcnet.config import EEGDataSection, MVCNetConfig
from diptych_mvcnet.filters import filter_recording, margin_s
from diptych_mvcnet.montage import is_electrode, standard_montage
from diptych_mvcnet.recordings import Recording, refuse

MAX_INTERPOLATED = 0.2
ARTEFACT_CODE = "1023"  # GDF: trial marked as contaminated
BOUNDARIES = ("bad boundary", "edge boundary", "edge", "bad_acq_skip", "boundary")
ROWS = {
    "trial": pl.Int64,
    "onset_s": pl.Float64,
    "label": pl.String,
    "y": pl.Int64,
    "rejected": pl.Boolean,
    "reason": pl.String,
}


@dataclass(frozen=True)
class Cues:
    """Marked trials of a continuous recording, in time.

    Args:
        sample: Sample of each cue, from the first sample of the recording.
        label: Class of each cue, None where it is not known.
        seen: How often each annotation occurs.
    """

    sample: tuple[int, ...]
    label: tuple[str | None, ...]
    seen: Mapping[str, int]


@dataclass(frozen=True)
class Cut:
    """Trials ready for a model.

    Args:
        x: Microvolt, float32 (N, C, T), filtered and not aligned.
        rows: One row a trial in time: trial (from 0), onset_s (of the cue, or of the window's
            start where there are no cues), label, y, rejected, reason ("", "bad_span", "edge",
            "peak", "flat"); for trials cut before also subject, session, run where given.
        ch_names: Names along the channel axis.
        sfreq: Hz.
        interpolated: Channels that were filled in.
        findings: What was left out and why.
    """

    x: Float[np.ndarray, "n c t"]
    rows: pl.DataFrame
    ch_names: tuple[str, ...]
    sfreq: float
    interpolated: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def cut_epochs(
    recording: Recording,
    config: MVCNetConfig,
    *,
    labelled: bool = True,
    channels: Sequence[str] | None = None,
    sfreq: float | None = None,
) -> Cut:
    """The trials of a recording, prepared as the configuration says.

    Args:
        recording: From ``read_recording``, with its samples in memory.
        config: The configuration; its section ``data`` is used.
        labelled: Whether trials are those of the configured classes. If not, ``data.cues`` mark
            them; without cues windows follow each other every ``data.window_step_s``.
        channels: Channels in the order of the model; None means ``data.channels`` or all
            electrodes of the recording.
        sfreq: Rate of the result, Hz; None means ``data.resample_hz`` or the recording's own.

    Returns:
        All trials that lie inside the recording; unusable ones are marked as rejected.

    Raises:
        DataError: A channel is missing and must not be filled in, or the rate is too low.

    Example:
        >>> cut_epochs(read_recording(path), MVCNetConfig()).x.shape  # doctest: +SKIP
        (15, 21, 300)
    """
    section = config.data
    wanted = tuple(channels or section.channels or electrodes_of(recording))
    rate = sfreq or section.resample_hz or recording.sfreq
    if rate > recording.sfreq:
        raise refuse(
            "sfreq.differs",
            recording.name,
            f"{recording.sfreq:g} Hz, {rate:g} Hz are wanted",
            f"--set data.resample_hz={recording.sfreq:g}, or leave the recording out",
        )
    missing = missing_channels(recording, wanted, section)
    if recording.epochs is not None:
        return _cut_given(recording, section, wanted, missing, rate, labelled)
    signal = _signal(recording, wanted, missing)
    cues = _cues_of(recording, section, labelled)
    rows, starts = place_trials(recording, config, cues, rate)
    filtered = filter_recording(
        signal, recording.sfreq, section.filter, None if rate == recording.sfreq else rate
    )
    length = samples_of(section, rate)
    inside = starts + length <= filtered.shape[1]
    rows, starts = rows.filter(pl.Series(inside)), starts[inside]
    x = filtered[:, starts[:, None] + np.arange(length)].transpose(1, 0, 2).astype(np.float32)
    return _marked(x, rows, wanted, rate, missing, section, recording.name)


def electrodes_of(recording: Recording) -> tuple[str, ...]:
    """The recording's EEG channels that are electrodes of the 10-05 system, in its order.

    Raises:
        DataError: There is none.
    """
    found = tuple(name for name in recording.ch_names if is_electrode(name))
    if not found:
        raise refuse(
            "channel.none",
            recording.name,
            f"no known electrode among {', '.join(recording.ch_names[:8]) or 'no EEG channels'}",
            "list the channels to use in data.channels, or give their electrodes in data.rename",
        )
    return found


def missing_channels(
    recording: Recording, wanted: Sequence[str], section: EEGDataSection
) -> tuple[str, ...]:
    """Wanted channels that the recording lacks, if they may be filled in.

    Raises:
        DataError: They may not.
    """
    present = set(recording.ch_names if recording.raw is None else recording.raw.ch_names)
    missing = tuple(name for name in wanted if name not in present)
    few = len(missing) <= MAX_INTERPOLATED * len(wanted)
    known = all(is_electrode(name) for name in wanted)
    if missing and not (section.interpolate and few and known):
        fix = (
            f"at most {MAX_INTERPOLATED:.0%} of the channels are filled in, electrodes only: "
            "name those that all recordings have in data.channels"
            if section.interpolate
            else "name the channels that all recordings have in data.channels, "
            "or --set data.interpolate=true"
        )
        found = f"{', '.join(missing)} not in this recording"
        raise refuse("channel.missing", recording.name, found, fix)
    return missing


def find_cues(recording: Recording, codes: Mapping[str, Sequence[str]]) -> Cues:
    """Marked trials of a continuous recording.

    Annotations match a code as they are, without blanks, or by their last part ("S  1" and
    "Stimulus/S  1" both match "S1"). A recording without annotations is searched for the pulses
    of its trigger channel, whose values are the codes.

    Args:
        recording: A continuous recording.
        codes: Class name -> annotations that mark its trials.

    Returns:
        Cues in time.
    """
    import mne

    raw = recording.raw
    class_of = {_key(code): label for label, texts in codes.items() for code in texts}
    marks: list[tuple[int, str]] = []
    if len(raw.annotations):
        events, numbers = mne.events_from_annotations(raw, event_id=None, verbose="error")
        text_of = {number: text for text, number in numbers.items()}
        marks = [(int(sample), text_of[number]) for sample, _, number in events]
    elif "stim" in raw.get_channel_types():
        events = mne.find_events(
            raw, shortest_event=1, mask=0xFFFF, mask_type="and", verbose="error"
        )
        marks = [(int(sample), str(number)) for sample, _, number in events]
    found = [(sample - raw.first_samp, _lookup(text, class_of)) for sample, text in marks]
    cues = sorted((sample, label) for sample, label in found if label is not None)
    return Cues(
        tuple(sample for sample, _ in cues),
        tuple(label or None for _, label in cues),
        Counter(text for _, text in marks),
    )


def _key(text: str) -> str:
    return "".join(text.split())


def _lookup(text: str, class_of: Mapping[str, str]) -> str | None:
    return class_of.get(_key(text), class_of.get(_key(text.rpartition("/")[2])))


def classes_of_labels(labels: Sequence[str], section: EEGDataSection) -> list[str | None]:
    """The class of each trial that was cut before.

    A label is an annotation of ``data.events``, the name of a class, or, where all labels are
    numbers from 0 to K-1, the position of a class in ``data.classes``.

    Args:
        labels: As the file has them.
        section: Section ``data``.

    Returns:
        Class names, None for labels of no configured class.
    """
    class_of = {name: name for name in section.classes}
    class_of |= {_key(code): name for name in section.classes for code in section.events[name]}
    numbers = {str(number): name for number, name in enumerate(section.classes)}
    if set(labels) <= numbers.keys() and not set(labels) & class_of.keys():
        class_of = numbers
    return [_lookup(label, class_of) for label in labels]


def samples_of(section: EEGDataSection, sfreq: float) -> int:
    """Samples of a trial: round((end - start) * sfreq), one more where both ends are kept."""
    start, end = section.window
    return round((end - start) * sfreq) + int(section.window_closed)


def place_trials(
    recording: Recording, config: MVCNetConfig, cues: Cues | None, sfreq: float
) -> tuple[pl.DataFrame, np.ndarray]:
    """Where the trials of a continuous recording lie, before anything is filtered.

    Args:
        recording: A continuous recording.
        config: The configuration.
        cues: Marked trials; None means windows one after the other.
        sfreq: Rate of the trials, Hz.

    Returns:
        One row a trial inside the recording, as in :class:`Cut`, and the trials' first samples
        at ``sfreq``.
    """
    section = config.data
    total = round(recording.raw.n_times * sfreq / recording.sfreq)
    length = samples_of(section, sfreq)
    if cues is None:
        step = max(1, round((section.window_step_s or length / sfreq) * sfreq))
        starts = np.arange(0, max(total - length + 1, 0), step)
        onset = starts / sfreq
        labels: list[str | None] = [None] * len(starts)
    else:
        onset = np.array(cues.sample, dtype=np.float64) / recording.sfreq
        starts = np.rint(onset * sfreq).astype(int) + round(section.window[0] * sfreq)
        labels = list(cues.label)
    inside = (starts >= 0) & (starts + length <= total)
    place = {name: number for number, name in enumerate(section.classes)}
    reason = _reasons(recording, section, starts / sfreq, (starts + length) / sfreq, onset)
    rows = pl.DataFrame(
        {
            "trial": np.arange(len(starts)),
            "onset_s": onset,
            "label": labels,
            "y": [place.get(label) if label is not None else None for label in labels],
            "rejected": [bool(why) for why in reason],
            "reason": reason,
        },
        schema=ROWS,
    )
    return rows.filter(pl.Series(inside)), starts[inside]


def _reasons(
    recording: Recording,
    section: EEGDataSection,
    start: np.ndarray,
    end: np.ndarray,
    onset: np.ndarray,
) -> list[str]:
    raw = recording.raw
    margin = margin_s(raw.n_times, recording.sfreq, section.filter)
    length = raw.n_times / recording.sfreq
    spans, borders = [], []
    for begin, duration, text in zip(
        raw.annotations.onset - raw.first_time,
        raw.annotations.duration,
        raw.annotations.description,
        strict=True,
    ):
        if str(text).lower() in BOUNDARIES:
            borders += [begin, begin + duration]
        elif _key(str(text)) == ARTEFACT_CODE and duration == 0:
            # Without a duration the mark stands at the start of its trial, before the cue.
            later = onset[onset >= begin]
            spans.append((begin, later[0] + section.window[1] if later.size else length))
        elif str(text).lower().startswith("bad") or _key(str(text)) == ARTEFACT_CODE:
            spans.append((begin, begin + duration))
    bad = np.zeros(start.size, dtype=bool)
    near = (start < margin - 1e-9) | (end > length - margin + 1e-9)
    for begin, finish in spans:
        bad |= (begin < end) & (finish >= start)
    for border in borders:
        near |= (start - margin < border) & (border < end + margin)
    return [
        "bad_span" if is_bad else "edge" if is_near else ""
        for is_bad, is_near in zip(bad, near, strict=True)
    ]


def _cues_of(recording: Recording, section: EEGDataSection, labelled: bool) -> Cues | None:
    if labelled:
        return find_cues(recording, {name: section.events[name] for name in section.classes})
    return find_cues(recording, {"": section.cues}) if section.cues else None


def _signal(
    recording: Recording, wanted: tuple[str, ...], missing: tuple[str, ...]
) -> Float[np.ndarray, "c t"]:
    present = tuple(name for name in wanted if name not in missing)
    return _filled(recording.signal(present), present, wanted, recording.sfreq)


def _filled(
    signal: np.ndarray, present: Sequence[str], wanted: Sequence[str], sfreq: float
) -> np.ndarray:
    """Spherical splines for the channels that are not there (Perrin et al. 1989)."""
    if len(present) == len(wanted):
        return signal
    import mne

    complete = np.zeros((len(wanted), signal.shape[1]))
    complete[[wanted.index(name) for name in present]] = signal
    info = mne.create_info(list(wanted), sfreq, "eeg", verbose="error")
    raw = mne.io.RawArray(complete, info, verbose="error")
    raw.set_montage(standard_montage("1005"), match_case=False, verbose="error")
    raw.info["bads"] = [name for name in wanted if name not in present]
    return np.asarray(raw.interpolate_bads(verbose="error").get_data())


def _cut_given(
    recording: Recording,
    section: EEGDataSection,
    wanted: tuple[str, ...],
    missing: tuple[str, ...],
    rate: float,
    labelled: bool,
) -> Cut:
    rows, kept = place_given(recording, section, labelled)
    present = [name for name in wanted if name not in missing]
    assert recording.epochs is not None
    x = recording.epochs.x[kept][:, [recording.ch_names.index(name) for name in present]]
    if missing:
        flat = x.transpose(1, 0, 2).reshape(len(present), -1)
        filled = _filled(flat, present, wanted, recording.sfreq)
        x = filled.reshape(len(wanted), len(kept), -1).transpose(1, 0, 2)
    if rate != recording.sfreq and len(kept):
        import mne

        x = mne.filter.resample(x, up=rate, down=recording.sfreq, npad="auto", verbose="error")
    return _marked(x.astype(np.float32), rows, wanted, rate, missing, section, recording.name)


def place_given(
    recording: Recording, section: EEGDataSection, labelled: bool = True
) -> tuple[pl.DataFrame, np.ndarray]:
    """The trials of a file that was cut before.

    Args:
        recording: A recording with ``epochs``.
        section: Section ``data``.
        labelled: Whether only trials of the configured classes count.

    Returns:
        One row a trial, as in :class:`Cut`, and the trials' places in the file.
    """
    given = recording.epochs
    assert given is not None
    count = given.x.shape[0]
    labels = classes_of_labels(given.label, section) if given.label else [None] * count
    place = {name: number for number, name in enumerate(section.classes)}
    rows = pl.DataFrame(
        {
            "onset_s": given.onset_s or [None] * count,
            "label": labels,
            "y": [place.get(label) if label is not None else None for label in labels],
            "rejected": [False] * count,
            "reason": [""] * count,
        },
        schema={name: kind for name, kind in ROWS.items() if name != "trial"},
    )
    own = {"subject": given.subject, "session": given.session, "run": given.run}
    named = {key: list(values) for key, values in own.items() if values}
    rows = rows.with_columns(pl.Series(key, values) for key, values in named.items())
    kept = np.arange(count)
    if labelled:
        kept = np.flatnonzero([label is not None for label in labels])
        rows = rows.filter(pl.col("label").is_not_null())
    number = pl.int_range(pl.len(), dtype=pl.Int64).over(list(named)) if named else None
    rows = rows.with_columns(trial=number) if named else rows.with_row_index("trial")
    return rows.with_columns(pl.col("trial").cast(pl.Int64)), kept


def _marked(
    x: np.ndarray,
    rows: pl.DataFrame,
    wanted: tuple[str, ...],
    sfreq: float,
    missing: tuple[str, ...],
    section: EEGDataSection,
    name: str,
) -> Cut:
    """The trials with those marked that are too large or flat."""
    reason = np.array(rows["reason"].to_list(), dtype=object)
    if len(x):
        if section.reject.peak_uv is not None:
            large = (np.ptp(x, axis=2) > section.reject.peak_uv).any(axis=1)
            reason[(reason == "") & large] = "peak"
        flat = x.std(axis=2) < (section.reject.flat_uv or 0.0)
        # A channel that is flat throughout is the finding channel.flat, not the end of all trials.
        dead = flat.mean(axis=0) > 0.5
        reason[(reason == "") & ((flat & ~dead).any(axis=1) | flat.all(axis=1))] = "flat"
    rows = rows.with_columns(
        pl.Series("reason", reason.tolist(), dtype=pl.String),
        pl.Series("rejected", [bool(why) for why in reason], dtype=pl.Boolean),
    )
    counts = Counter(why for why in reason if why)
    findings = [
        Finding(
            "note",
            "trials.rejected",
            name,
            ", ".join(f"{count} {why}" for why, count in sorted(counts.items())),
            "these trials are in no part of a split; data.reject sets the limits",
        )
    ]
    return Cut(x, rows, wanted, float(sfreq), missing, tuple(findings if counts else ()))
