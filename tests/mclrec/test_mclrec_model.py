"""The sequence encoder against the published formula, and what its inputs may be."""

import math

import pytest
import torch
import torch.nn.functional as F

from diptych_mclrec.model import (
    ModelAugmenter,
    SequenceEncoder,
    build_augmenters,
    encode_in_groups,
)

torch.set_num_threads(1)
HISTORIES = torch.tensor([[1, 2, 3, 0, 0], [4, 0, 6, 7, 0], [0, 0, 5, 6, 0], [3, 2, 5, 8, 9]])
LENGTHS = torch.tensor([3, 4, 4, 5])


def encoder(**changes) -> SequenceEncoder:
    torch.manual_seed(3)
    settings = {"dim": 8, "heads": 2, "inner": 12, "max_len": 6, "dropout": 0.0}
    net = SequenceEncoder(9, **{**settings, "attn_dropout": 0.0, **changes}).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net


def official(net: SequenceEncoder, items: torch.Tensor) -> torch.Tensor:
    """The published forward pass: hidden keys and later ones get -10000 added to their scores."""
    n_steps = items.shape[1]
    x = net.item_embedding.weight[items] + net.position_embedding.weight[:n_steps]
    x = F.layer_norm(x, (8,), net.input_norm.weight, net.input_norm.bias, 1e-12)
    allowed = (items > 0)[:, None, None] & torch.ones(n_steps, n_steps).tril().bool()
    penalty = torch.where(allowed, 0.0, -10000.0).double()
    for block in net.blocks:
        heads = [
            layer(x).view(len(x), n_steps, 2, 4).permute(0, 2, 1, 3)
            for layer in (block.attention.query, block.attention.key, block.attention.value)
        ]
        scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(4) + penalty
        mixed = (scores.softmax(3) @ heads[2]).permute(0, 2, 1, 3).reshape(len(x), n_steps, 8)
        norm = block.attention_norm
        x = F.layer_norm(x + block.attention.output(mixed), (8,), norm.weight, norm.bias, 1e-12)
        inner = block.feed_forward[0](x)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        norm = block.feed_forward_norm
        x = F.layer_norm(x + block.feed_forward[2](inner), (8,), norm.weight, norm.bias, 1e-12)
    return x


def test_vectors_are_those_of_the_published_forward_pass_also_with_hidden_steps():
    net = encoder()
    expected = official(net, HISTORIES)[torch.arange(4), LENGTHS - 1]
    assert torch.allclose(net(HISTORIES, LENGTHS), expected, atol=1e-10, rtol=0)


def test_without_hidden_steps_the_plain_causal_pass_gives_what_the_masked_pass_gives():
    net, plain = encoder(), HISTORIES[[0, 3]]
    expected = net(plain, LENGTHS[[0, 3]], hidden=True)
    assert torch.allclose(net(plain, LENGTHS[[0, 3]], hidden=False), expected, atol=1e-12)
    assert torch.equal(net(plain, LENGTHS[[0, 3]]), net(plain, LENGTHS[[0, 3]], hidden=False))


def test_a_history_whose_first_half_is_hidden_gives_numbers_and_gradients():
    net = encoder().train()
    items = torch.tensor([[0, 0, 3, 4]])
    everywhere = net(items, torch.tensor([4]), positions="all")
    everywhere.sum().backward()
    assert everywhere.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_what_stands_behind_a_history_is_not_read():
    net, other = encoder(), HISTORIES.clone()
    other[0, 3:] = 7
    assert torch.equal(net(HISTORIES[:1], LENGTHS[:1]), net(other[:1], LENGTHS[:1]))


def test_all_positions_hold_the_last_vector_of_every_prefix():
    net, items = encoder(), HISTORIES[3:]
    everywhere = net(items, LENGTHS[3:], positions="all")[0]
    for steps in range(1, 6):
        prefix = net(items[:, :steps], torch.tensor([steps]))[0]
        assert torch.allclose(everywhere[steps - 1], prefix, atol=1e-12)


