import pytest
import torch
import torch.nn.functional as F

from diptych.errors import DataError
from diptych_mvcnet.parity import KEYS, OFFICIAL_PAIRS, load_official_checkpoint, official_mirror

SHAPE = (22, 1001, 2, 125)


def published(extra=(), without=()):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "0.stem.sconv.conv.weight": (64, 22, 1),
        "0.stem.tconv.0.conv.weight": (64, 1, 63),
        "1.fc.weight": (2, 512),
        "1.fc.bias": (2,),
        "0.fc.0.weight": (2, 512),
        "0.fc.0.bias": (2,),
    }
    for layer in ("sconv", "tconv.0"):
        for value in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"0.stem.{layer}.bn.{value}"] = (64,)
    tensors = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    tensors["0.stem.sconv.bn.num_batches_tracked"] = torch.tensor(7)
    tensors |= {key: torch.zeros(1) for key in extra}
    return {key: value for key, value in tensors.items() if key not in without}


def stored(path, tensors):
    torch.save(tensors, path)
    return path


def test_official_weights_decode_as_the_formulas_of_the_official_network(tmp_path):
    w = published()
    net = load_official_checkpoint(stored(tmp_path / "w.pth", w), *SHAPE)
    x = torch.randn(3, 22, 1001, generator=torch.Generator().manual_seed(1))

    def norm(h, layer):
        mean, var, scale, shift = (
            w[f"0.stem.{layer}.bn.{value}"][:, None]
            for value in ("running_mean", "running_var", "weight", "bias")
        )
        return (h - mean) / (var + 1e-5).sqrt() * scale + shift

    h = norm(torch.einsum("fc,bct->bft", w["0.stem.sconv.conv.weight"][..., 0], x), "sconv")
    h = F.conv1d(h, w["0.stem.tconv.0.conv.weight"], padding=31, groups=64)
    h = F.gelu(norm(h, "tconv.0"))[..., :1000].unflatten(-1, (8, 125)).mean(-1)
    expected = h.flatten(1) @ w["1.fc.weight"].T + w["1.fc.bias"]
    with torch.no_grad():
        assert net.decode(x).allclose(expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        (published(without=["1.fc.weight"]), "missing.*1.fc.weight"),
        (published(extra=["2.other"]), "unknown.*2.other"),
        (published() | {"1.fc.bias": torch.zeros(3)}, r"1\.fc\.bias has shape \(3,\)"),
        ([1, 2], "state dictionary"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, word):
    with pytest.raises(DataError, match=word):
        load_official_checkpoint(stored(tmp_path / "w.pth", tensors), *SHAPE)


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_never_runs_code(tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save({"1.fc.weight": Harmful()}, path)
    with pytest.raises(DataError, match="no checkpoint of tensors"):
        load_official_checkpoint(path, *SHAPE)
    assert "code ran" not in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.pth"):
        load_official_checkpoint(tmp_path / "nothing.pth", *SHAPE)


def test_every_decoding_tensor_has_an_official_name():
    assert len(set(KEYS.values())) == len(KEYS) == 12


@pytest.mark.parametrize("dataset", OFFICIAL_PAIRS)
def test_official_reflections_are_their_own_inverse(dataset):
    mirror = official_mirror(dataset, 22)
    assert mirror[mirror].equal(torch.arange(22))
