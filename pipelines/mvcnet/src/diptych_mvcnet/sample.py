"""The embedded sample: simulated motor imagery with known sources and a known best accuracy.

Two sensorimotor rhythms seen through a spherical head model, weakened on the side opposite to the
imagined hand, beside visual alpha and frontal theta that carry no class information, in 1/f noise.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import norm

from diptych_mvcnet.montage import standard_montage

CHANNELS = (
    *("FC5", "FC3", "FC1", "FCz", "FC2", "FC4", "FC6"),
    *("C5", "C3", "C1", "Cz", "C2", "C4", "C6"),
    *("CP5", "CP3", "CP1", "CPz", "CP2", "CP4", "CP6"),
)
SOURCES = ("C3", "C4", "POz", "Fz")
CLASSES = ("left_hand", "right_hand")
SFREQ = 100.0
TRIAL_S = 3.0
GAP_S = 1.0
MARGIN_S = 2.0
_AMPLITUDE_UV = 10.0


@dataclass(frozen=True)
class Sample:
    """Simulated trials and the truth behind them.

    Args:
        x: Trials in microvolt, not filtered.
        y: 0 for left hand, 1 for right hand.
        subject: Number of the subject of each trial, from 1.
        session: Number of the session of each trial, from 1.
        ch_names: Names of the channels.
        sfreq: Sampling rate in hertz.
        mixing: Potentials of the sources under C3, C4, POz and Fz, largest absolute value 1.
        erd: Desynchronisation of each subject: the part of the amplitude that is lost, in (0, 1).
        amplitudes: Amplitudes of the left and right rhythm of each trial.
        bayes_accuracy: Accuracy of the best decision that knows the amplitudes, in [0, 1].
    """

    x: Float[np.ndarray, "n 21 t"]
    y: Int[np.ndarray, " n"]
    subject: Int[np.ndarray, " n"]
    session: Int[np.ndarray, " n"]
    ch_names: tuple[str, ...]
    sfreq: float
    mixing: Float[np.ndarray, "21 4"]
    erd: Float[np.ndarray, " s"]
    amplitudes: Float[np.ndarray, "n 2"]
    bayes_accuracy: float


@dataclass(frozen=True)
class _Subject:
    """What stays the same over a subject's sessions."""

    mu: float
    beta: float
    erd: float
    mixing: np.ndarray


@dataclass(frozen=True)
class _Session:
    """One continuous recording: signal in microvolt, onsets in samples, classes, amplitudes."""

    signal: np.ndarray
    onset: np.ndarray
    y: np.ndarray
    amplitudes: np.ndarray


def generate_sample(
    seed: int = 0,
    n_subjects: int = 6,
    n_sessions: int = 2,
    n_per_session: int = 24,
    *,
    erd: float = 0.45,
    snr: float = 0.7,
    amp_sd: float = 0.25,
) -> Sample:
    """Simulated left- and right-hand imagery on 21 channels, 3 s at 100 Hz.

    Every draw is keyed by seed, subject and session: more subjects or sessions leave the others
    as they were.

    Args:
        seed: Key of every draw.
        n_subjects: Number of subjects.
        n_sessions: Sessions of each subject.
        n_per_session: Trials of a session, half of each class (the odd one is left hand).
        erd: Mean part of the contralateral amplitude that is lost, in (0, 1).
        snr: Amplitude of the sources against the pink noise.
        amp_sd: Standard deviation of the log amplitudes over trials.

    Returns:
        The trials in recording order, with their truth.

    Example:
        >>> generate_sample(n_subjects=1, n_per_session=4).x.shape
        (8, 21, 300)
    """
    sources = lead_field()
    length = round(TRIAL_S * SFREQ)
    trials: list[tuple[np.ndarray, int, int, int, np.ndarray]] = []
    lost = np.empty(n_subjects)
    for subject in range(1, n_subjects + 1):
        traits = _draw_subject(seed, subject, erd)
        lost[subject - 1] = traits.erd
        for session in range(1, n_sessions + 1):
            recording = _record(
                sources, traits, seed, subject, session, n_per_session, snr=snr, amp_sd=amp_sd
            )
            trials += [
                (recording.signal[:, onset : onset + length], int(y), subject, session, amplitudes)
                for onset, y, amplitudes in zip(
                    recording.onset, recording.y, recording.amplitudes, strict=True
                )
            ]
    x, y, subjects, sessions, amplitudes = zip(*trials, strict=True)
    return Sample(
        x=np.stack(x).astype(np.float32),
        y=np.array(y),
        subject=np.array(subjects),
        session=np.array(sessions),
        ch_names=CHANNELS,
        sfreq=SFREQ,
        mixing=sources,
        erd=lost,
        amplitudes=np.stack(amplitudes),
        bayes_accuracy=float(np.mean(_bayes_accuracy(lost, amp_sd))),
    )


