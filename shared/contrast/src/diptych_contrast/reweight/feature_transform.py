"""Feature transformation: extrapolated positives, mixed negatives."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from diptych_contrast.common import read_embeddings, read_options
from diptych_contrast.errors import ContrastInputError
from diptych_contrast.kernel.normalize import unit_rows
from diptych_contrast.reweight.cacr import stored_keys
from diptych_contrast.rowwise import refuse
from diptych_contrast.state import KeyQueue


def feature_transform(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    queue: KeyQueue | Float[Tensor, "m d"],
    *,
    alpha_pos: float = 2.0,
    alpha_neg: float = 1.6,
    per_dimension: bool = True,
    renormalize: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Harder positives by extrapolation, more diverse negatives by mixing (Zhu et al., 2021).

    ``q' = a q + (1 - a) k``, ``k' = a k + (1 - a) q`` with ``a ~ 1 + Beta(alpha_pos, alpha_pos)``,
    so that for unit rows and one a for a row the score s becomes ``s - 2 a (a - 1)(1 - s)``; the
    queue is mixed with its own permutation, weights ``Beta(alpha_neg, alpha_neg)``. Hand all
    three to `info_nce`, and enqueue k itself: this function changes no queue.

    Args:
        q: Unit queries, shape (n, d).
        k: Unit keys, shape (n, d), taken without gradient.
        queue: Unit keys of earlier batches, `KeyQueue` or shape (m, d).
        alpha_pos: Concentration of the extrapolation, > 0.
        alpha_neg: Concentration of the mixing, > 0.
        per_dimension: One weight a dimension instead of one a row.
        renormalize: Bring the results back to length 1.
        generator: Source of the weights and of the permutation, on the device of ``q``.

    Returns:
        q', k' and the transformed queue.

    Example:
        >>> q, g = torch.eye(4), torch.Generator().manual_seed(0)
        >>> [x.shape[0] for x in feature_transform(q, q, torch.ones(6, 4), generator=g)]
        [4, 4, 6]
    """
    options = read_options("feature_transform", {"normalize": False})
    for name, value in (("alpha_pos", alpha_pos), ("alpha_neg", alpha_neg)):
        wrong = not 0 < value < math.inf
        refuse(options.function, (name, wrong, f"is {value}", "pass a finite number above 0"))
    if generator is None:
        raise ContrastInputError(
            options.function, "generator", "is None", "pass a seeded torch.Generator"
        )
    first, second = read_embeddings(options, q=q, k=k.detach()).unbind(0)
    stored = stored_keys(options, queue, first)

    def draw(like: Tensor, concentration: float) -> Tensor:
        shape = like.shape if per_dimension else (len(like), 1)
        shapes = like.new_full((2, *shape), concentration)
        gamma = torch._standard_gamma(shapes, generator=generator)
        return gamma[0] / gamma.sum(0).clamp_min(torch.finfo(like.dtype).tiny)

    a, b = 1.0 + draw(first, alpha_pos), draw(stored, alpha_neg)
    order = torch.randperm(len(stored), generator=generator, device=stored.device)
    results = (
        a * first + (1.0 - a) * second,
        (a * second + (1.0 - a) * first).detach(),
        b * stored + (1.0 - b) * stored[order],
    )
    x, y, negatives = (unit_rows(part) for part in results) if renormalize else results
    return x, y, negatives
