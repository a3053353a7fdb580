"""
Reweighting: watching the scores of pairs
=========================================

The feature transformation of Zhu et al. moves positives apart and mixes the negatives of a queue.
The pair-score monitor shows what that does: positives become harder, negatives more alike. CACR
instead weighs pairs: far positives and near negatives count most.
"""

import matplotlib.pyplot as plt
import small_digits
import torch

import diptych_contrast as dc

LOSSES = {
    "NT-Xent": lambda views, digits: dc.nt_xent(views[0], views[1], 0.2),
    "CACR": lambda views, digits: dc.cacr(views),
}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for axis, (name, loss) in zip(axes, LOSSES.items(), strict=True):
    encode = small_digits.train(loss)
    x, y = (encode(small_digits.view(small_digits.IMAGES)) for _ in range(2))
    seen = dc.positive_negative_scores(x, y)
    half = len(x) // 2
    generator = torch.Generator().manual_seed(0)
    q, k, queue = dc.feature_transform(x[:half], y[:half], y[half:], generator=generator)
    for label, scores in (
        ("negatives", x[:half] @ y[half:].T),
        ("negatives, transformed", q @ queue.T),
        ("positives", (x * y).sum(1)),
        ("positives, transformed", (q * k).sum(1)),
    ):
        axis.hist(scores.flatten(), 60, range=(-1, 1), density=True, histtype="step", label=label)
    axis.set(title=name, xlabel="score")
axes[0].legend(fontsize="small")
plt.show()

# %%
# The monitor gives plain numbers and histograms, made for a log:

print(f"positives {seen.positive_mean:.2f}, negatives {seen.negative_mean:.2f}")
