"""Views of a trial: the same brain activity upside down, slightly faster, mirrored.

The views of MVCNet (Wang et al., arXiv 2502.17482) on batches of trials, and a few more. Random
ones take their numbers from the trial's own keyed draw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.randomness import Draw
from diptych_mvcnet.config import ViewsSection

_ELECTRODE = re.compile(r"^([a-z]+?)(\d+)(h?)$")
_OLD_NAMES = {"t3": "t7", "t4": "t8", "t5": "p7", "t6": "p8"}
RANDOM_VIEWS = ("noise", "surrogate")


def flip(x: Float[Tensor, "*batch C T"]) -> Float[Tensor, "*batch C T"]:
    """The trial with reversed polarity."""
    return -x


def frequency_shift(
    x: Float[Tensor, "*batch C T"], delta_hz: float | Float[Tensor, ...], dt: float
) -> Float[Tensor, "*batch C T"]:
    """Shift the spectrum: real part of the analytic signal times exp(2 pi i delta t).

    The analytic signal is that of the trial padded with zeros to the next power of two. Its real
    part is the trial itself, so that only the Hilbert transform is computed.

    Args:
        x: Trials.
        delta_hz: Shift in Hz, upward if positive; a tensor that broadcasts against
            ``(*batch, 1, 1)`` shifts every trial by its own amount.
        dt: Seconds between samples.

    Returns:
        Shifted trials, in the type of ``x``; computed in float32 at least.

    Example:
        >>> frequency_shift(torch.ones(1, 2, 64), 0.0, 0.01).equal(torch.ones(1, 2, 64))
        True
    """
    signal = x if x.dtype == torch.float64 else x.float()
    n_times = x.shape[-1]
    length = 1 << (n_times - 1).bit_length()
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.rfft(signal, n=length) * -1j
        spectrum[..., 0] = 0
        spectrum[..., length // 2] = 0
        hilbert = torch.fft.irfft(spectrum, n=length)[..., :n_times]
        time = torch.arange(n_times, dtype=torch.float64, device=x.device) * dt
        angle = 2 * math.pi * delta_hz * time
        cosine, sine = angle.cos().to(signal.dtype), angle.sin().to(signal.dtype)
        shifted: Tensor = signal * cosine - hilbert * sine
        return shifted.to(x.dtype)


def reflect(
    x: Float[Tensor, "*batch C T"], mirror: Int[Tensor, " C"]
) -> Float[Tensor, "*batch C T"]:
    """Exchange the electrodes of the left and the right side.

    Args:
        x: Trials.
        mirror: Channel c of the result is channel ``mirror[c]`` of ``x``.

    Returns:
        Reflected trials.
    """
    return x.index_select(-2, mirror.to(x.device))


def mirror_index(
    ch_names: Sequence[str],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    allow_partial: bool = False,
) -> Int[Tensor, " C"]:
    """The partner of each electrode on the other side, by the 10-05 names.

    An odd number pairs with the next even one; names without a number stay. The old names T3,
    T4, T5 and T6 are T7, T8, P7 and P8.

    Args:
        ch_names: Electrode names in channel order; case does not matter.
        pairs: Explicit pairs that replace the rule.
        allow_partial: Leave lateral electrodes without a partner where they are.

    Returns:
        A permutation that is its own inverse.

    Raises:
        ValueError: A lateral electrode has no partner, or a pair names no channel.

    Example:
        >>> mirror_index(["C3", "Cz", "C4"]).tolist()
        [2, 1, 0]
    """
    partners = _partners(ch_names)
    if pairs is not None:
        partners = {name: name for name in ch_names}
        unknown = sorted({name for pair in pairs for name in pair} - set(ch_names))
        if unknown:
            raise ValueError(f"pairs name {unknown}, which are no channels: {list(ch_names)}")
        for left, right in pairs:
            partners[left], partners[right] = right, left
    alone = [name for name, partner in partners.items() if partner is None]
    if alone and not allow_partial:
        raise ValueError(
            f"electrodes {alone} have no partner on the other side: leave them out of "
            "data.channels, or set views.reflect.allow_partial=true"
        )
    place = {name: position for position, name in enumerate(ch_names)}
    return torch.tensor([place[partners[name] or name] for name in ch_names], dtype=torch.long)


def unpaired_channels(ch_names: Sequence[str]) -> list[str]:
    """Lateral electrodes whose partner on the other side is not there."""
    return [name for name, partner in _partners(ch_names).items() if partner is None]


def class_mirror_index(
    classes: Sequence[str], class_mirror: Mapping[str, str]
) -> Int[Tensor, " K"]:
    """The class number of each class after left and right were exchanged.

    Args:
        classes: Class names in label order.
        class_mirror: Name -> name, in one direction or both; other classes stay, and so does a
            class whose mirror image is not among ``classes``.

    Returns:
        A permutation that is its own inverse.
    """
    both = {**{right: left for left, right in class_mirror.items()}, **class_mirror}
    place = {name: number for number, name in enumerate(classes)}
    return torch.tensor(
        [place.get(both.get(name, name), number) for name, number in place.items()],
        dtype=torch.long,
    )


def usable_views(
    settings: ViewsSection, ch_names: Sequence[str], *, lesion: bool = False
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The views that these electrodes and subjects permit.

    Args:
        settings: Section ``views``.
        ch_names: Electrode names in channel order.
        lesion: Whether the side of a lesion is known for a training subject.

    Returns:
        Names of the views to use, and the reason for each that is left out.
    """
    reason = ""
    if lesion and not settings.reflect.keep_with_lesion:
        reason = (
            "reflection would move a lesion to the other side "
            "(views.reflect.keep_with_lesion=true restores it)"
        )
    else:
        try:
            mirror = mirror_index(
                ch_names,
                pairs=settings.reflect.pairs,
                allow_partial=settings.reflect.allow_partial,
            )
        except ValueError as error:
            reason = str(error)
        else:
            if mirror.equal(torch.arange(len(mirror))):
                reason = "no two electrodes lie on opposite sides"
    if not reason or "reflect" not in settings.use:
        return settings.use, {}
    return tuple(name for name in settings.use if name != "reflect"), {"reflect": reason}


