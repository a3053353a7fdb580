"""The one table of all losses: what exists, by name, with formula, paper and reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

from torch import Tensor

from diptych_contrast.common import Common, Options
from diptych_contrast.inputs import check_known
from diptych_contrast.reference import others, pairs


@dataclass(frozen=True)
class LossSpec:
    """What is known about a loss.

    Attributes:
        name: Public name.
        formula: Loss of one row, the second paragraph of its docstring.
        paper: Where it comes from, the brackets of the first line of its docstring.
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


# All losses: by family, then by what they need beside two views.
_TABLE = {
    "pairwise": {
        "": "nt_xent clip_loss siglip dcl dclw hcl debiased n_pairs",
        "queue": "info_nce",
        "labels": "sup_con soft_sup_con contrastive_margin multi_similarity circle",
    },
    "multiview": {"views>=2": "nt_xent_multi mv_info_nce mv_dhel poly_view"},
    "cluster": {"views>=2 prototypes": "swav_loss", "clusters": "proto_nce"},
    "salient": {"targets": "sep_clr"},
    "reweight": {
        "views>=2": "cacr",
        "heads PairTemperature": "amcl",
        "labels PairGate": "arbitrary_pairs",
    },
    "discover": {"probabilities": "soft_con", "views>=2 logits": "self_distillation"},
    "matching": {
        "": "birank",
        "labels": "triplet label_guided",
        "anchor": "boost_abs boost_rel boost_kl boost_pro",
    },
}


def losses() -> dict[str, LossSpec]:
    """Return the table of all losses: specification by name."""
    return {
        name: _spec(family, name, needs)
        for family, members in _TABLE.items()
        for needs, names in members.items()
        for name in names.split()
    }


def _spec(family: str, name: str, needs: str) -> LossSpec:
    function = getattr(import_module(f"diptych_contrast.{family}"), name)
    first, formula, *_ = (inspect.getdoc(function) or "()\n\n").split("\n\n")
    parameters = inspect.signature(function).parameters
    own = {
        key: value.default for key, value in parameters.items() if value.default is not value.empty
    }
    common = {key: getattr(Options(name), key) for key in Common.__annotations__}
    return LossSpec(
        name=name,
        formula=" ".join(formula.split()),
        paper=" ".join(first[first.rindex("(") + 1 : first.rindex(")")].split()),
        needs=tuple(needs.split()),
        defaults=MappingProxyType({**own, **common}),
        parity=("official",) if "parity" in own else (),
        function=function,
        reference=getattr(pairs if hasattr(pairs, name) else others, name),
    )


def _find(function: str, name: str) -> LossSpec:
    table = losses()
    check_known(function, "name", name, table)
    return table[name]


def loss(name: str, **config: Any) -> Callable[..., Any]:
    """Look a loss up by name and set its keyword arguments, as a config section does.

    Example:
        >>> loss("nt_xent", temperature=0.2).keywords
        {'temperature': 0.2}
    """
    spec = _find("loss", name)
    for key in config:
        check_known(name, key, key, spec.defaults)
    return partial(spec.function, **config)


def explain(name: str) -> str:
    """Say what a loss computes, where it comes from and what it takes.

    Example:
        >>> explain("nt_xent").splitlines()[0]
        'nt_xent: Chen et al., 2020, SimCLR'
    """
    spec = _find("explain", name)
    defaults = ", ".join(f"{key}={value!r}" for key, value in spec.defaults.items())
    lines = [
        f"{spec.name}: {spec.paper}",
        f"takes: {defaults}",
        f"needs: {', '.join(spec.needs) or 'nothing more'}",
        f"other forms: {', '.join(spec.parity) or 'none'}",
        "",
        inspect.getdoc(spec.function) or "",
        "",
        "What arguments mean in all losses: help(diptych_contrast)",
        "",
        "The same, dense and in float64:",
        inspect.getsource(spec.reference),
    ]
    return "\n".join(lines)
