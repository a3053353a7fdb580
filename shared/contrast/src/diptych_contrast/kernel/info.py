"""What a loss tells about its pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairInfo:
    """Detached statistics of one loss; scores are before the temperature.

    Attributes:
        n_rows: Rows that ask for their positives.
        n_valid: Rows that have at least one positive and one other column.
        n_positive_pairs: Pairs of a row and a positive.
        n_zero_rows: Embeddings that are exactly zero.
        pos_mean: Mean score of the positives.
        pos_var: Their variance.
        neg_mean: Mean score of the negatives.
        neg_var: Their variance.
        exp_neg_mean: Mean of ``exp(score / temperature)`` over the negatives.
        top1: Fraction of valid rows whose best-scored column is a positive.
        logit_max: Largest score over the temperature.
        temperature: The temperature.
    """

    n_rows: int
    n_valid: Tensor
    n_positive_pairs: Tensor
    n_zero_rows: Tensor
    pos_mean: Tensor
    pos_var: Tensor
    neg_mean: Tensor
    neg_var: Tensor
    exp_neg_mean: Tensor
    top1: Tensor
    logit_max: Tensor
    temperature: Tensor
