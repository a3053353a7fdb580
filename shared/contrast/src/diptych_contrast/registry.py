"""The one table of all losses: what exists, by name, with formula, paper and reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

from torch import Tensor

from diptych_contrast import cluster, multiview, pairwise, salient
from diptych_contrast.common import Common, Options
from diptych_contrast.errors import ContrastInputError


@dataclass(frozen=True)
class LossSpec:
    """What is known about a loss.

    Attributes:
        name: Public name.
        formula: Loss of one row, in plain text.
        paper: Where it comes from.
        needs: What it asks for beside two views, such as ``views>=2``, ``labels``, ``queue``.
        defaults: Its keyword arguments and their defaults.
        parity: Names of other forms it can take, such as ``official``.
        function: The loss.
        reference: The same in a few dense lines of float64.
    """

    name: str
    formula: str
    paper: str
    needs: tuple[str, ...]
    defaults: Mapping[str, Any]
    parity: tuple[str, ...]
    function: Callable[..., Any]
    reference: Callable[..., Tensor]


def _spec(
    function: Callable[..., Any],
    formula: str,
    paper: str,
    needs: tuple[str, ...] = (),
    parity: tuple[str, ...] = (),
) -> LossSpec:
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    family = function.__module__.split(".")[1]
    reference = import_module(f"diptych_contrast.reference.{family}")
    common = {name: getattr(Options(function.__name__), name) for name in Common.__annotations__}
    return LossSpec(
        name=function.__name__,
        formula=formula,
        paper=paper,
        needs=needs,
        defaults=MappingProxyType({**own, **common}),
        parity=parity,
        function=function,
        reference=getattr(reference, function.__name__),
    )


def losses() -> dict[str, LossSpec]:
    """Return the table of all losses.

    Returns:
        Specification by name.

    Example:
        >>> losses()["clip_loss"].paper
        'Radford et al., 2021 (CLIP)'
    """
    table = (
        _spec(
            pairwise.nt_xent,
            "log sum_{j != i} exp(s_ij/t) - s_ii'/t   over both views",
            "Chen et al., 2020 (SimCLR)",
        ),
        _spec(
            pairwise.info_nce,
            "log(exp(s_ii/t) + sum_neg exp(s/t)) - s_ii/t",
            "van den Oord et al., 2018; He et al., 2020 (MoCo)",
            needs=("queue",),
        ),
        _spec(
            pairwise.sup_con,
            "out: log sum_{a != i} exp(s_ia/t) - mean_p s_ip/t; "
            "in: log sum_{a != i} exp(s_ia/t) - log mean_p exp(s_ip/t)",
            "Khosla et al., 2020 (SupCon)",
            needs=("labels",),
            parity=("official",),
        ),
        _spec(
            pairwise.soft_sup_con,
            "log sum_{a != i} exp(s_ia/t) - sum_j w_ij s_ij/t / sum_j w_ij,  w_ij = u_i.v_j",
            "Khosla et al., 2020; weights as in Bai et al., 2023 (BaCon)",
            needs=("labels",),
        ),
        _spec(
            pairwise.clip_loss,
            "(log sum_j exp(s_ij/t) + log sum_j exp(s_ji/t))/2 - s_ii/t",
            "Radford et al., 2021 (CLIP)",
        ),
        _spec(
            pairwise.siglip,
            "-sum_j log sigmoid(y_ij (exp(log_scale) s_ij + bias)),  y = 1 on positives, else -1",
            "Zhai et al., 2023 (SigLIP)",
        ),
        _spec(
            multiview.nt_xent_multi,
            "log sum_{a != i} exp(s_ia/t) - mean_p s_ip/t,  p over the other views of a sample",
            "Chen et al., 2020; Khosla et al., 2020",
            needs=("views>=2",),
        ),
        _spec(
            multiview.mv_info_nce,
            "log sum_{l, m != l, j} exp(u_il.u_jm/t) - log sum_{l != m} exp(u_il.u_im/t)",
            "Koromilas et al., 2025 (MV-InfoNCE)",
            needs=("views>=2",),
            parity=("official",),
        ),
        _spec(
            multiview.mv_dhel,
            "sum_l log sum_{j != i} exp(u_il.u_jl/t) - log sum_{l != m} exp(u_il.u_im/t)",
            "Koromilas et al., 2025 (MV-DHEL)",
            needs=("views>=2",),
            parity=("official",),
        ),
        _spec(
            multiview.poly_view,
            "mean_b l or -log mean_b exp(-l),  l = log(exp(s_ab/t) + sum_neg exp(s/t)) - s_ab/t",
            "Shidani et al., 2024 (PVC)",
            needs=("views>=2",),
        ),
        _spec(
            cluster.swav_loss,
            "-sum_k q_ak log softmax_k(s_v/t),  q_a = sinkhorn(s_a), v != a",
            "Caron et al., 2020 (SwAV)",
            needs=("views>=2", "prototypes"),
            parity=("official",),
        ),
        _spec(
            cluster.proto_nce,
            "info_nce + mean over clusterings of log sum_j exp(q.c_j/phi_j) - q.c_own/phi_own",
            "Li et al., 2021 (PCL)",
            needs=("clusters",),
        ),
        _spec(
            salient.sep_clr,
            "align(c) + unif(c) + w1 (align(s') + unif(s')) + w2 |s|^2 of backgrounds + w3 kJEM(c, s')",
            "Louiset et al., 2024 (SepCLR)",
            needs=("targets",),
            parity=("official",),
        ),
    )
    return {spec.name: spec for spec in table}


def _find(function: str, name: str) -> LossSpec:
    table = losses()
    if name not in table:
        near = get_close_matches(name, table, n=1, cutoff=0.0)
        raise ContrastInputError(
            function,
            "name",
            f"is {name!r}",
            f"did you mean {near[0]!r}? All names: {', '.join(table)}",
        )
    return table[name]


def loss(name: str, **config: Any) -> Callable[..., Any]:
    """Look a loss up by name and set its keyword arguments, as a config section does.

    Args:
        name: Name in `losses`.
        **config: Keyword arguments of the loss.

    Returns:
        The loss, to be called with embeddings.

    Raises:
        ContrastInputError: An unknown name or keyword, with the nearest one.

    Example:
        >>> loss("nt_xent", temperature=0.2).keywords
        {'temperature': 0.2}
    """
    spec = _find("loss", name)
    for key in config:
        if key not in spec.defaults:
            near = get_close_matches(key, spec.defaults, n=1, cutoff=0.0)
            raise ContrastInputError(
                name,
                key,
                "is unknown",
                f"did you mean {near[0]!r}? All keywords: {', '.join(spec.defaults)}",
            )
    return partial(spec.function, **config)


def explain(name: str) -> str:
    """Say what a loss computes, where it comes from and what it takes.

    Args:
        name: Name in `losses`.

    Returns:
        A text of several lines.

    Raises:
        ContrastInputError: An unknown name, with the nearest one.

    Example:
        >>> explain("nt_xent").splitlines()[0]
        'nt_xent: Chen et al., 2020 (SimCLR)'
    """
    spec = _find("explain", name)
    defaults = ", ".join(f"{key}={value!r}" for key, value in spec.defaults.items())
    lines = [
        f"{spec.name}: {spec.paper}",
        f"loss of a row: {spec.formula}",
        f"takes: {defaults}",
        f"needs: {', '.join(spec.needs) or 'nothing more'}",
        f"other forms: {', '.join(spec.parity) or 'none'}",
        "",
        inspect.getdoc(spec.function) or "",
        "",
        "The same, dense and in float64:",
        inspect.getsource(spec.reference),
    ]
    return "\n".join(lines)
