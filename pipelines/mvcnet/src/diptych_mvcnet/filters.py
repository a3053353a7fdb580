"""Band-pass, notch and resampling of a continuous recording, in two forms.

``zero``: linear-phase FIR over the whole recording, the usual offline form. ``causal``: a
Butterworth filter and a polyphase resampler that keep their state, so that a live stream and a
file give the same samples whatever the size of the chunks.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.signal import butter, firwin, iirnotch, sosfilt, sosfilt_zi, tf2sos

from diptych_mvcnet.config import FilterSection

BUTTERWORTH_ORDER = 4
NOTCH_QUALITY = 30.0
KERNEL_ENERGY = 0.9999
_HALF_TAPS = 10  # zero crossings of the resampling kernel on each side, as in scipy's resample_poly
_BLOCK = 4096


class CausalFilter:
    """Filters and resamples chunk after chunk; the result does not depend on the chunks.

    The first sample is taken as the signal's past, so that an offset makes no transient. The
    output lags by the delays of the filter and of the resampler (``delay_s``), in training and in
    a stream alike.

    Args:
        sfreq: Rate of the input, Hz.
        settings: Section ``data.filter``; its phase is not looked at.
        resample_hz: Rate of the output, Hz; None keeps the input's.

    Example:
        >>> CausalFilter(160.0, FilterSection(), 80.0).push(np.zeros((3, 160))).shape
        (3, 80)
    """

    def __init__(self, sfreq: float, settings: FilterSection, resample_hz: float | None) -> None:
        ratio = Fraction(resample_hz or sfreq).limit_denominator(10_000)
        ratio = (ratio / Fraction(sfreq).limit_denominator(10_000)).limit_denominator(10_000)
        self.up, self.down = ratio.numerator, ratio.denominator
        self.sos = _sections(sfreq, settings)
        half = _HALF_TAPS * max(self.up, self.down) if ratio != 1 else 0
        kernel = np.ones(1)
        if half:
            cutoff = 1.0 / max(self.up, self.down)
            kernel = self.up * firwin(2 * half + 1, cutoff, window=("kaiser", 5.0))
        self.delay_s = half / (self.up * sfreq)
        taps = -(-kernel.size // self.up)
        padded = np.zeros(taps * self.up)
        padded[: kernel.size] = kernel
        self._phases = padded.reshape(taps, self.up).T  # (up, taps): taps of each output phase
        self._state: np.ndarray | None = None
        self._past: np.ndarray | None = None
        self._received = 0
        self._sent = 0

    def push(self, chunk: Float[np.ndarray, "c t"]) -> Float[np.ndarray, "c s"]:
        """The output samples that the new input makes possible.

        Args:
            chunk: New samples, any number of them, always of the same channels.

        Returns:
            Filtered samples at the output rate; perhaps none.
        """
        samples = np.asarray(chunk, dtype=np.float64)
        if samples.shape[1] == 0:
            return samples
        if self._past is None:
            self._start(samples[:, 0])
        if self.sos.size:
            samples, self._state = sosfilt(self.sos, samples, axis=1, zi=self._state)
        return self._resample(samples)

    def _start(self, first: np.ndarray) -> None:
        if self.sos.size:
            settled = sosfilt_zi(self.sos)  # (sections, 2) for a constant input of 1
            self._state = settled[:, None, :] * first[None, :, None]
            first, _ = sosfilt(self.sos, first[:, None], axis=1, zi=self._state)
            first = first[:, 0]
        self._past = np.repeat(first[:, None], self._phases.shape[1] - 1, axis=1)

    def _resample(self, samples: np.ndarray) -> np.ndarray:
        if self.up == self.down:
            return samples
        assert self._past is not None
        taps = self._phases.shape[1]
        history = np.concatenate([self._past, samples], axis=1)
        first = self._received - (taps - 1)  # position in the stream of the first history sample
        self._received += samples.shape[1]
        outputs = np.arange(self._sent, -(-self._received * self.up // self.down))
        self._sent += outputs.size
        result = np.empty((samples.shape[0], outputs.size))
        back = np.arange(taps)
        for start in range(0, outputs.size, _BLOCK):
            block = outputs[start : start + _BLOCK]
            newest, phase = np.divmod(block * self.down, self.up)
            gathered = history[:, (newest - first)[:, None] - back]
            result[:, start : start + _BLOCK] = np.einsum(
                "cot,ot->co", gathered, self._phases[phase]
            )
        self._past = history[:, history.shape[1] - (taps - 1) :]
        return result


def filter_recording(
    signal: Float[np.ndarray, "c t"],
    sfreq: float,
    settings: FilterSection,
    resample_hz: float | None,
) -> Float[np.ndarray, "c s"]:
    """A whole recording, filtered and resampled.

    Args:
        signal: Microvolt.
        sfreq: Hz.
        settings: Section ``data.filter``.
        resample_hz: Rate of the output, Hz; None keeps the input's.

    Returns:
        The filtered recording at the output rate.
    """
    if settings.phase == "causal":
        return CausalFilter(sfreq, settings, resample_hz).push(signal)
    import mne

    filtered = np.asarray(signal, dtype=np.float64)
    if settings.notch is not None:
        filtered = mne.filter.notch_filter(filtered, sfreq, settings.notch, verbose="error")
    if settings.band is not None:
        low, high = settings.band
        filtered = mne.filter.filter_data(
            filtered, sfreq, low or None, high, fir_design="firwin", phase="zero", verbose="error"
        )
    if resample_hz is not None and resample_hz != sfreq:
        filtered = mne.filter.resample(
            filtered, up=resample_hz, down=sfreq, npad="auto", window="auto", verbose="error"
        )
    return np.asarray(filtered)


def margin_s(n_times: int, sfreq: float, settings: FilterSection) -> float:
    """How far from an edge of the recording a trial must stay to be free of the edge.

    Half the length of the band-pass kernel, without the tails that hold the last 0.01 % of its
    energy: there the edge changes a trial by less than half a percent of its amplitude.

    Args:
        n_times: Samples of the recording.
        sfreq: Hz.
        settings: Section ``data.filter``.

    Returns:
        Seconds; 0 without a band-pass and for causal filters, which look back only.
    """
    if settings.phase == "causal" or settings.band is None:
        return 0.0
    import mne

    low, high = settings.band
    kernel: Any = mne.filter.create_filter(
        None, sfreq, low or None, high, fir_design="firwin", phase="zero", verbose="error"
    )
    energy = np.asarray(kernel) ** 2
    centre = energy.size // 2
    sides = energy[centre] + np.concatenate(
        [[0.0], np.cumsum(energy[centre + 1 :] + energy[centre - 1 :: -1][: energy.size // 2])]
    )
    reach = int(np.searchsorted(sides, KERNEL_ENERGY * sides[-1]))
    return min(reach, n_times) / sfreq


def _sections(sfreq: float, settings: FilterSection) -> np.ndarray:
    """Second-order sections of notch and band-pass; empty where nothing is filtered."""
    sections = []
    if settings.notch is not None:
        sections.append(tf2sos(*iirnotch(settings.notch, NOTCH_QUALITY, fs=sfreq)))
    if settings.band is not None:
        low, high = settings.band
        edges, kind = ([low, high], "bandpass") if low > 0 else (high, "lowpass")
        sections.append(butter(BUTTERWORTH_ORDER, edges, kind, fs=sfreq, output="sos"))
    return np.concatenate(sections) if sections else np.empty((0, 6))
