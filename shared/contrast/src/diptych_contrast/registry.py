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

from diptych_contrast.common import Common, Options
from diptych_contrast.errors import ContrastInputError
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


# All losses by family, each with what it needs beside two views.
_TABLE = {
    "pairwise": {
        "nt_xent": "",
        "info_nce": "queue",
        "sup_con": "labels",
        "soft_sup_con": "labels",
        "clip_loss": "",
        "siglip": "",
        "dcl": "",
        "dclw": "",
        "hcl": "",
        "debiased": "",
        "contrastive_margin": "labels",
        "multi_similarity": "labels",
        "n_pairs": "",
        "circle": "labels",
    },
    "multiview": dict.fromkeys(
        ("nt_xent_multi", "mv_info_nce", "mv_dhel", "poly_view"), "views>=2"
    ),
    "cluster": {"swav_loss": "views>=2 prototypes", "proto_nce": "clusters"},
    "salient": {"sep_clr": "targets"},
    "reweight": {
        "cacr": "views>=2",
        "amcl": "heads PairTemperature",
        "arbitrary_pairs": "labels PairGate",
    },
    "discover": {"soft_con": "probabilities", "self_distillation": "views>=2 logits"},
    "matching": {
        "triplet": "labels",
        "birank": "",
        **dict.fromkeys(("boost_abs", "boost_rel", "boost_kl", "boost_pro"), "anchor"),
        "label_guided": "labels",
    },
}


def losses() -> dict[str, LossSpec]:
    """Return the table of all losses: specification by name.

    Example:
        >>> losses()["clip_loss"].paper
        'Radford et al., 2021, CLIP'
    """
    return {
        name: _spec(family, name, needs)
        for family, members in _TABLE.items()
        for name, needs in members.items()
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
    if name not in table:
        near = get_close_matches(name, table, n=1, cutoff=0.0)
        fix = f"did you mean {near[0]!r}? All names: {', '.join(table)}"
        raise ContrastInputError(function, "name", f"is {name!r}", fix)
    return table[name]


def loss(name: str, **config: Any) -> Callable[..., Any]:
    """Look a loss up by name and set its keyword arguments, as a config section does.

    Args:
        name: Name in `losses`.
        **config: Keyword arguments of the loss.

    Example:
        >>> loss("nt_xent", temperature=0.2).keywords
        {'temperature': 0.2}
    """
    spec = _find("loss", name)
    for key in config:
        if key not in spec.defaults:
            near = get_close_matches(key, spec.defaults, n=1, cutoff=0.0)
            found = "is unknown"
            fix = f"did you mean {near[0]!r}? All keywords: {', '.join(spec.defaults)}"
            raise ContrastInputError(name, key, found, fix)
    return partial(spec.function, **config)


class Criterion(nn.Module):
    """A loss of the table as a module.

    A `Temperature` or another module among the arguments becomes a part of it, so that optimizers
    and state dicts find its parameters.

    Args:
        name: Name in `losses`.
        **config: Keyword arguments of the loss.

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
        "The same, dense and in float64:",
        inspect.getsource(spec.reference),
    ]
    return "\n".join(lines)