def test_a_basket_of_one_item_is_that_item_and_larger_ones_keep_their_scale():
    net = encoder()
    single = F.pad(HISTORIES[..., None], (0, 2))
    assert torch.allclose(net(single, LENGTHS), net(HISTORIES, LENGTHS), atol=1e-12)
    rows = net.item_embedding.weight
    embedded = net._embed(torch.tensor([[[3, 7, 0], [0, 0, 0]]]))[0]
    assert torch.allclose(embedded[0], (rows[3] + rows[7]) / math.sqrt(2), atol=1e-12)
    assert torch.allclose(embedded[1], rows[0])


def test_the_order_of_a_basket_does_not_matter():
    net = encoder()
    one, two = torch.tensor([[[3, 7, 0], [5, 0, 0]]]), torch.tensor([[[0, 7, 3], [0, 5, 0]]])
    assert torch.allclose(net(one, torch.tensor([2])), net(two, torch.tensor([2])), atol=1e-12)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("groups", [1, 3, 9])
def test_groups_of_like_length_change_neither_vectors_nor_gradients(norm, groups):
    net = encoder(norm=norm)
    plain = net(HISTORIES, LENGTHS)
    expected = torch.autograd.grad(plain.square().sum(), net.item_embedding.weight)[0]
    grouped = encode_in_groups(net, HISTORIES, LENGTHS, groups)
    found = torch.autograd.grad(grouped.square().sum(), net.item_embedding.weight)[0]
    assert torch.allclose(grouped, plain, atol=1e-10)
    assert torch.allclose(found, expected, atol=1e-10)


def test_pre_norm_ends_with_its_one_norm():
    net = encoder(norm="pre")
    vectors = net(HISTORIES, LENGTHS)
    normed = (vectors - net.output_norm.bias) / net.output_norm.weight
    assert torch.allclose(normed.mean(1), torch.zeros(4).double(), atol=1e-10)
    assert torch.allclose(normed.var(1, unbiased=False), torch.ones(4).double(), atol=1e-8)


def test_parameters_are_as_many_as_published():
    net = SequenceEncoder(12101, mask_row=True)
    assert sum(p.numel() for p in net.parameters()) == 877_888
    assert [sum(p.numel() for p in one.parameters()) for one in build_augmenters(64)] == [3696] * 2


def test_weights_start_as_published():
    torch.manual_seed(0)
    net = SequenceEncoder(5000)
    assert abs(net.item_embedding.weight.std().item() - 0.02) < 5e-4
    assert abs(net.blocks[0].feed_forward[0].weight.std().item() - 0.02) < 5e-4
    assert not net.blocks[1].attention.key.bias.any()


def test_padding_is_never_recommended_and_the_mask_row_is_no_item():
    net = encoder(mask_row=True)
    scores = net.scores(net(HISTORIES, LENGTHS))
    assert net.item_weight().shape == (10, 8)
    assert scores.shape == (4, 10)
    assert scores[:, 0].eq(-math.inf).all()


def test_untied_items_are_scored_by_a_table_of_their_own():
    net = encoder(tied=False)
    assert net.item_weight() is not net.item_embedding.weight
    assert torch.equal(net.item_weight(), net.output_embedding.weight)


def test_augmented_vectors_have_length_one_and_zero_stays_a_number():
    torch.manual_seed(0)
    augmenter = ModelAugmenter(8)
    assert torch.allclose(augmenter(torch.randn(5, 8)).norm(dim=1), torch.ones(5))
    for parameter in augmenter.parameters():
        torch.nn.init.zeros_(parameter)
    assert augmenter(torch.zeros(1, 8)).eq(0).all()


def test_a_history_too_long_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the encoder takes 6"):
        encoder()(torch.ones(1, 7, dtype=torch.int64), torch.tensor([7]))
    with pytest.raises(ValueError, match=r"divisor of model\.dim 8"):
        encoder(heads=3)
