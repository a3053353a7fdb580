"""
Prototypes: what Sinkhorn's assignments look like
=================================================

SwAV lets one view predict the prototypes of the other. Without a constraint all images would take
one prototype; Sinkhorn's iteration gives every prototype the same share of a batch.
"""

import matplotlib.pyplot as plt
import small_digits
import torch
from torch import nn

import diptych_contrast as dc


class Swav(nn.Module):
    """SwAV with 30 prototypes."""

    def __init__(self):
        super().__init__()
        self.prototypes = dc.Prototypes(32, 30)

    def forward(self, views, digits):
        unit = nn.functional.normalize(views, dim=-1)
        return dc.swav_loss([self.prototypes(view) for view in unit])


loss = Swav()
z = small_digits.train(loss)(small_digits.IMAGES)
with torch.no_grad():
    assigned = dc.sinkhorn(loss.prototypes(z)).argmax(1)
table = torch.zeros(10, 30).index_put_(
    (small_digits.DIGITS, assigned), torch.tensor(1.0), accumulate=True
)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].imshow(table[:, table.argmax(0).argsort()], aspect="auto", cmap="Blues")
axes[0].set(xlabel="prototype", ylabel="digit", title="Images of a digit on a prototype")
small_digits.plane(z, axes[1], "embeddings")
plt.show()

# %%
# Prototypes are pure where one digit fills them, and they share the images evenly:

print(f"purity {float(table.amax(0).sum() / table.sum()):.2f}")
print(f"images on a prototype: {int(table.sum(0).min())} to {int(table.sum(0).max())}")
