import pytest
import torch
from torch import nn

import diptych_contrast as dc


def encoder(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), *more, nn.Linear(16, 4)).double()


def gradients(module):
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_gradient_of_the_full_batch(chunk):
    x, y = torch.randn(2, 40, 5, dtype=torch.float64)
    tau = dc.Temperature(0.2, learnable=True).double()
    net = encoder(nn.LayerNorm(16))
    whole = dc.nt_xent(net(x), net(y), tau)
    whole.backward()
    expected = [*gradients(net), tau.log_scale.grad.clone()]
    net.zero_grad()
    tau.zero_grad()
    loss = dc.grad_cache(net, (x, y), lambda a, b: dc.nt_xent(a, b, tau), chunk_size=chunk)
    assert loss.item() == pytest.approx(whole.item(), abs=1e-9)
    assert not loss.requires_grad
    for got, wanted in zip([*gradients(net), tau.log_scale.grad], expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_dropout_falls_on_the_same_units_in_both_passes(chunk):
    x = torch.randn(40, 5, dtype=torch.float64)
    net = encoder(nn.Dropout(0.5))
    labels = torch.arange(40) % 4
    torch.manual_seed(1)
    whole = torch.cat([net(part) for part in x.split(chunk)])
    dc.sup_con(whole, labels).backward()
    following = torch.rand(1)
    expected = gradients(net)
    net.zero_grad()
    torch.manual_seed(1)
    dc.grad_cache(net, x, lambda z: dc.sup_con(z, labels), chunk_size=chunk)
    assert torch.rand(1) == following, "the stream of random numbers goes on as without a cache"
    for got, wanted in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


class Noisy(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.linear, self.generator = nn.Linear(5, 4).double(), generator

    def forward(self, x):
        return self.linear(x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype))


def test_a_generator_of_the_encoder_is_replayed():
    x = torch.randn(12, 5, dtype=torch.float64)
    net = Noisy(torch.Generator().manual_seed(3))
    whole = net.linear(x * torch.rand(12, 5, generator=net.generator, dtype=x.dtype))
    whole.square().sum().backward()
    expected = gradients(net)
    net.zero_grad()
    net.generator.manual_seed(3)
    dc.grad_cache(net, x, lambda z: z.square().sum(), chunk_size=12, rng=net.generator)
    for got, wanted in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_view_that_the_loss_leaves_out_gets_no_gradient():
    net = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    dc.grad_cache(net, (x, x), lambda a, b: a.sum(), chunk_size=2)
    torch.testing.assert_close(net.weight.grad, x.sum(0).expand(2, 3))


def test_gradients_of_processes_travel_once():
    class Parallel(nn.Linear):
        quiet = 0

        def no_sync(self):
            self.quiet += 1
            return torch.enable_grad()

    net = Parallel(3, 2)
    dc.grad_cache(net, torch.randn(6, 3), lambda z: z.sum(), chunk_size=2)
    assert net.quiet == 2


@pytest.mark.parametrize(
    ("net", "inputs", "chunk", "argument"),
    [
        (encoder(nn.BatchNorm1d(16)), torch.zeros(4, 5), 2, "encoder"),
        (encoder(), torch.zeros(4, 5), 0, "chunk_size"),
        (encoder(), (torch.zeros(4, 5), torch.zeros(3, 5)), 2, "inputs"),
        (encoder(), (), 2, "inputs"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(net, inputs, chunk, argument):
    with pytest.raises(dc.ContrastInputError) as error:
        dc.grad_cache(net, inputs, lambda *z: z[0].sum(), chunk_size=chunk)
    assert error.value.argument == argument


def test_batch_norm_of_chunks_can_be_allowed():
    net = encoder(nn.BatchNorm1d(16))
    x = torch.randn(8, 5, dtype=torch.float64)
    dc.grad_cache(net, x, lambda z: z.sum(), chunk_size=4, allow_batchnorm=True)
    net.eval()
    dc.grad_cache(net, x, lambda z: z.sum(), chunk_size=4)
