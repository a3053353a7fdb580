"""
Diagnostics: has the embedding collapsed?
=========================================

The spectrum of the embeddings tells how many directions are in use. A network that was trained
with attraction alone falls into a few; RankMe turns the spectrum into one number.
"""

import matplotlib.pyplot as plt
import small_digits
import torch

import diptych_contrast as dc

LOSSES = {
    "NT-Xent": lambda views, digits: dc.nt_xent(views[0], views[1], 0.2),
    "attraction alone": lambda views, digits: dc.alignment(views[0], views[1]),
    "alignment + uniformity": lambda views, digits: (
        dc.alignment(views[0], views[1]) + (dc.uniformity(views[0]) + dc.uniformity(views[1])) / 2
    ),
}

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name, loss in LOSSES.items():
    z = small_digits.train(loss)(small_digits.IMAGES)
    spectrum = torch.linalg.svdvals(z)
    axis.semilogy(spectrum / spectrum[0], label=f"{name}: RankMe {float(dc.rank_me(z)):.1f}")
axis.set(xlabel="direction", ylabel="singular value, relative", title="Spectra of embeddings")
axis.legend()
plt.show()

# %%
# ``collapse_report`` names what is wrong with an embedding, here with a dead dimension.

z = torch.cat([z[:, :31], torch.zeros(len(z), 1)], dim=1)
print(dc.collapse_report(z))
