"""
Matching: two modalities, hardest negatives
===========================================

The left half of a digit has to find its right half. CLIP's loss looks at all other halves, the
hinge of BiRank at the hardest one alone; retrieval counts how often the own half comes first.
"""

import matplotlib.pyplot as plt
import small_digits
import torch
from torch import nn

import diptych_contrast as dc

LEFT = small_digits.IMAGES.view(-1, 8, 8)[:, :, :4].flatten(1)
RIGHT = small_digits.IMAGES.view(-1, 8, 8)[:, :, 4:].flatten(1)
LOSSES = {
    "CLIP": lambda x, y: dc.clip_loss(x, y, 0.1),
    "BiRank": lambda x, y: dc.birank((x, y)),
    "CLIP, told the digit": lambda x, y: dc.clip_loss(x, y, 0.1),
}


def train(loss, told=False):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32)) for _ in range(2)]
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], lr=2e-3)
    for _ in range(200):
        rows = torch.randint(0, 1400, (256,))
        x, y = nets[0](LEFT[rows]), nets[1](RIGHT[rows])
        value = loss(x, y)
        if told:
            value = value + dc.label_guided(x, y, small_digits.DIGITS[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        return nets[0](LEFT[1400:]), nets[1](RIGHT[1400:])


figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for place, (name, loss) in enumerate(LOSSES.items()):
    x, y = train(loss, told="told" in name)
    found = dc.retrieval(x, y).x_to_y.recall
    axis.bar(torch.arange(len(found)) + 0.25 * (place - 1), list(found.values()), 0.25, label=name)
axis.set_xticks(range(len(found)), [f"R@{k}" for k in found])
axis.set(ylabel="own half among the first k", title="397 unseen digits")
axis.legend()
plt.show()
