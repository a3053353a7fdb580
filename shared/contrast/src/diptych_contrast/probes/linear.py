"""Linear classification on frozen embeddings, with all labels or a few; what probes share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_contrast.errors import ContrastInputError, warn
from diptych_contrast.inputs import check_dimension, check_finite, check_integers, check_least

GRID = tuple(10.0**power for power in range(2, -7, -1))
Penalty = float | Literal["cv"]
Interval = tuple[float, float]


def standardise(
    x: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Features in fp64 with mean 0 and standard deviation 1, the mean, and the scale.

    A dimension that does not vary gets scale 1 and becomes 0.
    """
    wide = x.detach().double()
    mean, scale = wide.mean(0), wide.std(0, correction=0)
    scale = torch.where(scale > 1e-12 * wide.abs().amax(0), scale, 1)
    return (wide - mean) / scale, mean, scale


def reduce_basis(
    x: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "d r"] | None]:
    """The same rows in an orthonormal basis of their span, where that is smaller, and the basis.

    The penalised solution lies in this span, so fits are the same and cost less.
    """
    if x.shape[0] >= x.shape[1]:
        return x, None
    basis, coordinates = torch.linalg.qr(x.T)
    return coordinates.T, basis


def check_penalty(function: str, l2: object, *, zero: bool) -> None:
    """Refuse a penalty that is neither ``"cv"`` nor a finite number, from or above 0."""
    number = isinstance(l2, int | float) and (0 < l2 < math.inf or (zero and l2 == 0))
    if l2 != "cv" and not number:
        fix = f"pass 'cv' or a number {'from' if zero else 'above'} 0"
        raise ContrastInputError(function, "l2", f"is {l2!r}", fix)


def choose_penalty(
    function: str, held_out_loss: Callable[[float], float]
) -> tuple[float, dict[float, float]]:
    """The penalty of lowest held-out loss, looked for from strong to weak.

    Stops after two values in a row without improvement.
    """
    losses: dict[float, float] = {}
    best = GRID[0]
    for position, l2 in enumerate(GRID):
        losses[l2] = held_out_loss(l2)
        if math.isnan(losses[l2]):
            found = "is 'cv', but no fold holds a class that the others hold too"
            fix = "pass a number, or at least two rows (groups) a class"
            raise ContrastInputError(function, "l2", found, fix)
        if losses[l2] < losses[best]:
            best = l2
        elif position - GRID.index(best) >= 2:
            break
    return best, losses


def deal_folds(
    function: str, y: Int[Tensor, " n"], groups: Int[Tensor, " n"] | None, folds: int = 5
) -> Int[Tensor, " n"]:
    """Number of the fold of every row: classes spread evenly, groups kept whole.

    Fewer rows or groups than folds give fewer folds.
    """
    classes = y.cpu().numpy()
    if groups is None:
        _check_count(function, "train", len(classes))
        fold = np.empty(len(classes), dtype=np.int64)
        fold[np.argsort(classes, kind="stable")] = np.arange(len(classes)) % folds
        return torch.from_numpy(fold).to(y.device)
    _, member = np.unique(groups.cpu().numpy(), return_inverse=True)
    table = np.zeros((member.max() + 1, classes.max() + 1), dtype=np.int64)
    np.add.at(table, (member, classes), 1)
    _check_count(function, "groups", len(table))
    load = np.zeros((min(folds, len(table)), table.shape[1]))
    of_group = np.empty(len(table), dtype=np.int64)
    major = table.argmax(1)
    for group in np.lexsort((-table.sum(1), major)):
        lightest = np.lexsort((load.sum(1), load[:, major[group]]))[0]
        of_group[group] = lightest
        load[lightest] += table[group]
    return torch.from_numpy(of_group[member]).to(y.device)


def _check_count(function: str, argument: str, count: int) -> None:
    if count < 2:
        found, fix = f"holds {count}, too few for cross-validation", "pass l2 as a number"
        raise ContrastInputError(function, argument, found, fix)


