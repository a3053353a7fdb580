import pytest
import torch
from scipy.signal import firwin, freqz

from diptych.errors import UsageError
from diptych_mvcnet.config import MVCNetConfig
from diptych_mvcnet.model import (
    BandSplit,
    IFNetBranch,
    MVCNet,
    TransformerBranch,
    ViewBatchNorm,
    depthwise_in_blocks,
    forward_views,
    kernel_samples,
    odd,
    pool_samples,
)
from diptych_mvcnet.networks import network

torch.set_num_threads(1)
PARITY = {
    "cnn": {"kernel": 63, "pool": 125},
    "transformer": {"embed_dim": None},
    "projector": {"form": "parity"},
}


def config_of(**model):
    return MVCNetConfig.model_validate({"model": model, "data": {"filter": {"band": None}}})


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small(**model):
    model = {
        "cnn": {"filters": 4, "dropout": 0.0},
        "transformer": {"embed_dim": 8, "dropout": 0.0},
    } | model
    return MVCNet(5, 120, 2, sfreq=100.0, config=config_of(**model))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_parts_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        net = MVCNet(22, 1001, 2, sfreq=250.0, config=config_of(**PARITY))
        factorised = TransformerBranch(22, 1001, 512, projector="factorised", rank=32)
        pooled = config_of(**PARITY | {"cnn": {"kernel": 63, "pool": 128}})
        largest = MVCNet(15, 2561, 2, sfreq=512.0, config=pooled)
    assert (count(net.cnn), count(net.head)) == (5_696, 1_026)
    assert count(net.transformer.encoder) == 8_011_000
    assert count(net.transformer.projector) == 46_111_232
    assert count(net) == 54_128_954
    assert count(factorised.projector) == 2_529_056
    assert count(largest) == 255_643_010


def test_decoding_runs_the_convolutional_branch_alone():
    net = small().eval()
    net.transformer.forward = None  # type: ignore[assignment]
    x = noise(3, 5, 120)
    assert net.decode(x).shape == (3, 2)
    assert count(net.cnn) + count(net.head) == 5 * 4 + 4 * 25 + 16 + 2 * (4 * 2) + 2


@pytest.mark.parametrize("head", ["cnn", "fused"])
def test_decoding_gives_the_logits_of_a_forward_pass(head):
    net, x = small(head=head).eval(), noise(3, 5, 120)
    assert net.decode(x).allclose(net(x).logits, atol=1e-6)


