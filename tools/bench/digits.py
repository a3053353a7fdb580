"""Every view-based loss on scikit-learn's 1,797 handwritten digits, one small encoder.

    python tools/bench/digits.py [--seeds 5] [--losses nt_xent,dcl] [--json FILE]

1,347 images train, 450 test. Views: shift by up to one pixel, contrast, noise, a hidden patch. The
frozen features are standardised and probed; raw pixels and the untrained encoder stand beside.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import diptych_contrast as dc

TEMPERATURE, BATCH, EPOCHS, PROTOTYPES = 0.2, 256, 60, 60
Loss = Callable[[Tensor, Tensor], Tensor]  # (views, labels) -> loss
COLUMNS = ("probe", "few", "knn", "rank", "head_rank")


def align_uniform(views: Tensor, _: Tensor) -> Tensor:
    """Alignment and uniformity (Wang and Isola, 2020)."""
    x, y = views
    return dc.alignment(x, y) + (dc.uniformity(x) + dc.uniformity(y)) / 2


class Swav(nn.Module):
    """SwAV without queue: two crops, Sinkhorn targets."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = dc.Prototypes(64, PROTOTYPES)

    def forward(self, views: Tensor, _: Tensor) -> Tensor:
        z = nn.functional.normalize(views, dim=-1)
        loss: Tensor = dc.swav_loss([self.prototypes(view) for view in z], temperature=0.1)
        return loss


# Row of the table -> (number of views, what makes its loss)
LOSSES: dict[str, tuple[int, Callable[[], Loss]]] = {
    "nt_xent": (2, lambda: lambda v, y: dc.nt_xent(v[0], v[1], TEMPERATURE)),
    "dcl": (2, lambda: lambda v, y: dc.dcl(v[0], v[1], TEMPERATURE)),
    "dclw": (2, lambda: lambda v, y: dc.dclw(v[0], v[1], TEMPERATURE)),
    "hcl": (2, lambda: lambda v, y: dc.hcl(v[0], v[1], TEMPERATURE)),
    "debiased": (2, lambda: lambda v, y: dc.debiased(v[0], v[1], TEMPERATURE)),
    "align_uniform": (2, lambda: align_uniform),
    "mv_info_nce": (2, lambda: lambda v, y: dc.mv_info_nce(v, TEMPERATURE)),
    "mv_dhel": (2, lambda: lambda v, y: dc.mv_dhel(v, TEMPERATURE)),
    "cacr": (2, lambda: lambda v, y: dc.cacr(v, 1.0, 2.0)),
    "swav": (2, Swav),
    "sup_con (labels)": (2, lambda: lambda v, y: dc.sup_con(v, y, TEMPERATURE)),
    "nt_xent_multi x4": (4, lambda: lambda v, y: dc.nt_xent_multi(v, TEMPERATURE)),
    "mv_info_nce x4": (4, lambda: lambda v, y: dc.mv_info_nce(v, TEMPERATURE)),
    "poly_view x4": (4, lambda: lambda v, y: dc.poly_view(v, TEMPERATURE)),
    "mv_dhel x4": (4, lambda: lambda v, y: dc.mv_dhel(v, TEMPERATURE)),
    "cacr x4": (4, lambda: lambda v, y: dc.cacr(v, 1.0, 2.0)),
}


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 8, 8) in [0, 1] with their digits."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=450, stratify=y, random_state=0)
    train, test, train_y, test_y = (torch.as_tensor(part) for part in parts)
    return (
        train.float().view(-1, 1, 8, 8),
        train_y,
        test.float().view(-1, 1, 8, 8),
        test_y,
    )


def view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, contrast, noise and a hidden 2 x 2 patch, drawn anew for every image."""
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    padded = nn.functional.pad(x, (1, 1, 1, 1))
    shift = torch.randint(0, 3, (2, n), generator=generator)
    rows = shift[0][:, None] + torch.arange(8)
    columns = shift[1][:, None] + torch.arange(8)
    moved = padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    moved = moved * uniform(0.7, 1.3, n, 1, 1)
    moved = moved + 0.1 * torch.randn(moved.shape, generator=generator)
    corner = torch.randint(0, 7, (2, n, 1), generator=generator)
    line = torch.arange(8)
    hidden = [(line >= start) & (line < start + 2) for start in corner]
    return moved.masked_fill(hidden[0][:, :, None] & hidden[1][:, None, :], 0.0)[:, None]


def networks(seed: int) -> tuple[nn.Module, nn.Module]:
    """Encoder to 128 features and head to 64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, out, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        conv = nn.Conv2d(wide, out, 3, stride=stride, padding=1)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
    encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 128))
    head = nn.Sequential(
        nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64)
    )
    return encoder, head


def train(name: str, seed: int, x: Tensor, y: Tensor) -> tuple[nn.Module, nn.Module]:
    """Train one encoder with one loss."""
    count, make = LOSSES[name]
    encoder, head = networks(seed)
    loss = make()
    own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    parameters = [*encoder.parameters(), *head.parameters(), *own]
    steps = len(x) // BATCH
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for rows in torch.split(order, BATCH)[:steps]:
            views = torch.cat([view(x[rows], generator) for _ in range(count)])
            value = loss(head(encoder(views)).view(count, BATCH, -1), y[rows])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return encoder.eval(), head.eval()


@torch.no_grad()
def scores(
    encode: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor] | None
) -> dict[str, float]:
    """Probe, probe of five labels a class, nearest neighbours, RankMe of features and head."""
    x, y, test, test_y = data()
    features, queries = encode(x), encode(test)
    with torch.enable_grad():
        probe = dc.linear_probe(features, y, queries, test_y=test_y)
        few = dc.few_label_probe(features, y, queries, test_y, n_per_class=5, repeats=5)
    neighbours = dc.knn_probe(features, y, queries, k=20)
    assert probe.accuracy is not None
    return {
        "probe": 100 * probe.accuracy,
        "few": 100 * few.accuracy,
        "knn": 100 * float((neighbours.predictions == test_y).double().mean()),
        "rank": float(dc.rank_me(features)),
        "head_rank": math.nan if project is None else float(dc.rank_me(project(features))),
    }


def line(name: str, rows: list[dict[str, float]]) -> str:
    """One row of the table: mean over seeds, with its standard deviation."""
    cells = []
    for column in COLUMNS:
        values = [row[column] for row in rows]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells.append("" if math.isnan(values[0]) else f"{mean(values):.1f}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Train and probe, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--losses", default=",".join(LOSSES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    x, y, *_ = data()
    print("| loss | probe | 5 labels a class | kNN | RankMe of features | of the head |")
    print("|---|---|---|---|---|---|")
    table = {"raw pixels": [scores(lambda images: images.flatten(1), None)]}
    print(line("raw pixels", table["raw pixels"]), flush=True)
    untrained = [networks(seed) for seed in range(given.seeds)]
    table["random encoder"] = [scores(*(part.eval() for part in pair)) for pair in untrained]
    print(line("random encoder", table["random encoder"]), flush=True)
    for name in given.losses.split(","):
        trained = [train(name, seed, x, y) for seed in range(given.seeds)]
        table[name] = [scores(*pair) for pair in trained]
        print(line(name, table[name]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
