"""The figures of the report; numbers come from the evaluation and the prepared data alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from diptych.contract import Evaluation, Facts, Payload, Picture
from diptych.report.look import COLOURS, INK, LINE, SOFT, figure_of_axes
from diptych_mvcnet.baselines import band_pass
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.montage import standard_montage

if TYPE_CHECKING:
    from diptych.prepared import Prepared

MU_HZ = (8.0, 13.0)
SHOWN_CHANNELS = ("C3", "Cz", "C4")
SHOWN_FILTERS = 8
_CHUNK = 256


def pictures(config: MVCNetConfig, prepared: Prepared, evaluation: Evaluation) -> list[Picture]:
    """The report's figures, those left out whose data are not there.

    Args:
        config: The run's configuration.
        prepared: Its data.
        evaluation: Of the model and its baselines.

    Returns:
        Accuracy of each participant, confusion, calibration, topographies, spectra and time
        courses, frequency responses, the check for artefacts.
    """
    own = evaluation.payload.get(("", "", ""))
    network = evaluation.files.get("network")
    drawn: list[Picture | None] = [_accuracies(evaluation)]
    if own is not None:
        drawn += [_confusion(own, prepared.facts), _calibration(own)]
    if network is not None:
        drawn += [_topographies(network, prepared.facts), _responses(network, prepared.facts)]
    drawn += [_spectra(prepared), _artefacts(evaluation.files.get("artefacts"))]
    return [picture for picture in drawn if picture is not None]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _accuracies(evaluation: Evaluation) -> Picture:
    """A dot a participant and method; participants from the hardest to the easiest."""
    tables: dict[str, pl.DataFrame] = {
        key.removeprefix("subjects-"): table.group_by("subject").agg(
            pl.col("accuracy", "chance_bound", "n").mean()
        )
        for key, table in evaluation.files.items()
        if key.startswith("subjects-")
    }
    own = tables["mvcnet"].sort("accuracy", "subject")
    subjects = own["subject"].to_list()
    place = {subject: number for number, subject in enumerate(subjects)}
    figure, axes = figure_of_axes(max(6.4, 0.42 * len(subjects) + 2.4), 3.8)
    axes.step(
        [-0.5, *np.arange(len(subjects)) + 0.5],
        [own["chance_bound"][0], *own["chance_bound"]],
        color=SOFT,
        linewidth=1.2,
        linestyle="--",
        label="chance bound (95 %)",
    )
    width = 0.5 / max(len(tables), 2)
    for number, (method, table) in enumerate(tables.items()):
        x = np.array([place[subject] for subject in table["subject"]])
        ours = method == "mvcnet"
        axes.scatter(
            x + (number - (len(tables) - 1) / 2) * width,
            table["accuracy"],
            s=54 if ours else 26,
            color=COLOURS[number % len(COLOURS)],
            zorder=3 if ours else 2,
            label="MVCNet" if ours else method,
        )
    axes.set_xticks(range(len(subjects)), subjects, rotation=45, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(subjects) - 0.4)
    lowest = min(table["accuracy"].to_numpy().min() for table in tables.values())
    axes.set_ylim(min(0.3, lowest - 0.03), 1.03)
    axes.set_ylabel("accuracy", color=INK)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return Picture(
        "accuracy-by-participant",
        "Accuracy of each participant",
        "One dot a participant and method, from the hardest to the easiest for MVCNet. Below the "
        "dashed line an accuracy cannot be told from guessing with that number of trials.",
        figure,
    )


def _confusion(payload: Payload, facts: Facts) -> Picture:
    classes = [_words(name) for name in facts["classes"]]
    predicted = payload["probability"].argmax(axis=1)
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (payload["y"].astype(int), predicted), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.9 * len(classes)
    figure, axes = figure_of_axes(side + 0.8, side)
    axes.grid(visible=False)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(classes)):
        for column in range(len(classes)):
            axes.text(
                column,
                row,
                f"{share[row, column]:.0%}\n{int(counts[row, column])}",
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.55 else INK,
            )
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes, rotation=90, va="center")
    axes.set_xlabel("decoded", color=INK)
    axes.set_ylabel("imagined", color=INK)
    return Picture(
        "confusion",
        "Confusion",
        "Test trials of all participants and seeds: share of each imagined class, and number.",
        figure,
    )


def _calibration(payload: Payload) -> Picture:
    proba = payload["probability"]
    right = proba.argmax(axis=1) == payload["y"]
    confidence = proba.max(axis=1)
    edges = np.linspace(1 / proba.shape[1], 1, 9)
    bins = np.clip(np.digitize(confidence, edges) - 1, 0, len(edges) - 2)
    figure, axes = figure_of_axes(4.6, 4.2)
    axes.plot(edges[[0, -1]], edges[[0, -1]], color=SOFT, linewidth=1, linestyle="--")
    held = [number for number in range(len(edges) - 1) if (bins == number).sum() >= 5]
    x = [confidence[bins == number].mean() for number in held]
    y = np.array([right[bins == number].mean() for number in held])
    n = np.array([(bins == number).sum() for number in held])
    error = 1.96 * np.sqrt(np.maximum(y * (1 - y), 0.01) / np.maximum(n, 1))
    axes.errorbar(x, y, yerr=error, color=COLOURS[0], marker="o", markersize=5, capsize=0)
    for place, height, count in zip(x, y, n, strict=True):
        axes.annotate(
            str(count),
            (place, height),
            (6, -11),
            textcoords="offset points",
            fontsize=8,
            color=SOFT,
        )
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("confidence", color=INK)
    axes.set_ylabel("accuracy", color=INK)
    return Picture(
        "calibration",
        "Calibration",
        "How often decisions of a given confidence are right (bars: 95 %, numbers: trials; bins "
        "below 5 trials are left out). Above the dashed line the model is too modest.",
        figure,
    )


def _positions(facts: Facts) -> tuple[Any, np.ndarray] | None:
    """MNE info of the channels with a known place, and which they are."""
    import mne

    montage = standard_montage("1005")
    known = {name.lower(): name for name in montage.ch_names}
    kept = [n for n, name in enumerate(facts["ch_names"]) if name.lower() in known]
    if len(kept) < 4:
        return None
    info = mne.create_info([known[facts["ch_names"][n].lower()] for n in kept], 100.0, "eeg")
    info.set_montage(montage, verbose="error")
    return info, np.array(kept)


def _topographies(network: Mapping[str, np.ndarray], facts: Facts) -> Picture | None:
    import mne

    found = _positions(facts)
    if found is None:
        return None
    info, kept = found
    count = min(SHOWN_FILTERS, len(network["patterns"]))
    columns = 4
    figure = Figure(figsize=(8.4, 2.35 * -(-count // columns)), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    share = network["importance"] / network["importance"].sum()
    names = [_words(name) for name in facts["classes"]]
    for number, one in enumerate(axes):
        if number >= count:
            one.set_axis_off()
            continue
        pattern = network["patterns"][number, kept]
        # The sign of a pattern means nothing (power is what counts): its peak is shown in red.
        pattern = pattern * np.sign(pattern[np.abs(pattern).argmax()])
        mne.viz.plot_topomap(
            pattern / np.abs(pattern).max(),
            info,
            axes=one,
            show=False,
            cmap="RdBu_r",
            vlim=(-1, 1),
            contours=4,
            sensors="k.",
            extrapolate="local",
        )
        favoured = names[int(network["sign"][number] > 0)]
        one.set_title(f"{share[number]:.1%} · power: {favoured}", fontsize=8.5, color=INK)
    return Picture(
        "patterns",
        "Where the network looks",
        "Spatial patterns (Haufe et al. 2014) of the filters that the classifier uses most, mapped "
        "back to the scalp, each scaled to its peak: share of the use, and the class that more "
        "power speaks for. Hand imagery shows over the central electrodes of the other side; a "
        "peak at the front or at the temples speaks for eyes or muscles.",
        figure,
    )


def _responses(network: Mapping[str, np.ndarray], facts: Facts) -> Picture:
    sfreq = float(facts["sfreq"])
    kernels = network["kernels"]
    points = max(512, kernels.shape[1])
    frequency = np.fft.rfftfreq(points, 1 / sfreq)
    gain = np.abs(np.fft.rfft(kernels, points, axis=1))
    gain /= np.maximum(gain.max(axis=1, keepdims=True), 1e-12)
    figure, axes = figure_of_axes(7.2, 3.4)
    for one in gain[:SHOWN_FILTERS]:
        axes.plot(frequency, one, color=COLOURS[0], alpha=0.25, linewidth=1)
    mean = np.average(gain, axis=0, weights=network["importance"])
    axes.plot(frequency, mean, color=COLOURS[1], linewidth=2, label="mean, weighted by use")
    band = facts["filter"]["band"]
    if band:
        axes.axvspan(
            band[0], band[1], color=LINE, alpha=0.5, linewidth=0, label="filter of the data"
        )
    axes.set_xlim(0, min(sfreq / 2, 50))
    axes.set_xlabel("frequency (Hz)", color=INK)
    axes.set_ylabel("gain (peak = 1)", color=INK)
    axes.legend(frameon=False, fontsize=8.5)
    return Picture(
        "kernels",
        "Which frequencies the network passes",
        f"Frequency responses of the temporal kernels: the {SHOWN_FILTERS} that the classifier "
        "uses most (thin) and the mean over all (thick).",
        figure,
    )


def _over_trials(
    prepared: Prepared, rows: np.ndarray, channel: int, measure: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Mean of a measure over trials, a chunk in memory at a time."""
    epochs = prepared.array("epochs")
    total = sum(
        measure(np.asarray(epochs[part, channel], dtype=np.float64)).sum(axis=0)
        for part in np.array_split(rows, max(1, -(-len(rows) // _CHUNK)))
    )
    return np.asarray(total / max(len(rows), 1))


def _spectra(prepared: Prepared) -> Picture | None:
    """Power spectra above, course of mu power below, at C3, Cz and C4."""
    facts = prepared.facts
    names, sfreq = list(facts["ch_names"]), float(facts["sfreq"])
    shown = [name for name in SHOWN_CHANNELS if name in names] or names[:3]
    keep = ~prepared.index["rejected"].to_numpy()
    y = prepared.index["y"].to_numpy()
    n_times = int(facts["n_times"])
    frequency = np.fft.rfftfreq(n_times, 1 / sfreq)
    band = facts["filter"]["band"] or (1.0, 45.0)
    held = (frequency >= band[0]) & (frequency <= band[1])
    window = np.hanning(n_times)
    smooth = max(1, round(0.25 * sfreq))
    time = float(facts["window"][0]) + np.arange(n_times) / sfreq

    def spectrum(x: np.ndarray) -> np.ndarray:
        power = np.abs(np.fft.rfft(x * window)) ** 2 * 2 / (sfreq * (window**2).sum())
        return np.asarray(power)

    def mu_power(x: np.ndarray) -> np.ndarray:
        power = band_pass(x, MU_HZ, sfreq) ** 2
        kernel = np.hanning(2 * smooth) / np.hanning(2 * smooth).sum()
        return np.array([np.convolve(trial, kernel, mode="same") for trial in power])

    figure, axes = figure_of_axes(9.2, 5.0, nrows=2, ncols=len(shown), squeeze=False, sharey="row")
    for column, name in enumerate(shown):
        channel = names.index(name)
        upper, lower = axes[0, column], axes[1, column]
        usual = _over_trials(prepared, np.flatnonzero(keep), channel, mu_power)
        for number, label in enumerate(facts["classes"]):
            rows = np.flatnonzero(keep & (y == number))
            power = _over_trials(prepared, rows, channel, spectrum)
            decibel = 10 * np.log10(np.maximum(power, 1e-12))
            upper.plot(frequency[held], decibel[held], color=COLOURS[number])
            course = _over_trials(prepared, rows, channel, mu_power)
            change = 100 * (course / np.maximum(usual.mean(), 1e-12) - 1)
            edge = slice(smooth, n_times - smooth)
            lower.plot(time[edge], change[edge], color=COLOURS[number], label=_words(label))
        upper.set_title(name, fontsize=10, color=INK, loc="left")
        upper.set_xlabel("frequency (Hz)", color=SOFT, fontsize=9)
        lower.set_xlabel("time after the cue (s)", color=SOFT, fontsize=9)
        lower.axhline(0, color=SOFT, linewidth=0.8)
    axes[0, 0].set_ylabel("power (dB re 1 µV²/Hz)", color=INK, fontsize=9)
    axes[1, 0].set_ylabel(f"{MU_HZ[0]:g}-{MU_HZ[1]:g} Hz power (%)", color=INK, fontsize=9)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return Picture(
        "spectra",
        "Spectra and desynchronisation over the motor cortex",
        "Mean power of the prepared trials (all participants), and the course of mu power against "
        "its mean over all classes and the whole window: imagery of a hand lowers it over the "
        "electrodes of the other side.",
        figure,
    )


def _artefacts(table: pl.DataFrame | None) -> Picture | None:
    if table is None or table.is_empty():
        return None
    figure, axes = figure_of_axes(7.6, 0.55 * table.height + 1.3)
    axes.grid(visible=False)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    for place, row in enumerate(table.iter_rows(named=True)):
        if row["accuracy"] is None:
            axes.text(0.01, place, row["note"], va="center", fontsize=9, color=SOFT)
            continue
        central = row["source"].startswith("central")
        suspicious = row["above_chance"] and not central
        colour = COLOURS[1] if suspicious else COLOURS[0]
        axes.barh(place, row["accuracy"], height=0.55, color=colour)
        axes.plot([row["chance_bound"]] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.5)
        axes.text(
            row["accuracy"] + 0.01,
            place,
            f"{row['accuracy']:.2f} ({row['channels']} channels)",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(range(table.height), table["source"])
    axes.set_ylim(table.height - 0.4, -0.6)
    axes.set_xlim(0, 1.15)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("accuracy", color=INK)
    return Picture(
        "artefacts",
        "Could eyes or muscles carry the decision?",
        "Accuracy of log band power and LDA on parts of the data, on the same splits; the black "
        "marks are chance bounds. Above chance outside the centre or above 30 Hz (orange) the "
        "trials deserve a look.",
        figure,
    )