def bootstrap_classes(
    y: npt.NDArray[np.int64],
    correct: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.int64],
    resamples: int,
    seed: int,
) -> tuple[Interval, Interval]:
    """95 % percentile intervals of accuracy and balanced accuracy, resampling whole groups.

    A class that a resample does not hold is left out of its balanced accuracy.
    """
    source = np.random.default_rng(seed)
    _, member = np.unique(groups, return_inverse=True)
    n_groups, n_classes = int(member.max()) + 1, int(y.max()) + 1
    values = np.empty((resamples, 2))
    for row in values:
        counts = np.bincount(source.integers(n_groups, size=n_groups), minlength=n_groups)
        weight = counts[member]
        total = np.bincount(y, weight, n_classes)
        right = np.bincount(y, weight * correct, n_classes)
        present = total > 0
        row[:] = right.sum() / total.sum(), (right[present] / total[present]).mean()
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe and what it says of the test rows.

    Weights act on standardised features, ``(x - mean) / scale``. ``held_out_losses`` holds the
    mean cross-entropy by l2 where l2 was chosen. Scores are None without test labels; intervals
    are 95 % bootstrap intervals over the test groups.
    """

    classes: Int[Tensor, " c"]
    weight: Float[Tensor, "d c"]
    bias: Float[Tensor, " c"]
    l2: float
    held_out_losses: Mapping[float, float]
    predictions: Int[Tensor, " q"]
    probabilities: Float[Tensor, "q c"]
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    balanced_accuracy: float | None = None
    balanced_accuracy_interval: Interval | None = None
    per_class: Mapping[int, float] | None = None


def linear_probe(
    train: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    test: Float[Tensor, "q d"],
    l2: Penalty = "cv",
    groups: Int[Tensor, " n"] | None = None,
    *,
    test_y: Int[Tensor, " q"] | None = None,
    test_groups: Int[Tensor, " q"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> LinearProbe:
    """Multinomial logistic regression on embeddings standardised by the training rows.

    Minimises ``mean cross-entropy + l2/2 ||W||^2`` (bias free; scikit-learn's C is ``1/(n l2)``)
    in fp64 by at most 100 iterations of L-BFGS. With ``"cv"`` l2 is the value among 1e2, 1e1 ..
    1e-6 of lowest held-out cross-entropy in 5 folds; the search goes from strong to weak and
    stops after two values in a row without improvement.

    Args:
        groups: Subject of a training row; a subject is never in two folds.
        test_groups: Subject of a test row, the unit of the bootstrap; default: the row.

    Example:
        >>> x, y = torch.eye(8), torch.arange(8) % 2
        >>> linear_probe(x, y, x, l2=1e-3, test_y=y).accuracy
        1.0
    """
    _check_probe("linear_probe", train, y, test, l2, groups)
    for name, values in (("test_y", test_y), ("test_groups", test_groups)):
        if values is not None:
            check_integers("linear_probe", name, values, test.shape[0])
    features, mean, scale = standardise(train)
    unseen = (test.detach().double() - mean) / scale
    probe = LinearProbe(*_fit("linear_probe", features, y, l2, groups, unseen), mean, scale)
    return probe if test_y is None else _scored(probe, test_y, test_groups, resamples, seed)


@dataclass(frozen=True)
class FewLabelProbe:
    """Probes on a few labelled rows a class: one entry a draw, and their means."""

    accuracy: float
    balanced_accuracy: float
    accuracies: tuple[float, ...]
    balanced_accuracies: tuple[float, ...]
    rows: tuple[npt.NDArray[np.int64], ...]


def few_label_probe(
    train: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    test: Float[Tensor, "q d"],
    test_y: Int[Tensor, " q"],
    n_per_class: int = 5,
    repeats: int = 5,
    seed: int = 0,
    *,
    l2: Penalty = "cv",
    groups: Int[Tensor, " n"] | None = None,
) -> FewLabelProbe:
    """Linear probes on randomly drawn training rows, the same number for each class.

    Features are standardised by all training rows, which needs no labels. Every draw has its own
    generator, so one more repeat does not change the earlier ones. Of a smaller class all rows are
    drawn, with a `ContrastWarning`. A second row of a subject (``groups``) is drawn only when every
    subject of the class has given one. ``l2="cv"`` needs at least two rows a class.
    """
    _check_probe("few_label_probe", train, y, test, l2, groups)
    check_integers("few_label_probe", "test_y", test_y, test.shape[0])
    check_least("few_label_probe", 1, n_per_class=n_per_class, repeats=repeats)
    features, mean, scale = standardise(train)
    unseen = (test.detach().double() - mean) / scale
    labels = y.cpu().numpy()
    member = np.arange(len(labels)) if groups is None else groups.cpu().numpy()
    if int(np.unique(labels, return_counts=True)[1].min()) < n_per_class:
        found = "is larger than a class"
        fix = "all rows of that class are drawn; pass a smaller number"
        warn("few_label_probe", "n_per_class", found, fix)
    drawn, scores = [], []
    for repeat in range(repeats):
        source = np.random.default_rng([seed, repeat])
        drawn.append(_draw_rows(labels, member, n_per_class, source))
        index = torch.from_numpy(drawn[-1]).to(y.device)
        chosen = None if groups is None else groups[index]
        fit = _fit("few_label_probe", features[index], y[index], l2, chosen, unseen)
        scores.append(_recalls(fit.predictions == test_y, test_y)[:2])
    plain, balanced = zip(*scores, strict=True)
    means = float(np.mean(plain)), float(np.mean(balanced))
    return FewLabelProbe(*means, plain, balanced, tuple(drawn))


def _draw_rows(
    labels: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    count: int,
    source: np.random.Generator,
) -> npt.NDArray[np.int64]:
    chosen = []
    for label in np.unique(labels):
        rows = source.permutation(np.flatnonzero(labels == label))
        seen: Counter[int] = Counter()
        turns = []
        for group in groups[rows].tolist():
            turns.append(seen[group])
            seen[group] += 1
        chosen.append(rows[np.argsort(turns, kind="stable")][:count])
    return np.sort(np.concatenate(chosen))


class _Fit(NamedTuple):
    """The first fields of `LinearProbe`."""

    classes: Tensor
    weight: Tensor
    bias: Tensor
    l2: float
    held_out_losses: dict[float, float]
    predictions: Tensor
    probabilities: Tensor


def _fit(
    function: str, x: Tensor, y: Tensor, l2: Penalty, groups: Tensor | None, unseen: Tensor
) -> _Fit:
    """Fit standardised features, and predict unseen ones."""
    classes, index = torch.unique(y, return_inverse=True)
    rows, basis = reduce_basis(x)
    losses: dict[float, float] = {}
    if l2 == "cv":
        l2, losses = _choose(function, rows, index, len(classes), groups)
    theta = fit_logistic(rows, index, len(classes), l2)
    weight = theta[:-1] if basis is None else basis @ theta[:-1]
    shares = torch.softmax(unseen @ weight + theta[-1], dim=1)
    return _Fit(classes, weight, theta[-1], l2, losses, classes[shares.argmax(1)], shares)


def fit_logistic(
    x: Tensor,
    y: Tensor,
    classes: int,
    l2: float,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
) -> Tensor:
    """Weights (d, classes) and the bias below them that minimise the penalised cross-entropy.

    Stops where no component of the gradient is above ``tolerance``; starts from 0.
    """
    n, d = x.shape
    theta = x.new_zeros(d + 1, classes) if start is None else start.clone()
    theta.grad = torch.empty_like(theta)
    onto = torch.arange(n, device=x.device)

    def objective() -> Tensor:
        weight, slope = theta[:d], theta.grad
        assert slope is not None
        logits = torch.addmm(theta[d], x, weight)
        total = torch.logsumexp(logits, dim=1, keepdim=True)
        error = (logits - total).exp_()
        error[onto, y] -= 1
        torch.addmm(weight, x.T, error, beta=l2, alpha=1 / n, out=slope[:d])
        slope[d] = error.mean(0)
        return (total[:, 0] - logits[onto, y]).mean() + l2 / 2 * weight.square().sum()

    torch.optim.LBFGS(
        [theta],
        max_iter=100,
        max_eval=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-15,
        history_size=10,
        line_search_fn="strong_wolfe",
    ).step(objective)  # type: ignore[no-untyped-call]
    return theta


def _choose(
    function: str, rows: Tensor, y: Tensor, classes: int, groups: Tensor | None
) -> tuple[float, dict[float, float]]:
    fold = deal_folds(function, y, groups)
    numbers = torch.unique(fold).tolist()
    starts: dict[int, Tensor] = {}

    def held_out_loss(l2: float) -> float:
        losses = []
        for number in numbers:
            train, test = fold != number, fold == number
            start = starts.get(number)
            theta = fit_logistic(rows[train], y[train], classes, l2, start, tolerance=1e-4)
            starts[number] = theta
            # No fit can know the other classes.
            known = test & torch.isin(y, torch.unique(y[train]))
            logits = rows[known] @ theta[:-1] + theta[-1]
            losses.append(torch.nn.functional.cross_entropy(logits, y[known], reduction="none"))
        return float(torch.cat(losses).mean())

    return choose_penalty(function, held_out_loss)


def _recalls(correct: Tensor, test_y: Tensor) -> tuple[float, float, dict[int, float]]:
    """Accuracy, balanced accuracy, recall by class."""
    recalls = {
        int(label): float(correct[test_y == label].double().mean())
        for label in torch.unique(test_y)
    }
    return float(correct.double().mean()), float(np.mean(list(recalls.values()))), recalls


def _scored(
    probe: LinearProbe, test_y: Tensor, groups: Tensor | None, resamples: int, seed: int
) -> LinearProbe:
    correct = probe.predictions == test_y
    accuracy, balanced, recalls = _recalls(correct, test_y)
    index = torch.unique(test_y, return_inverse=True)[1].cpu().numpy()
    member = np.arange(len(index)) if groups is None else groups.cpu().numpy()
    intervals = bootstrap_classes(index, correct.cpu().numpy(), member, resamples, seed)
    return replace(
        probe,
        accuracy=accuracy,
        accuracy_interval=intervals[0],
        balanced_accuracy=balanced,
        balanced_accuracy_interval=intervals[1],
        per_class=recalls,
    )


def _check_probe(
    function: str, train: Tensor, y: Tensor, test: Tensor, l2: Penalty, groups: Tensor | None
) -> None:
    check_dimension(function, train=train, test=test)
    check_finite(function, "train", train)
    check_finite(function, "test", test)
    check_integers(function, "y", y, train.shape[0])
    if groups is not None:
        check_integers(function, "groups", groups, train.shape[0])
    if len(torch.unique(y)) < 2:
        raise ContrastInputError(function, "y", "holds one class", "pass at least two classes")
    check_penalty(function, l2, zero=True)