@pytest.mark.parametrize("bands", [None, [[4, 16], [16, 40]]])
def test_grouped_batch_norm_equals_separate_passes(bands):
    together, apart = (small(cnn={"filters": 4, "dropout": 0.0, "bands": bands}) for _ in range(2))
    apart.load_state_dict(together.state_dict())
    views = [(1 + k) * noise(6, 5, 120, seed=k) + k for k in range(4)]
    grouped, separate = (
        forward_views(net, views, grouped=one) for net, one in ((together, True), (apart, False))
    )
    for one, other in zip(grouped, separate, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.allclose(theirs, atol=1e-5)
    sum(out.logits.square().sum() + out.z_tr.sum() for out in grouped).backward()
    sum(out.logits.square().sum() + out.z_tr.sum() for out in separate).backward()
    for mine, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        assert mine.grad.allclose(theirs.grad, rtol=1e-3, atol=1e-4)
    for name, value in together.state_dict().items():
        assert value.allclose(apart.state_dict()[name], atol=1e-6), name
    assert int(together.cnn.spatial_norm.num_batches_tracked) == 4


def test_statistics_of_all_views_together_would_be_something_else():
    net = small()
    views = [noise(6, 5, 120), 10 * noise(6, 5, 120, seed=1)]
    grouped = forward_views(net, views)[0].logits
    assert not net(torch.cat(views)).logits[:6].allclose(grouped, atol=1e-3)


@pytest.mark.parametrize("updates", [1, 5, 200])
def test_decoding_after_few_steps_sees_the_data_and_not_the_start_of_the_statistics(updates):
    norm = ViewBatchNorm(3)
    x = 0.01 * noise(40, 3, 50) + torch.tensor([0.1, 0.0, -0.2])[:, None]
    for _ in range(updates):
        norm(x)
    decoded = norm.eval()(x)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert decoded.allclose(expected, atol=0.02)
    fresh = ViewBatchNorm(3).eval()
    assert fresh(x).allclose(x, atol=1e-4)


def test_the_factorised_projector_at_full_rank_is_the_parity_projector():
    full = TransformerBranch(5, 40, 12, projector="factorised", rank=40, dropout=0.0)
    parity = TransformerBranch(5, 40, 12, projector="parity", dropout=0.0)
    with torch.no_grad():
        full.projector.shared.weight.copy_(torch.eye(40))
        full.projector.shared.bias.zero_()
    own = {key: value for key, value in full.state_dict().items() if ".shared." not in key}
    parity.load_state_dict(own)
    x = noise(3, 5, 40)
    assert full(x).equal(parity(x))


def test_channel_tokens_have_no_order_and_drop_the_odd_sample():
    branch = TransformerBranch(5, 41, 12, dropout=0.0).eval()
    assert branch.width == 40
    x, order = noise(2, 5, 41), torch.tensor([3, 1, 4, 0, 2])
    layer = branch.encoder[0]
    assert layer(x[..., :40])[:, order].allclose(layer(x[:, order, :40]), atol=1e-5)
    changed = x.clone()
    changed[..., 40] = 99.0
    assert branch(changed).equal(branch(x))


def test_time_tokens_know_their_place():
    branch = TransformerBranch(5, 40, 12, tokens="time", embed_dim=8, patch=10, dropout=0.0).eval()
    x = noise(2, 5, 40)
    assert branch(x).shape == (2, 12)
    assert branch.position.shape == (4, 8)
    with torch.no_grad():
        branch.position.zero_()
    assert not branch(x).allclose(
        TransformerBranch.forward(branch, x.roll(10, dims=-1)), atol=1e-4
    )  # the projector sees the order of tokens


@pytest.mark.parametrize("keywords", [{}, {"embed_dim": 8}, {"embed_dim": 8, "patch": 50}])
def test_time_tokens_need_a_width_and_a_patch_within_the_epoch(keywords):
    with pytest.raises(ValueError, match="patch"):
        TransformerBranch(5, 40, 12, tokens="time", **keywords)


@pytest.mark.parametrize(
    ("sfreq", "kernel", "pool"),
    [(250.0, 63, 125), (100.0, 25, 50), (512.0, 129, 256), (160.0, 41, 80)],
)
def test_lengths_follow_the_sampling_rate(sfreq, kernel, pool):
    cnn = MVCNetConfig().model.cnn
    assert (kernel_samples(cnn, sfreq), pool_samples(cnn, sfreq)) == (kernel, pool)


@pytest.mark.parametrize(("number", "expected"), [(63, 63), (62, 63), (40.32, 41), (0.2, 1)])
def test_odd_is_the_next_odd_number_upward(number, expected):
    assert odd(number) == expected


@pytest.mark.parametrize(("n_times", "kernel"), [(1001, 63), (300, 25), (20, 63), (7, 1)])
def test_convolution_in_blocks_is_convolution(n_times, kernel):
    x = noise(3, 4, n_times).requires_grad_()
    weight = noise(4, 1, kernel, seed=1).requires_grad_()
    ours = depthwise_in_blocks(x, weight)
    plain = torch.nn.functional.conv1d(x, weight, padding=kernel // 2, groups=4)
    assert ours.allclose(plain, atol=1e-4)
    cotangent = noise(3, 4, n_times, seed=2)
    for one, other in zip(
        torch.autograd.grad(ours, (x, weight), cotangent),
        torch.autograd.grad(plain, (x, weight), cotangent),
        strict=True,
    ):
        assert one.allclose(other, rtol=1e-4, atol=1e-3)


def test_one_channel_and_the_shortest_epoch_work():
    net = IFNetBranch(1, 10, filters=2, kernel=3, pool=10)
    assert net(noise(2, 1, 10)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"9 samples, the pool 10.*data\.window"):
        IFNetBranch(1, 9, pool=10)


def test_initial_kernels_are_narrow():
    weights = torch.cat([c.weight.flatten() for c in IFNetBranch(22, 1001).temporal])
    assert float(weights.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_the_second_band_of_two_has_the_shorter_kernel():
    branch = IFNetBranch(22, 1001, bands=2)
    assert [conv.kernel_size[0] for conv in branch.temporal] == [63, 31]
    assert branch.spatial.weight.shape == (128, 22, 1)
    assert branch.out_dim == 512


def test_bands_are_split_as_scipy_designs_them():
    split = BandSplit([(4.0, 16.0), (16.0, 40.0)], 100.0, 400)
    for taps, band in zip(split.taps, ((4, 16), (16, 40)), strict=True):
        expected = torch.from_numpy(
            firwin(len(taps), band, fs=100.0, pass_zero=False, window="hamming", scale=False)
        ).float()
        assert taps.allclose(expected, atol=1e-6)
        gain = abs(freqz(taps.numpy(), worN=[(band[0] + band[1]) / 2], fs=100.0)[1])
        assert gain == pytest.approx(1.0, abs=0.01)


def test_a_band_split_neither_delays_nor_mixes_channels():
    time = torch.arange(300) / 100
    low, high = (torch.sin(2 * torch.pi * f * time) for f in (10.0, 28.0))
    split = BandSplit([(4.0, 16.0), (16.0, 40.0)], 100.0, 300)(torch.stack([low, high])[None])[0]
    middle = slice(100, 200)
    expected = [low, torch.zeros(300), torch.zeros(300), high]
    for row, one in zip(split, expected, strict=True):
        assert row[middle].allclose(one[middle], atol=0.02)


FACTS = {"ch_names": ["C3", "Cz", "C4"], "sfreq": 100.0, "n_times": 120, "classes": ["a", "b", "c"]}


@pytest.mark.parametrize(
    "method", ["", "ifnet", "ifnet_views", "ifnet_two_band", "eegnet", "shallow"]
)
def test_every_network_decodes_and_learns(method):
    net = network(method, FACTS, config_of())
    logits = net.decode(noise(4, 3, 120))
    assert logits.shape == (4, 3)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    used = [p for name, p in net.named_parameters() if not name.startswith("transformer")]
    assert all(p.grad is not None and bool(p.grad.any()) for p in used if p.ndim > 1)


def test_the_rows_of_eegnet_keep_their_norms():
    net = network("eegnet", FACTS, config_of()).eval()
    x = noise(4, 3, 120)
    with torch.no_grad():
        net.spatial.weight.mul_(100)
        once = net.decode(x)
        net.spatial.weight.mul_(100)
    assert net.decode(x).allclose(once, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["", "ifnet", "eegnet", "shallow"])
def test_an_epoch_that_is_too_short_is_refused_with_the_way_out(method):
    with pytest.raises(UsageError, match=r"data\.window"):
        network(method, FACTS | {"n_times": 20}, config_of())


@pytest.mark.parametrize("method", ["riemann", "braindecode:NoSuchModel"])
def test_an_unknown_network_is_refused(method):
    with pytest.raises(UsageError, match=r"evaluate\.baselines|braindecode"):
        network(method, FACTS, config_of())
