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

from torch import Tensor, nn

from diptych_contrast import (
    cluster,
    discover,
    matching,
    multiview,
    pairwise,
    reweight,
    salient,
)
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
        *_pairwise(),
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
            "align(c) + unif(c) + w1 (align(s') + unif(s')) + w2 |s|^2 at y=0 + w3 kJEM(c, s')",
            "Louiset et al., 2024 (SepCLR)",
            needs=("targets",),
            parity=("official",),
        ),
    )
    return {spec.name: spec for spec in (*table, *_weighed(), *_matched())}


def _pairwise() -> tuple[LossSpec, ...]:
    return (
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
            pairwise.dcl,
            "log sum_{j not in {i, i'}} exp(s_ij/t) - w_i s_ii'/t   over both views",
            "Yeh et al., 2022 (DCL)",
            parity=("official",),
        ),
        _spec(
            pairwise.dclw,
            "dcl with w_i = 2 - exp(s_ii'/sigma) / mean_l exp(s_ll'/sigma)",
            "Yeh et al., 2022 (DCLW)",
            parity=("official",),
        ),
        _spec(
            pairwise.hcl,
            "-log(e^p / (e^p + G)),  G = max((sum_j w_j e^(s_j/t) - m tau_plus e^p)/(1-tau_plus), "
            "m e^(-1/t)),  w_j = m e^(beta s_j/t) / sum_l e^(beta s_l/t)",
            "Robinson et al., 2021 (HCL)",
        ),
        _spec(pairwise.debiased, "hcl with beta = 0: all count alike", "Chuang et al., 2020"),
        _spec(
            pairwise.contrastive_margin,
            "mean_p d_ip^2 + mean_n relu(margin - d_in)^2",
            "Hadsell et al., 2006",
            needs=("labels",),
        ),
        _spec(
            pairwise.multi_similarity,
            "log(1 + sum_p exp(-alpha (s_ip - base)))/alpha + "
            "log(1 + sum_n exp(beta (s_in - base)))/beta   over the pairs kept",
            "Wang et al., 2019",
            needs=("labels",),
        ),
        _spec(pairwise.n_pairs, "log(1 + sum_{j != i} exp((s_ij - s_ii)/t))", "Sohn, 2016"),
        _spec(
            pairwise.circle,
            "log(1 + sum_n exp(gamma a_n (s_n - m)) sum_p exp(-gamma a_p (s_p - 1 + m)))",
            "Sun et al., 2020",
            needs=("labels",),
        ),
    )


def _weighed() -> tuple[LossSpec, ...]:
    return (
        _spec(
            reweight.cacr,
            "sum_p softmax_p(t_pos d2)_ip d2_ip - sum_j softmax_j(-t_neg d2)_ij d2_ij",
            "Zheng et al., 2021 (CACR)",
            needs=("views>=2",),
            parity=("official",),
        ),
        _spec(
            reweight.amcl,
            "sum_heads log sum_{j != i} exp(s_ij/t_ij) - s_ii'/t_ii' + reg mean((d/2) log t + 1/t)",
            "Wang et al., 2023 (AMCL)",
            needs=("heads", "PairTemperature"),
        ),
        _spec(
            reweight.arbitrary_pairs,
            "mean_p log(exp S_ip + sum_neg exp S_in) - S_ip,  S_ij = (g_i^2 z_i).k_j/t",
            "Wu et al., 2024 (SimLAP)",
            needs=("labels", "PairGate"),
            parity=("official",),
        ),
        _spec(
            discover.soft_con,
            "log sum_{a != i} exp(s_ia/t) - sum_j w_ij s_ij/t / sum_j w_ij,  w_ij = p_i.p_j",
            "Bai et al., 2023 (BaCon)",
            needs=("probabilities",),
            parity=("official",),
        ),
        _spec(
            discover.self_distillation,
            "-sum_k q_k log softmax_k(x/0.1),  q = mean over other views of softmax(x/t)",
            "Caron et al., 2021 (DINO); Bai et al., 2023 (BaCon)",
            needs=("views>=2", "logits"),
        ),
    )


def _matched() -> tuple[LossSpec, ...]:
    paper = "Diao et al., 2023 (DBL)"
    return (
        _spec(
            matching.triplet,
            "mean over mined (p, n) of [margin + d_ip - d_in]_+",
            "Schroff et al., 2015; Hermans et al., 2017",
            needs=("labels",),
        ),
        _spec(
            matching.birank,
            "[m + max_j S_ij - S_ii]_+ + [m + max_j S_ji - S_ii]_+",
            "Faghri et al., 2018 (VSE++); " + paper,
            parity=("official",),
        ),
        _spec(
            matching.boost_abs,
            "2 [g m + A_ii - S_ii]_+ + max [(1-g) m + S_ij - A_ij]_+ over row i, and over column i",
            paper,
            needs=("anchor",),
            parity=("official",),
        ),
        _spec(
            matching.boost_rel,
            "max [m + (A_ii - A_ij) - (S_ii - S_ij)]_+ over row i, and over column i",
            paper,
            needs=("anchor",),
            parity=("official",),
        ),
        _spec(
            matching.boost_kl,
            "KL(softmax(10 A) || softmax(10 S)) of row i, and of column i",
            paper,
            needs=("anchor",),
            parity=("official",),
        ),
        _spec(
            matching.boost_pro,
            "-log softmax(10 (S - A))_ii over row i, and over column i",
            paper,
            needs=("anchor",),
            parity=("official",),
        ),
        _spec(
            matching.label_guided,
            "log sum_j exp(s_ij/t) - sum_j w_ij s_ij/t / sum_j w_ij,  w what labels share",
            "arXiv 2412.03957",
            needs=("labels",),
        ),
    )


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


class Criterion(nn.Module):
    """A loss of the table as a module.

    A `Temperature` or another module among the arguments becomes a part of it, so that optimizers
    and state dicts find its parameters.

    Args:
        name: Name in `losses`.
        **config: Keyword arguments of the loss.

    Raises:
        ContrastInputError: An unknown name or keyword, with the nearest one.

    Example:
        >>> Criterion("nt_xent", temperature=1.0)(torch.ones(4, 8), torch.ones(4, 8)).exp().round()
        tensor(7.)
    """

    def __init__(self, name: str, **config: Any) -> None:
        super().__init__()
        self.name, self.loss = name, loss(name, **config)
        for key, value in config.items():
            if isinstance(value, nn.Module):
                self.add_module(key, value)

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """The loss of a batch; ``more`` are keyword arguments of this call alone."""
        return self.loss(*inputs, **more)

    def extra_repr(self) -> str:
        """Name of the loss, for the printed module."""
        return self.name


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
