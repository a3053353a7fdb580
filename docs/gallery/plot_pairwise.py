"""
Pairwise losses: what the score histograms say
==============================================

NT-Xent pulls two views of an image together and pushes all other images away; SupCon, which knows
the digits, pulls all images of a digit together. The histogram of the scores shows the difference:
without labels the scores of different images of one digit stay far below those of two views.
"""

import matplotlib.pyplot as plt
import small_digits
import torch

import diptych_contrast as dc

LOSSES = {
    "NT-Xent": lambda views, digits: dc.nt_xent(views[0], views[1], 0.2),
    "SupCon": lambda views, digits: dc.sup_con(views, digits, 0.2),
}

figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
for row, (name, loss) in zip(axes, LOSSES.items(), strict=True):
    z = small_digits.train(loss)(small_digits.IMAGES)
    scores = (z @ z.T)[~torch.eye(len(z), dtype=torch.bool)]
    same = (small_digits.DIGITS[:, None] == small_digits.DIGITS)[
        ~torch.eye(len(z), dtype=torch.bool)
    ]
    for part, label in ((scores[same], "same digit"), (scores[~same], "other digit")):
        row[0].hist(part, 60, density=True, histtype="step", label=label)
    row[0].legend(loc="upper left")
    row[0].set(title=f"{name}: cosine of two images", xlim=(-1, 1))
    small_digits.plane(z, row[1], f"{name}: embeddings")
plt.show()

# %%
# Both losses run over the same tiles. What they tell about their pairs comes from the same sweep:

x, y = (small_digits.view(small_digits.IMAGES[:512]) for _ in range(2))
loss, info = dc.nt_xent(x, y, 0.2, return_info=True)
print(f"loss {loss:.3f}, positives {info.pos_mean:.2f}, negatives {info.neg_mean:.2f}")
print(f"a positive is the nearest of all in {100 * info.top1:.0f} % of the rows")
