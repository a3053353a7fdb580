"""Two paths become five classes: what each path knows, and how their answers are joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych_pirads.config import PathsSection
from diptych_pirads.labels import BG, ZONES

Fuse = Literal["product", "mean", "a_then_b"]
Paths = Mapping[str, tuple[int, ...]]

PATHS: Paths = {"a": (1, 2, 3), "b": (1, 2, 4)}
_SMALLEST = 1e-7  # of a probability whose logarithm is taken


def fuse(
    out_a: Float[Tensor, "n 1+ka z y x"],
    out_b: Float[Tensor, "n 1+kb z y x"],
    paths: Paths = PATHS,
    mode: Fuse = "product",
) -> Float[Tensor, "n 5 z y x"]:
    """Five classes from the logits of two paths.

    Args:
        out_a: Logits of path a, the rest first.
        out_b: Logits of path b.
        paths: Zones of each path.
        mode: "product": a class's score is the product of what both paths give it, where a path
            without the class gives its rest; a path that knows nothing leaves the choice to the
            other. "mean": zones of both paths are averaged, the background is what is left.
            "a_then_b": the class that path a chooses, and where that is the rest what path b
            chooses among its own zones; certain, and without gradient.

    Returns:
        Probabilities in single precision, of sum 1 over the classes.
    """
    if mode == "a_then_b":
        return _a_then_b(out_a, out_b, paths)
    return log_fuse(out_a, out_b, paths, mode).exp()


def log_fuse(
    out_a: Float[Tensor, "n 1+ka z y x"],
    out_b: Float[Tensor, "n 1+kb z y x"],
    paths: Paths = PATHS,
    mode: Literal["product", "mean"] = "product",
) -> Float[Tensor, "n 5 z y x"]:
    """The logarithm of `fuse`, which losses take."""
    log_a, log_b = out_a.float().log_softmax(1), out_b.float().log_softmax(1)
    if mode == "product":
        score = log_a[:, channel_of(paths["a"])] + log_b[:, channel_of(paths["b"])]
        return score.log_softmax(1)
    a, b = log_a.exp(), log_b.exp()
    zones = []
    for zone in range(BG + 1, len(ZONES)):
        known = [
            p[:, 1 + path.index(zone)]
            for p, path in ((a, paths["a"]), (b, paths["b"]))
            if zone in path
        ]
        zones.append(sum(known[1:], known[0]) / len(known))
    stacked = torch.stack(zones, 1)
    rest = (1 - stacked.sum(1, keepdim=True)).clamp(min=0)
    log = torch.cat([rest, stacked], 1).clamp(min=_SMALLEST).log()
    return log - log.logsumexp(1, keepdim=True)


def channel_of(path: Sequence[int]) -> list[int]:
    """For each of the five classes its channel in a path: 0, the rest, where it has none."""
    return [1 + path.index(c) if c in path else 0 for c in range(len(ZONES))]


def common_zones(paths: Paths) -> tuple[int, ...]:
    """The zones that both paths know, in the order of path a."""
    return tuple(zone for zone in paths["a"] if zone in paths["b"])


def common_maps(
    out: Float[Tensor, "n 1+k z y x"], path: Sequence[int], common: Sequence[int]
) -> Float[Tensor, "n s z y x"]:
    """A path's probabilities of the zones that both paths know, in single precision."""
    return out.float().softmax(1)[:, [1 + path.index(zone) for zone in common]]


def path_classes(paths: PathsSection) -> dict[str, tuple[int, ...]]:
    """Zones of each path as positions in `labels.ZONES`."""
    return {
        name: tuple(ZONES.index(zone) for zone in zones)
        for name, zones in (("a", paths.a), ("b", paths.b))
    }


def _a_then_b(out_a: Tensor, out_b: Tensor, paths: Paths) -> Float[Tensor, "n 5 z y x"]:
    of_a, of_b = (
        torch.tensor((BG, *paths[name]), device=out_a.device)[out.argmax(1)]
        for name, out in (("a", out_a), ("b", out_b))
    )
    for zone in paths["a"]:
        of_b = torch.where(of_b == zone, BG, of_b)
    chosen = torch.where(of_a == BG, of_b, of_a)
    return F.one_hot(chosen, len(ZONES)).movedim(-1, 1).float()
