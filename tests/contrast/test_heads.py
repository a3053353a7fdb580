import pytest
import torch
from torch import nn

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.heads import PRESETS, MultiHead, ProjectionHead, head, multi_crop_forward


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("simclr", 4_460_800),
        ("moco_v2", 4_458_624),
        ("swav", 4_462_720),
        ("byol", 9_449_728),
        ("multi_head", 13_388_160),
    ],
)
def test_a_preset_has_the_parameters_its_table_states(name, parameters):
    with torch.device("meta"):
        built = head(name, 2048)
    assert sum(each.numel() for each in built.parameters()) == parameters
    assert f"{parameters:,}" in head.__doc__


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_embeds_features_of_any_length(name):
    embeddings = head(name, 6)(torch.randn(4, 6))
    assert embeddings.shape[-2:] == (4, 256 if name == "byol" else 128)


def test_an_unknown_head_is_refused_with_the_nearest_name():
    with pytest.raises(ContrastInputError, match="did you mean 'moco_v2'"):
        head("moco2", 8)


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        ({}, ["Linear", "BatchNorm1d", "ReLU", "Linear"]),
        ({"layers": 1}, ["Linear"]),
        ({"layers": 1, "last_norm": True}, ["Linear", "BatchNorm1d"]),
        ({"layers": 3, "norm": None}, ["Linear", "ReLU", "Linear", "ReLU", "Linear"]),
        (
            {"norm": "layer", "last_norm": True},
            ["Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm"],
        ),
    ],
)
def test_a_head_is_built_of_the_layers_asked_for(arguments, kinds):
    built = ProjectionHead(5, 7, 3, **arguments)
    assert [type(part).__name__ for part in built.layers] == kinds
    assert built(torch.randn(4, 5)).shape == (4, 3)


def test_a_bias_is_dropped_only_where_a_norm_follows():
    built = ProjectionHead(5, 7, 3, bias=False)
    assert built.layers[0].bias is None
    assert built.layers[-1].bias is not None


def test_heads_of_a_multi_head_are_independent():
    heads = MultiHead(5, 7, 3, heads=4, norm=None)
    embeddings = heads(torch.randn(2, 5))
    assert embeddings.shape == (4, 2, 3)
    gradients = torch.autograd.grad(
        embeddings[1].sum(), [each.layers[0].weight for each in heads.heads]
    )
    assert [bool(each.any()) for each in gradients] == [False, True, False, False]


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: ProjectionHead(0, 1, 1), "dim_in"),
        (lambda: ProjectionHead(1, 1, 1, layers=0), "layers"),
        (lambda: ProjectionHead(1, 1, 1, norm="group"), "norm"),
        (lambda: ProjectionHead(1, 1, 1, norm=None, last_norm=True), "last_norm"),
        (lambda: MultiHead(1, 1, 1, heads=0), "heads"),
    ],
)
def test_an_impossible_head_is_refused(build, argument):
    with pytest.raises(ContrastInputError) as caught:
        build()
    assert caught.value.argument == argument


class TestMultiCrop:
    def test_crops_keep_their_order_and_each_size_takes_one_pass(self):
        passes = []

        def encoder(batch):
            passes.append(tuple(batch.shape))
            return batch.flatten(1).mean(1, keepdim=True)

        shapes = [(2, 3, 8, 8), (4, 3, 4, 4), (2, 3, 8, 8), (1, 3, 4, 4)]
        crops = [torch.full(shape, float(position)) for position, shape in enumerate(shapes)]
        outputs = multi_crop_forward(encoder, crops)
        assert passes == [(4, 3, 8, 8), (5, 3, 4, 4)]
        assert [each.flatten().tolist() for each in outputs] == [[0, 0], [1] * 4, [2, 2], [3]]

    def test_gradients_equal_separate_passes(self):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
        crops = [torch.randn(2, 3, size, size).double() for size in (8, 4, 8)]
        expected = torch.autograd.grad(
            sum((z**2).sum() for z in map(encoder, crops)), list(encoder.parameters())
        )
        together = torch.autograd.grad(
            sum((z**2).sum() for z in multi_crop_forward(encoder, crops)),
            list(encoder.parameters()),
        )
        torch.testing.assert_close(together, expected)

    def test_what_cannot_be_encoded_is_refused(self):
        with pytest.raises(ContrastInputError, match="'crops' is empty"):
            multi_crop_forward(nn.Identity(), [])
        with pytest.raises(ContrastInputError, match="gives 1 rows for 2"):
            multi_crop_forward(lambda batch: batch[:1], [torch.zeros(2, 3)])
