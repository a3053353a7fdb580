"""
Discovery: how large are classes that nobody labelled?
======================================================

Seven of ten digits are partly labelled, and they come in unequal numbers. BaCon's estimate clusters
all features, gives clusters to the known classes, and reads the share of every class from them.
"""

import matplotlib.pyplot as plt
import small_digits
import torch

import diptych_contrast as dc

z = small_digits.train(lambda views, digits: dc.nt_xent(views[0], views[1], 0.2), steps=300)(
    small_digits.IMAGES
)
rank = torch.arange(len(z)) % 100
kept = rank < 100 - 7 * small_digits.DIGITS  # later digits are rarer
z, digits = z[kept], small_digits.DIGITS[kept]
labelled = (digits < 7) & (torch.arange(len(z)) % 2 == 0)

share = dc.estimate_class_distribution(z, digits, labelled, 10)
true = torch.bincount(digits, minlength=10) / len(digits)

figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
axis.bar(torch.arange(10) - 0.2, true, 0.4, label="true share")
axis.bar(torch.arange(10) + 0.2, share, 0.4, label="estimate")
axis.set(xlabel="class (7 to 9 are new)", xticks=range(10), title="Shares of classes")
axis.legend()
plt.show()

# %%
# How well clusters match the classes, known and new, with one assignment over all of them:

centres, clusters = dc.spherical_kmeans(z, 10)
print(dc.cluster_accuracy(digits, clusters, torch.arange(7)))
