"""Networks have the published size, take the documented grids and fuse as documented."""

import pytest
import torch

from diptych_pirads.blocks import Blocks, Decoder, Trunk
from diptych_pirads.config import ModelSection
from diptych_pirads.fusion import PATHS, fuse, log_fuse
from diptych_pirads.model import (
    AnisoUNet,
    DualPathNet,
    network,
    network_input,
    probabilities,
)

torch.set_num_threads(1)
NETWORKS = [
    AnisoUNet(base=2),
    DualPathNet(base=2, share="none"),
    DualPathNet(base=2, share="stem"),
    DualPathNet(base=2, share="encoder"),
    network(ModelSection(name="unet", base=2), channels=1),
]


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def path_logits(seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randn(2, 2, 4, 2, 3, 4, generator=torch.Generator().manual_seed(seed))
    return scale * drawn[0], scale * drawn[1]


def test_networks_have_the_published_number_of_parameters() -> None:
    assert parameters(AnisoUNet(1, 5, 16, up_kernel="meyer", norm="batch")) == 6_098_245
    sizes = {"none": 12_196_424, "encoder": 9_110_696}
    for share, expected in sizes.items():
        net = DualPathNet(1, share=share, up_kernel="meyer", heads=())  # type: ignore[arg-type]
        assert parameters(net) == expected
        with_heads = DualPathNet(1, share=share, up_kernel="meyer")  # type: ignore[arg-type]
        assert parameters(with_heads) == expected + 2 * (99 + 195)
    encoders = {"none": 2, "encoder": 1, "stem": 1}
    for share, count in encoders.items():
        one, two = (DualPathNet(c, share=share, heads=()) for c in (1, 2))  # type: ignore[arg-type]
        assert parameters(two) - parameters(one) == 432 * count


@pytest.mark.parametrize("kernel", ["stride", "meyer"])
@pytest.mark.parametrize("size", [(24, 112, 112), (16, 64, 64), (2, 8, 16)])
def test_logits_have_the_size_of_the_image(kernel: str, size: tuple[int, int, int]) -> None:
    net = AnisoUNet(1, 5, base=1, up_kernel=kernel).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert net(torch.zeros(1, 1, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("size", [(3, 16, 16), (4, 12, 16), (4, 16, 20)])
def test_a_size_that_poolings_do_not_divide_is_refused_by_name(size: tuple[int, int, int]) -> None:
    axis = "zyx"[
        [n % f for n, f in zip(size, (2, 8, 8), strict=True)].index(4 if size[0] == 4 else 1)
    ]
    with pytest.raises(ValueError, match=f"along {axis}.*multiple of"):
        DualPathNet(base=1)(torch.zeros(1, 1, *size))


@pytest.mark.parametrize("net", NETWORKS, ids=lambda net: f"{type(net).__name__}")
def test_every_network_gives_probabilities_of_five_classes(net: torch.nn.Module) -> None:
    x = torch.rand(3, 1, 4, 48, 48) * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1, 1)
    with torch.no_grad():
        said = probabilities(net.eval(), x)
        one = probabilities(net, x[1:2])
    assert said.fused.shape == (3, 5, 4, 48, 48)
    assert torch.allclose(said.fused.sum(1), torch.ones(()), atol=1e-5)
    assert torch.allclose(one.fused, said.fused[1:2], atol=5e-5)
    assert said.features is not None
    assert one.features is not None
    assert torch.allclose(one.features, said.features[1:2], atol=1e-5)
    assert said.features.std(0).max() > 1e-2
    if isinstance(net, DualPathNet):
        assert said.a is not None
        assert said.b is not None
        assert list(said.a) == list(said.b) == ["pz", "tz"]
        assert not torch.allclose(said.a["pz"], said.b["pz"])
    else:
        assert said.a is None


@pytest.mark.parametrize("mode", ["product", "mean", "a_then_b"])
@pytest.mark.parametrize("zone", range(5))
def test_paths_that_agree_decide(mode: str, zone: int) -> None:
    logits = []
    for path in (PATHS["a"], PATHS["b"]):
        one = torch.full((1, 4, 1, 1, 1), -20.0)
        one[:, path.index(zone) + 1 if zone in path else 0] = 20
        logits.append(one)
    assert fuse(*logits, mode=mode)[0, zone].item() > 0.999  # type: ignore[arg-type]


def test_a_path_that_knows_nothing_leaves_the_choice_to_the_other() -> None:
    a, _ = path_logits()
    p = fuse(a, torch.zeros_like(a))
    alone = a.softmax(1)
    # rest, PZ, TZ and DPU as path a has them; AFS shares the rest of path a with the background
    expected = torch.stack([alone[:, 0], alone[:, 1], alone[:, 2], alone[:, 3], alone[:, 0]], 1)
    assert torch.allclose(p, expected / expected.sum(1, keepdim=True), atol=1e-6)


def test_the_mean_of_the_paths_is_their_mean() -> None:
    a, b = path_logits()
    pa, pb = a.double().softmax(1), b.double().softmax(1)
    zones = [(pa[:, 1] + pb[:, 1]) / 2, (pa[:, 2] + pb[:, 2]) / 2, pa[:, 3], pb[:, 3]]
    expected = torch.stack([(1 - sum(zones)).clamp(min=0), *zones], 1)
    expected = expected / expected.sum(1, keepdim=True)
    assert torch.allclose(fuse(a, b, mode="mean").double(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["product", "mean", "a_then_b"])
def test_fusion_commutes_with_a_permutation_of_voxels(mode: str) -> None:
    a, b = path_logits()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    mixed = [out.flatten(2)[..., order].reshape(out.shape) for out in (a, b)]
    expected = fuse(a, b, mode=mode).flatten(2)[..., order]  # type: ignore[arg-type]
    found = fuse(*mixed, mode=mode).flatten(2)  # type: ignore[arg-type]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("paths", [PATHS, {"a": (2, 4), "b": (1, 2, 3)}])
def test_the_logarithm_of_fusion_stays_finite(paths: dict[str, tuple[int, ...]]) -> None:
    a, b = (torch.randn(1, 1 + len(paths[p]), 1, 2, 2) * 200 for p in "ab")
    for mode in ("product", "mean"):
        log = log_fuse(a, b, paths, mode)  # type: ignore[arg-type]
        assert log.isfinite().all()
        assert torch.allclose(log.exp().sum(1), torch.ones(()), atol=1e-5)


def test_a_wins_before_b_is_asked() -> None:
    a, b = torch.full((1, 4, 1, 1, 3), -9.0), torch.full((1, 4, 1, 1, 3), -9.0)
    a[0, 3, ..., 0] = a[0, 0, ..., 1:] = 9  # DPU, rest, rest
    b[0, 3, ..., :2] = b[0, 1, ..., 2] = 9  # AFS, AFS, PZ
    assert fuse(a, b, mode="a_then_b").argmax(1).flatten().tolist() == [3, 4, 0]


def test_the_second_view_reaches_path_b_alone() -> None:
    x, other = torch.rand(2, 1, 1, 2, 16, 16)
    for share in ("none", "stem", "encoder"):
        net = DualPathNet(base=2, share=share).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            both, first, second = net(x, other), net(x), net(other)
        assert torch.allclose(both.a, first.a, atol=1e-5)
        assert torch.allclose(both.b, second.b, atol=1e-5)


def test_heads_have_a_value_for_each_zone_of_their_path() -> None:
    heads = ("sdf", "presence", "reconstruct")
    net = DualPathNet(2, {"a": (1, 2, 3), "b": (2, 4)}, base=2, heads=heads)
    out = net(torch.rand(1, 2, 4, 16, 16))
    assert out.sdf_a is not None
    assert out.sdf_a.shape == (1, 3, 4, 16, 16)
    assert out.sdf_a.abs().max() <= 1
    assert out.presence_b is not None
    assert out.presence_b.shape == (1, 2, 4)
    assert out.reconstruct_b is not None
    assert out.reconstruct_b.shape == (1, 2, 4, 16, 16)


def test_a_decoder_sees_both_features_as_if_they_were_joined() -> None:
    torch.manual_seed(0)
    blocks = Blocks(base=2, dropout=0)
    decoder = Decoder(blocks)
    encoded = Trunk(blocks)(torch.randn(2, 4, 2, 16, 16))

    def joined(block: torch.nn.Module, up: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = block(torch.cat([up.relu(), high], 1))
        return features

    x = joined(decoder.dec3, decoder.up3(encoded.bottom), encoded.quarter)
    x = joined(decoder.dec2, decoder.up2(x), encoded.half)
    x = joined(decoder.dec1, decoder.up1(x), encoded.full)
    assert torch.allclose(decoder(encoded), x, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    x = torch.rand(1, 1, 2, 16, 16)
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        net = DualPathNet(base=2, dropout=0.5, checkpoint=checkpoint)
        torch.manual_seed(1)
        out = net(x)
        (out.a.square().mean() + out.b.square().mean()).backward()
        gradients.append([p.grad for p in net.path_a.decoder.parameters()])
    for one, again in zip(*gradients, strict=True):
        assert one is not None
        assert again is not None
        assert torch.allclose(one, again, atol=1e-5)


def test_a_missing_channel_is_said_to_be_missing() -> None:
    x = torch.rand(2, 3, 2, 16, 16) + 1
    x[1, 1] = 0
    made = network_input(x)
    assert made.shape == (2, 5, 2, 16, 16)
    assert torch.equal(made[:, :3], x)
    assert made[:, 3:].flatten(2).amin(2).tolist() == [[1, 1], [0, 1]]
    assert torch.equal(network_input(x[:, :1]), x[:, :1])
    net = network(ModelSection(base=2), channels=3).eval()
    assert probabilities(net, x).fused.shape == (2, 5, 2, 16, 16)
