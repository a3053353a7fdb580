"""What the examples share: digits, random views, a small network and a training of seconds."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

torch.manual_seed(0)
torch.set_num_threads(1)
_x, _y = load_digits(return_X_y=True)
IMAGES, DIGITS = torch.tensor(_x / 16).float(), torch.tensor(_y)


def view(x: Tensor) -> Tensor:
    """The same images moved by up to a pixel, with another contrast and some noise."""
    n = len(x)
    padded = nn.functional.pad(x.view(n, 8, 8), (1, 1, 1, 1))
    shift = torch.randint(0, 3, (2, n, 1)) + torch.arange(8)
    moved = padded[torch.arange(n)[:, None, None], shift[0][:, :, None], shift[1][:, None, :]]
    noisy = moved * (0.7 + 0.6 * torch.rand(n, 1, 1)) + 0.1 * torch.randn(n, 8, 8)
    return noisy.flatten(1)


def train(
    loss: Callable[[Tensor, Tensor], Tensor], views: int = 2, dim: int = 32, steps: int = 150
) -> Callable[[Tensor], Tensor]:
    """Train a small network with ``loss(views, digits)``; from images to unit embeddings."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, dim))
    own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    optimizer = torch.optim.Adam([*net.parameters(), *own], lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(0, len(IMAGES), (256,))
        stacked = torch.cat([view(IMAGES[rows]) for _ in range(views)])
        value = loss(net(stacked).view(views, len(rows), dim), DIGITS[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    return lambda images: nn.functional.normalize(net(images), dim=1)


def plane(embeddings: Tensor, axis: plt.Axes, title: str) -> None:
    """The two strongest directions of embeddings, coloured by digit."""
    centred = embeddings - embeddings.mean(0)
    flat = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    axis.scatter(*flat.T, c=DIGITS, cmap="tab10", s=4)
    axis.set(title=title, xticks=[], yticks=[])
