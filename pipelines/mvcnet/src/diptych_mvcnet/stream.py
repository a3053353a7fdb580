"""Decoding while the signal arrives: the same filters, alignment and network as offline."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from jaxtyping import Float

from diptych.contract import Trained
from diptych.errors import UsageError
from diptych.files import write_text
from diptych.findings import Finding, Findings
from diptych_mvcnet.align import alignment_of, apply_alignment, online_alignment, training_reference
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.epochs import find_cues, samples_of
from diptych_mvcnet.filters import CausalFilter
from diptych_mvcnet.predict import Decoder, mismatch, open_decoder
from diptych_mvcnet.read import read_recording
from diptych_mvcnet.recordings import refuse

if TYPE_CHECKING:
    from diptych.api import Run
    from diptych_mvcnet.pipeline import StreamOptions

CHUNK_S = 0.1  # of a replay, and of a pull from a live stream


@dataclass(frozen=True)
class Decision:
    """One decoded window.

    Args:
        onset_s: Time of its cue, or of its first sample without cues, from the first sample.
        label: Most probable class.
        confidence: Its probability.
        probabilities: Of all classes in their order.
        n_seen: Windows of this stream in the alignment's reference.
        flag: Words joined by ``;``: peak, flat, warmup; empty where nothing was odd.
    """

    onset_s: float
    label: str
    confidence: float
    probabilities: tuple[float, ...]
    n_seen: int
    flag: str


class StreamDecoder:
    """A model that takes chunks of any size and decides as soon as a window is complete.

    Filter state, alignment and pending windows are kept between calls; the decisions do not
    depend on the sizes of the chunks and equal those of ``predict`` on the same samples.

    Args:
        run: A run folder, an opened run, or a decoder from ``open_decoder``.
        step_s: Seconds between windows where no cue is given.
        allow_phase_mismatch: Decode although the model was trained on zero-phase filters, which
            no stream can apply.
        sfreq: Rate of the incoming samples, Hz; None is the model's own rate.
        cued: Decide after each cue that ``push`` is told, and not every ``step_s``.

    Raises:
        DataError: The model was trained on zero-phase filters, or faster than the stream.
        UsageError: ``align.test`` needs the whole recording.

    Example:
        >>> decoder = StreamDecoder("runs/a")  # doctest: +SKIP
        >>> decoder.push(np.zeros((21, 50)))  # doctest: +SKIP
        []
    """

    def __init__(
        self,
        run: Path | str | Run | Decoder,
        *,
        step_s: float = 0.5,
        allow_phase_mismatch: bool = False,
        sfreq: float | None = None,
        cued: bool = False,
    ) -> None:
        self.decoder = run if isinstance(run, Decoder) else _opened(run)
        facts, settings = self.decoder.facts, self.decoder.config
        self.sfreq, self.rate = float(sfreq or facts["sfreq"]), float(facts["sfreq"])
        _refuse_unlike(self.decoder, self.sfreq, allow_phase_mismatch)
        resample = None if self.sfreq == self.rate else self.rate
        self._filter = CausalFilter(self.sfreq, settings.data.filter, resample)
        self._length = int(facts["n_times"])
        self._step = max(1, round(step_s * self.rate))
        self._cued = cued
        self._next = 0
        self._waiting: list[tuple[int, float]] = []  # first sample and onset of windows after cues
        self._held = np.empty((len(facts["ch_names"]), 0))
        self._held_from = 0
        self._received = 0
        self._flat = np.zeros(len(facts["ch_names"]), dtype=int)
        self._decided = 0
        self._align = self._aligner()

    def push(self, chunk: Float[np.ndarray, "c t"], cues: Sequence[int] = ()) -> list[Decision]:
        """Take new samples and return the decisions that they complete.

        Args:
            chunk: Microvolt, the model's channels in their order, any number of samples.
            cues: Samples within the chunk at which a cue was given.

        Returns:
            Decisions in time.

        Raises:
            DataError: The number of channels differs from the model's, or a value is not finite.
        """
        chunk = np.asarray(chunk, dtype=np.float64)
        channels = len(self._held)
        if chunk.ndim != 2 or chunk.shape[0] != channels:
            raise mismatch(
                "stream",
                f"a chunk of shape {chunk.shape}",
                f"send ({channels}, samples): {', '.join(self.decoder.facts['ch_names'])}",
            )
        if not np.isfinite(chunk).all():
            raise refuse(
                "signal.nonfinite",
                f"stream, sample {self._received}",
                "a value that is not finite, which would stay in the filters",
                "send numbers only, and start anew after a gap",
            )
        self._queue([self._received + cue for cue in cues])
        self._received += chunk.shape[1]
        self._held = np.concatenate([self._held, self._filter.push(chunk)], axis=1)
        decisions = [self._decide(start, onset) for start, onset in self._complete()]
        self._forget()
        return decisions

    def _queue(self, cues: Sequence[int]) -> None:
        offset = round(self.decoder.config.data.window[0] * self.rate)
        for cue in cues if self._cued else ():
            onset = cue / self.sfreq
            start = int(np.rint(onset * self.rate)) + offset
            if start >= self._held_from:
                self._waiting.append((start, onset))

    def _complete(self) -> Iterator[tuple[int, float]]:
        """Windows whose last sample is there."""
        total = round(self._received * self.rate / self.sfreq)
        end = min(total, self._held_from + self._held.shape[1])
        if not self._cued:
            while self._next + self._length <= end:
                yield self._next, self._next / self.rate
                self._next += self._step
        while self._waiting and self._waiting[0][0] + self._length <= end:
            yield self._waiting.pop(0)

    def _decide(self, start: int, onset: float) -> Decision:
        place = start - self._held_from
        trial = self._held[:, place : place + self._length].astype(np.float32)
        reason = self._reason(trial)
        aligned, seen = self._align(trial, not reason)
        proba = self.decoder.probabilities(aligned[None])[0]
        best = int(proba.argmax())
        return Decision(
            onset_s=onset,
            label=self.decoder.classes[best],
            confidence=float(proba[best]),
            probabilities=tuple(proba.tolist()),
            n_seen=seen,
            flag=self.decoder.flags([reason], [seen], filled=False)[0],
        )

    def _reason(self, trial: Float[np.ndarray, "c t"]) -> str:
        """Why nothing may be learnt from a window; a channel that is mostly flat counts as off."""
        reject = self.decoder.config.data.reject
        flat = trial.std(axis=1) < (reject.flat_uv or 0.0)
        self._decided += 1
        self._flat += flat
        off = self._flat > 0.5 * self._decided
        if reject.peak_uv is not None and (np.ptp(trial, axis=1) > reject.peak_uv).any():
            return "peak"
        return "flat" if flat.all() or (flat & ~off).any() else ""

    def _aligner(self) -> Callable[[np.ndarray, bool], tuple[np.ndarray, int]]:
        """One window and whether it may be learnt from -> the aligned window and n_seen."""
        decoder, settings = self.decoder, self.decoder.config.align
        if settings.test == "online":
            online = online_alignment(decoder.references, decoder.subject, "", settings)
            return lambda trial, learns: (online.push(trial, update=learns), online.n_trials)
        if settings.test == "none":
            return lambda trial, learns: (trial, 0)
        own = training_reference(decoder.references, decoder.subject or "", "")
        if settings.test == "block" or own is None:
            raise UsageError(
                f"align.test={settings.test} cannot be used in a stream of "
                f"{decoder.subject or 'a person never seen'}: use --set align.test=online"
            )
        fixed = alignment_of(own, 0, shrinkage=settings.shrinkage)
        return lambda trial, learns: (apply_alignment(trial, fixed), 0)

    def _forget(self) -> None:
        """Drop samples that no window can need any more."""
        offset = round(self.decoder.config.data.window[0] * self.rate)
        newest = round(self._received * self.rate / self.sfreq)
        needed = min([newest + min(offset, 0), *(start for start, _ in self._waiting)])
        if not self._cued:
            needed = min(needed, self._next)
        drop = min(max(needed - self._held_from, 0), self._held.shape[1])
        self._held = self._held[:, drop:]
        self._held_from += drop


def stream(config: MVCNetConfig, trained: Trained, options: StreamOptions) -> Findings:
    """The verb ``stream``: decode a live stream or a replayed recording, a line a decision.

    Args:
        config: The run's configuration.
        trained: The run's fits.
        options: Where the samples come from and where decisions go.

    Returns:
        Findings about model and recording.

    Raises:
        UsageError: Not exactly one of ``--lsl`` and ``--replay``.
    """
    if (options.lsl is None) == (options.replay is None):
        raise UsageError("stream: give one of --lsl NAME and --replay FILE")
    decoder, findings = open_decoder(config, trained)
    follow = _live if options.replay is None else _replay
    with _writer(options.out) as write:
        return Findings((*findings, *follow(decoder, options, write)))


Writer = Callable[[StreamDecoder, Decision], None]


def _replay(model: Decoder, options: StreamOptions, write: Writer) -> Sequence[Finding]:
    path = Path(str(options.replay))
    if not path.is_file():
        raise UsageError(f"--replay {path}: no such file")
    section = model.config.data
    recording = read_recording(path, data=section)
    if recording.raw is None:
        raise mismatch(path.name, "trials that were cut before", "replay a continuous recording")
    codes = {"": section.cues} if section.cues else {n: section.events[n] for n in section.classes}
    cues = find_cues(recording, codes).sample
    decoder = StreamDecoder(
        model,
        step_s=options.step_s,
        allow_phase_mismatch=options.allow_phase_mismatch,
        sfreq=recording.sfreq,
        cued=bool(cues),
    )
    names = tuple(model.facts["ch_names"])
    missing = [name for name in names if name not in recording.raw.ch_names]
    if missing:
        raise mismatch(path.name, f"no channel {', '.join(missing)}", "record all of the model's")
    signal = recording.signal(names)
    size = max(1, round(CHUNK_S * recording.sfreq))
    for start in range(0, signal.shape[1], size):
        inside = [cue - start for cue in cues if start <= cue < start + size]
        for decision in decoder.push(signal[:, start : start + size], inside):
            write(decoder, decision)
    return recording.findings


def _live(model: Decoder, options: StreamOptions, write: Writer) -> Sequence[Finding]:
    try:
        import pylsl
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"--lsl needs pylsl ({error}): install diptych-mvcnet[stream], or use --replay FILE"
        ) from error
    found = pylsl.resolve_byprop("name", options.lsl, timeout=5.0)
    if not found:
        raise UsageError(f"--lsl {options.lsl}: no stream of this name answered within 5 s")
    inlet = pylsl.StreamInlet(found[0])
    labels = _channel_labels(inlet.info())
    decoder = StreamDecoder(
        model,
        step_s=options.step_s,
        allow_phase_mismatch=options.allow_phase_mismatch,
        sfreq=float(found[0].nominal_srate()),
    )
    names = list(model.facts["ch_names"])
    missing = [name for name in names if name not in labels]
    if missing:
        raise mismatch(
            f"--lsl {options.lsl}",
            f"no channel {', '.join(missing)} among {', '.join(labels)}",
            "name the channels in the stream's description and send microvolt",
        )
    order = [labels.index(name) for name in names]
    begun = time.monotonic()
    while options.seconds is None or time.monotonic() - begun < options.seconds:
        samples, _ = inlet.pull_chunk(timeout=CHUNK_S)
        if samples:
            for decision in decoder.push(np.asarray(samples).T[order]):
                write(decoder, decision)
    return ()


def _channel_labels(info: Any) -> list[str]:
    from diptych_mvcnet.montage import clean_names

    labels, channel = [], info.desc().child("channels").child("channel")
    for _ in range(info.channel_count()):
        labels.append(channel.child_value("label"))
        channel = channel.next_sibling()
    return list(clean_names(labels))


@contextmanager
def _writer(out: str | None) -> Iterator[Writer]:
    """Writes decisions as CSV: to the terminal at once, to a file when the stream has ended."""
    lines: list[list[str]] = []

    def write(decoder: StreamDecoder, decision: Decision) -> None:
        if not lines:
            header = ["onset_s", *(f"p_{name}" for name in decoder.decoder.classes)]
            header += ["label", "confidence", "aligned_with", "n_seen", "flag"]
            lines.append(header)
            _show(sys.stdout if out is None else None, header)
        line = [f"{decision.onset_s:.6f}", *(f"{p:.8f}" for p in decision.probabilities)]
        line += [decision.label, f"{decision.confidence:.8f}", decoder.decoder.config.align.test]
        line += [str(decision.n_seen), decision.flag]
        lines.append(line)
        _show(sys.stdout if out is None else None, line)

    try:
        yield write
    finally:
        if out is not None and lines:
            write_text(Path(out), "".join(",".join(line) + "\n" for line in lines))


def _show(stream: TextIO | None, line: Sequence[str]) -> None:
    if stream is not None:
        csv.writer(stream, lineterminator="\n").writerow(line)
        stream.flush()


def _opened(run: Path | str | Run) -> Decoder:
    from diptych.verbs import open_model
    from diptych_mvcnet.pipeline import PIPELINE

    path = Path(run) if isinstance(run, (str, Path)) else run.path
    trained = open_model(PIPELINE, path, (), section="predict")
    return open_decoder(trained.config, trained)[0]


def _refuse_unlike(decoder: Decoder, sfreq: float, allow_phase_mismatch: bool) -> None:
    phase = decoder.facts["filter"]["phase"]
    if phase != "causal" and not allow_phase_mismatch:
        raise refuse(
            "stream.phase_mismatch",
            "model",
            f"trained on {phase}-phase filters, a stream can only be filtered causally",
            "train with --recipe stream, or accept other features with --allow-phase-mismatch",
        )
    rate = float(decoder.facts["sfreq"])
    if sfreq < rate:
        raise mismatch(
            "stream", f"{sfreq:g} Hz, the model needs {rate:g} Hz", "raise the amplifier's rate"
        )
    samples = samples_of(decoder.config.data, rate)
    if samples != int(decoder.facts["n_times"]):
        raise mismatch(
            "model",
            f"trained on trials of {decoder.facts['n_times']} samples, data.window has {samples}",
            "train on continuous recordings",
        )