def write_sample(folder: Path, seed: int = 0, *, n_subjects: int = 6) -> None:
    """Writes the sample as one continuous recording a session, and its truth beside it.

    Args:
        folder: Gets ``sub-XX_ses-Y_raw.fif`` (annotations ``left_hand`` and ``right_hand`` at the
            cues, 3 s long, 1 s apart) and ``truth.json``.
        seed: Key of every draw.
        n_subjects: Number of subjects.
    """
    import mne

    folder.mkdir(parents=True, exist_ok=True)
    sources = lead_field()
    info = mne.create_info(list(CHANNELS), SFREQ, "eeg")
    lost = []
    for subject in range(1, n_subjects + 1):
        traits = _draw_subject(seed, subject, 0.45)
        lost.append(traits.erd)
        for session in (1, 2):
            recording = _record(sources, traits, seed, subject, session, 24, snr=0.7, amp_sd=0.25)
            raw = mne.io.RawArray(recording.signal * 1e-6, info, verbose="error")
            raw.set_annotations(
                mne.Annotations(
                    recording.onset / SFREQ, TRIAL_S, [CLASSES[label] for label in recording.y]
                )
            )
            name = f"sub-{subject:02d}_ses-{session}_raw.fif"
            raw.save(folder / name, overwrite=True, verbose="error")
    truth: dict[str, Any] = {
        "bayes_accuracy": float(np.mean(_bayes_accuracy(np.array(lost), 0.25))),
        "ch_names": list(CHANNELS),
        "sources": {name: sources[:, n].round(6).tolist() for n, name in enumerate(SOURCES)},
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")


def lead_field() -> Float[np.ndarray, "21 4"]:
    """Potentials of four radial dipoles on the channels, in a three-shell sphere.

    Returns:
        One column a source under C3, C4, POz and Fz, divided by the largest absolute value.
    """
    import mne

    positions = standard_montage("1020").get_positions()["ch_pos"]
    info = mne.create_info(list(CHANNELS), SFREQ, "eeg")
    info.set_montage(standard_montage("1020"))
    # The dipoles take their direction from the montage's own frame, which lies deeper and farther
    # back than the head frame of the electrodes: sources below the row of C3 and C4.
    direction = np.stack([positions[n] / np.linalg.norm(positions[n]) for n in SOURCES])
    source_space = mne.setup_volume_source_space(
        pos={"rr": 0.075 * direction, "nn": direction}, verbose="error"
    )
    sphere = mne.make_sphere_model((0.0, 0.0, 0.0), 0.095, verbose="error")
    forward = mne.make_forward_solution(
        info, None, source_space, sphere, meg=False, eeg=True, verbose="error"
    )
    gain = forward["sol"]["data"].reshape(len(CHANNELS), len(SOURCES), 3)
    radial = np.einsum("csk,sk->cs", gain, direction)
    return np.asarray(radial / np.abs(radial).max())


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _draw_subject(seed: int, subject: int, erd: float) -> _Subject:
    draw = _generator(seed, subject)
    mu = draw.uniform(9.0, 13.0)
    return _Subject(
        mu=mu,
        beta=2 * mu + draw.uniform(-1.0, 1.0),
        erd=erd * draw.uniform(0.7, 1.2),
        mixing=np.eye(len(CHANNELS)) + 0.10 * draw.standard_normal((len(CHANNELS),) * 2),
    )


def _record(
    sources: np.ndarray,
    traits: _Subject,
    seed: int,
    subject: int,
    session: int,
    n_trials: int,
    *,
    snr: float,
    amp_sd: float,
) -> _Session:
    draw = _generator(seed, subject, session)
    length = round(TRIAL_S * SFREQ)
    step = length + round(GAP_S * SFREQ)
    margin = round(MARGIN_S * SFREQ)
    y = draw.permutation(np.arange(n_trials) % 2)
    amplitudes = np.exp(amp_sd * draw.standard_normal((n_trials, 2)))
    # Imagery weakens the rhythm of the opposite side: column 1 (right) for the left hand.
    amplitudes[np.arange(n_trials), 1 - y] *= 1 - traits.erd
    mixing = traits.mixing + 0.05 * draw.standard_normal(traits.mixing.shape)
    onset = margin + step * np.arange(n_trials)
    total = 2 * margin + step * n_trials
    signal = _pink_noise(draw, len(CHANNELS), total)
    signal += 0.1 * draw.standard_normal(signal.shape)
    for start, (left, right) in zip(onset, amplitudes, strict=True):
        rhythms = [
            _rhythm(draw, traits.mu, 1.0, length) + 0.5 * _rhythm(draw, traits.beta, 2.0, length)
            for _ in range(2)
        ]
        alpha = 1.2 * _rhythm(draw, 10.0, 1.0, length)
        theta = 0.5 * _rhythm(draw, 6.0, 1.5, length)
        activity = np.stack([left * rhythms[0], right * rhythms[1], alpha, theta])
        signal[:, start : start + length] += snr * mixing @ sources @ activity
    return _Session(_AMPLITUDE_UV * signal, onset, y, amplitudes)


def _rhythm(draw: np.random.Generator, centre: float, width: float, length: int) -> np.ndarray:
    """Noise of unit variance with a Gaussian amplitude spectrum, centre and width in hertz."""
    frequency = np.fft.rfftfreq(length, 1 / SFREQ)
    phases = np.exp(2j * np.pi * draw.uniform(size=frequency.size))
    spectrum = np.exp(-0.5 * ((frequency - centre) / width) ** 2) * phases
    spectrum[0] = 0.0
    noise = np.fft.irfft(spectrum, length)
    return np.asarray(noise / noise.std())


def _pink_noise(draw: np.random.Generator, n_channels: int, length: int) -> np.ndarray:
    """Noise of unit variance with power 1/f above one cycle a trial, channel by channel."""
    frequency = np.fft.rfftfreq(length, 1 / SFREQ)
    shape = np.zeros_like(frequency)
    # Slower drifts would take a share of the unit variance that grows with the recording.
    audible = frequency >= 1 / TRIAL_S
    shape[audible] = frequency[audible] ** -0.5
    real, imaginary = draw.standard_normal((2, n_channels, frequency.size))
    noise = np.fft.irfft(shape * (real + 1j * imaginary), length)
    return np.asarray(noise / noise.std(axis=1, keepdims=True))


def _bayes_accuracy(erd: np.ndarray, amp_sd: float) -> np.ndarray:
    """Phi(-ln(1 - e) / (sd sqrt 2)), for the log ratio of the amplitudes has variance 2 sd^2."""
    return np.asarray(norm.cdf(-np.log1p(-erd) / (amp_sd * math.sqrt(2))))
