"""
More views: what the spectrum gains
===================================

With four views of each image the losses differ in what repels. MV-DHEL repels other images within
each view only, away from the views that attract: it spreads over more directions than the form
that puts everything into one sum.
"""

import matplotlib.pyplot as plt
import small_digits
import torch

import diptych_contrast as dc

LOSSES = {
    "NT-Xent over all views": lambda views, digits: dc.nt_xent_multi(views, 0.2),
    "PVC, geometric": lambda views, digits: dc.poly_view(views, 0.2),
    "MV-InfoNCE": lambda views, digits: dc.mv_info_nce(views, 0.2),
    "MV-DHEL": lambda views, digits: dc.mv_dhel(views, 0.2),
}

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name, loss in LOSSES.items():
    z = small_digits.train(loss, views=4, steps=100)(small_digits.IMAGES)
    spectrum = torch.linalg.svdvals(z)
    axis.semilogy(spectrum / spectrum[0], label=f"{name}: RankMe {float(dc.rank_me(z)):.1f}")
axis.set(xlabel="direction", ylabel="singular value, relative", title="Four views")
axis.legend()
plt.show()
