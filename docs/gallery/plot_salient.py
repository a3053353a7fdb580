"""
Common and salient: what only targets have
==========================================

Generated samples share three factors; targets (patients, say) have one more. SepCLR writes what all
share into one vector and what only targets have into another: the salient factor can be read from
the salient vector, and hardly from the common one.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import diptych_contrast as dc

torch.manual_seed(0)
torch.set_num_threads(1)
data = dc.testing.salient(1000, seed=0)
common, salient = nn.Linear(24, 3), nn.Linear(24, 1)
optimizer = torch.optim.Adam([*common.parameters(), *salient.parameters()], lr=1e-2)
terms = []
for _ in range(300):
    loss, parts = dc.sep_clr(common(data.views), salient(data.views), data.target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    terms.append((float(parts.salient), float(parts.information_less), float(parts.independence)))

target = data.target == 1
with torch.no_grad():
    vector = salient(data.views[0])
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].plot(terms, label=["salient", "information-less", "independence"])
axes[0].set(xlabel="step", title="Terms of the loss")
axes[0].legend()
axes[1].scatter(data.salient[target], vector[target, 0], s=4, label="target")
axes[1].scatter(data.salient[~target], vector[~target, 0], s=4, label="background (unseen factor)")
axes[1].set(xlabel="salient factor", ylabel="salient vector")
axes[1].legend()
plt.show()