def are_random(settings: ViewsSection, names: Sequence[str]) -> bool:
    """Whether any of these views differs from epoch to epoch."""
    shifting = "freq_shift" in names and settings.freq_shift.random
    return shifting or any(name in RANDOM_VIEWS for name in names)


def build_views(
    x: Float[Tensor, "N C T"],
    y: Int[Tensor, " N"],
    names: Sequence[str],
    *,
    sfreq: float,
    mirror: Int[Tensor, " C"] | None = None,
    class_mirror: Int[Tensor, " K"] | None = None,
    settings: ViewsSection | None = None,
    draw: Draw | None = None,
    ids: Sequence[int] = (),
) -> tuple[list[Float[Tensor, "N C T"]], list[Int[Tensor, " N"]]]:
    """All views of a batch and their labels, the raw trials first.

    Args:
        x: Aligned trials.
        y: Labels in 0..K-1.
        names: Views beside the raw one.
        sfreq: Sampling rate in Hz.
        mirror: From :func:`mirror_index`; needed by "reflect".
        class_mirror: From :func:`class_mirror_index`; None keeps the labels.
        settings: Section ``views``; None means its defaults.
        draw: Keyed draws of this epoch; needed by random views.
        ids: Item number of each trial, for the draws.

    Returns:
        1 + len(names) tensors of trials, and as many of labels.

    Raises:
        ValueError: An unknown view, or one whose mirror or draw is missing.
    """
    settings = ViewsSection() if settings is None else settings
    views, labels = [x], [y]
    for name in names:
        view, label = x, y
        if name == "flip":
            view = flip(x)
        elif name == "freq_shift":
            shift = settings.freq_shift
            delta: float | Tensor = shift.delta_hz
            if shift.random:
                bound = shift.delta_max_hz
                drawn = _need(draw, name).of(name).uniform(ids, 1, -bound, bound)
                delta = torch.from_numpy(drawn).to(x.device)[..., None]
            view = frequency_shift(x, delta, shift.parity_dt or 1.0 / sfreq)
        elif name == "reflect":
            if mirror is None:
                raise ValueError("view 'reflect' needs mirror: pass mirror_index(ch_names)")
            view = reflect(x, mirror)
            label = _mirrored_labels(y, class_mirror, settings)
        elif name == "scale":
            view = x * settings.scale_factor
        elif name == "noise":
            drawn = _need(draw, name).of(name).uniform(ids, x[0].numel(), -1.0, 1.0)
            noise = torch.from_numpy(drawn).to(x.device, x.dtype).reshape(x.shape)
            spread = x.std(dim=(-2, -1), keepdim=True, correction=0)
            view = x + settings.noise_std * spread * noise
        elif name == "surrogate":
            view = _surrogate(x, settings.surrogate_phase, _need(draw, name).of(name), ids)
        else:
            raise ValueError(f"'{name}' is no view: see views.use in the configuration")
        views.append(view)
        labels.append(label)
    return views, labels


def _mirrored_labels(
    y: Int[Tensor, " N"], class_mirror: Int[Tensor, " K"] | None, settings: ViewsSection
) -> Int[Tensor, " N"]:
    if settings.reflect.parity_binary_swap:
        return torch.where(y < 2, 1 - y, y)
    return y if class_mirror is None else class_mirror.to(y.device)[y]


def _surrogate(
    x: Float[Tensor, "N C T"], strength: float, draw: Draw, ids: Sequence[int]
) -> Float[Tensor, "N C T"]:
    """Turn every Fourier phase, alike in all channels, so that their covariance is kept."""
    n_times = x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.rfft(x.float())
        drawn = draw.uniform(ids, spectrum.shape[-1], 0.0, 2 * math.pi * strength)
        phase = torch.from_numpy(drawn).to(x.device, torch.float32)[:, None]
        phase[..., 0] = 0
        if n_times % 2 == 0:
            phase[..., -1] = 0
        turned = spectrum * torch.polar(torch.ones_like(phase), phase)
        surrogate: Tensor = torch.fft.irfft(turned, n=n_times)
        return surrogate.to(x.dtype)


def _partners(ch_names: Sequence[str]) -> dict[str, str | None]:
    """Partner of each channel: itself on the midline, None where the other side is missing."""
    by_form = {_form(name): name for name in ch_names}
    partners: dict[str, str | None] = {}
    for name in ch_names:
        match = _ELECTRODE.match(_form(name))
        if match is None:
            partners[name] = name
            continue
        prefix, number, suffix = match[1], int(match[2]), match[3]
        other = number + 1 if number % 2 else number - 1
        partners[name] = by_form.get(f"{prefix}{other}{suffix}")
    return partners


def _form(name: str) -> str:
    lowered = name.strip().lower()
    return _OLD_NAMES.get(lowered, lowered)


def _need(draw: Draw | None, name: str) -> Draw:
    if draw is None:
        raise ValueError(f"view '{name}' is random: pass draw and ids")
    return draw
