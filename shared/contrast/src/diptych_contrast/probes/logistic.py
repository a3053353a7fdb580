"""Multinomial logistic regression in fp64, fitted by L-BFGS."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]


def fit_logistic(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    classes: int,
    l2: float,
    start: Float[Tensor, "d1 classes"] | None = None,
    tolerance: float = 1e-6,
) -> Float[Tensor, "d1 classes"]:
    """Minimise the mean cross-entropy plus ``l2/2 ||W||^2``; the bias is not penalised.

    Args:
        x: Features, fp64.
        y: Classes, 0 to ``classes - 1``.
        classes: Number of classes.
        l2: Weight of the penalty; scikit-learn's C is ``1 / (n l2)``.
        start: Where to start; default 0.
        tolerance: Largest component of the gradient at which to stop.

    Returns:
        Weights, and the bias in the last row.
    """
    n, d = x.shape
    onto = torch.arange(n, device=x.device)

    def objective(flat: Tensor) -> tuple[float, Tensor]:
        theta = flat.view(d + 1, classes)
        weight = theta[:d]
        logits = torch.addmm(theta[d], x, weight)
        log_total = torch.logsumexp(logits, dim=1, keepdim=True)
        loss = (log_total[:, 0] - logits[onto, y]).mean() + l2 / 2 * weight.square().sum()
        error = (logits - log_total).exp_()
        error[onto, y] -= 1
        error /= n
        gradient = torch.cat([x.T @ error + l2 * weight, error.sum(0, keepdim=True)])
        return float(loss), gradient.flatten()

    first = x.new_zeros(d + 1, classes) if start is None else start
    return minimise(objective, first.flatten(), tolerance=tolerance).view(d + 1, classes)


def minimise(
    objective: Objective,
    start: Float[Tensor, " p"],
    *,
    iterations: int = 100,
    memory: int = 10,
    tolerance: float = 1e-6,
) -> Float[Tensor, " p"]:
    """Minimise a smooth convex function by L-BFGS (Nocedal and Wright, 2006, algorithm 7.5).

    Args:
        objective: Value and gradient at a point.
        start: First point.
        iterations: Most iterations.
        memory: Steps that the curvature estimate remembers.
        tolerance: Stop where no component of the gradient is larger.

    Returns:
        The last point, whose value is the lowest seen.
    """
    point = start
    value, gradient = objective(point)
    history: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)
    for _ in range(iterations):
        if float(gradient.abs().max()) <= tolerance:
            break
        direction = _direction(gradient, history)
        length = 1.0 if history else min(1.0, 1 / float(gradient.abs().sum()))
        found = _line_search(objective, point, value, gradient, direction, length)
        if found is None:
            break
        length, value, new_gradient = found
        step, change = length * direction, new_gradient - gradient
        point, gradient = point + step, new_gradient
        curvature = float(step @ change)
        if curvature > 0:
            history.append((step, change, curvature))
    return point


def _direction(gradient: Tensor, history: deque[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Minus the inverse Hessian estimate times the gradient (the two-loop recursion)."""
    direction = -gradient
    weights = []
    for step, change, curvature in reversed(history):
        weight = float(step @ direction) / curvature
        direction = direction - weight * change
        weights.append(weight)
    if history:
        _, change, curvature = history[-1]
        direction = direction * (curvature / float(change @ change))
    for (step, change, curvature), weight in zip(history, reversed(weights), strict=True):
        direction = direction + (weight - float(change @ direction) / curvature) * step
    return direction


def _line_search(
    objective: Objective,
    point: Tensor,
    value: float,
    gradient: Tensor,
    direction: Tensor,
    length: float,
) -> tuple[float, float, Tensor] | None:
    """A step that meets the weak Wolfe conditions, by bisection (Lewis and Overton, 2013).

    None where rounding hides any further descent.
    """
    slope = float(gradient @ direction)
    low, high = 0.0, float("inf")
    for _ in range(30):
        new_value, new_gradient = objective(point + length * direction)
        if not new_value <= value + 1e-4 * length * slope:
            high = length
        elif float(new_gradient @ direction) < 0.9 * slope:
            low = length
        else:
            return length, new_value, new_gradient
        length = (low + high) / 2 if high < float("inf") else 2 * low
    return None
