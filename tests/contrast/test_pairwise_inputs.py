"""What is refused, what is warned about, what a loss tells, and the table of losses."""

import importlib
import math
import pickle
import runpy
import sys

import pytest
import torch

import diptych_contrast as dc
from diptych_contrast.__main__ import main
from diptych_contrast.inputs import readable

Z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
SOFT = torch.rand(6, 3)

REFUSED = [
    (
        lambda: dc.nt_xent(Z, Z[:5]),
        "z2",
        r"has shape \(5, 4\), 'z1' has \(6, 4\)",
        "number of rows",
    ),
    (lambda: dc.nt_xent(Z, Z[:, :3]), "z2", "has shape", "number of dimensions"),
    (lambda: dc.nt_xent(Z[0], Z[0]), "z1", "has shape", "samples, dimensions"),
    (lambda: dc.sup_con(Z[:0], LABELS[:0]), "z", "has shape", "at least 1 row"),
    (lambda: dc.nt_xent(Z.long(), Z.long()), "z1", "dtype torch.int64", "floating-point"),
    (lambda: dc.nt_xent(Z[:1], Z[:1]), "z1", "single row", "at least 2"),
    (lambda: dc.info_nce(Z[:1], Z[:1]), "q", "single row", "at least 2"),
    (lambda: dc.clip_loss(Z[:1], Z[:1]), "x", "single row", "at least 2"),
    (lambda: dc.nt_xent(Z, Z.to("meta")), "z2", "is on meta", "one device"),
    (lambda: dc.nt_xent(Z, Z, 0.0), "temperature", "is 0.0", "above 0"),
    (lambda: dc.nt_xent(Z, Z, math.inf), "temperature", "is inf", "above 0"),
    (lambda: dc.nt_xent(Z, Z, torch.tensor(-1.0)), "temperature", "is -1", "above 0"),
    (lambda: dc.nt_xent(Z, Z, torch.ones(2)), "temperature", "has shape", "one number"),
    (
        lambda: dc.nt_xent(Z, Z, reduction="average"),
        "reduction",
        "'average'",
        "'mean', 'sum', 'none'",
    ),
    (lambda: dc.nt_xent(Z, Z, empty="drop"), "empty", "'drop'", "'skip', 'zero'"),
    (lambda: dc.nt_xent(Z, Z, ring=True), "ring", "without 'group'", "process group"),
    (lambda: dc.nt_xent(Z, Z, backend="triton"), "backend", "does not have", "tiled"),
    (lambda: dc.nt_xent(Z, Z, labels=LABELS[:5]), "labels", r"\(5,\)", "6 integers"),
    (lambda: dc.nt_xent(Z, Z, labels=LABELS - 1), "labels", "holds -1", "from 0"),
    (lambda: dc.sup_con(Z, LABELS.float()), "labels", "float32", "integers"),
    (lambda: dc.sup_con(Z, LABELS - 2), "labels", "holds -2", "unlabelled"),
    (lambda: dc.sup_con(Z, LABELS, mode="mid"), "mode", "'mid'", "'out', 'in'"),
    (lambda: dc.sup_con((), LABELS), "z", "no views", "at least one"),
    (lambda: dc.sup_con(Z[0], LABELS), "z", "has shape", "samples, dimensions"),
    (lambda: dc.soft_sup_con(Z), "soft_labels", "both None", "one of them"),
    (lambda: dc.soft_sup_con(Z, SOFT, weights=(SOFT, SOFT)), "soft_labels", "both given", "one of"),
    (lambda: dc.soft_sup_con(Z, SOFT - 1), "soft_labels", "row 0", "non-negative"),
    (lambda: dc.soft_sup_con(Z, SOFT * 0), "soft_labels", "sums to 0", "positive sum"),
    (lambda: dc.soft_sup_con(Z, SOFT[:5]), "soft_labels", "has shape", r"\(6, any\)"),
    (lambda: dc.info_nce(Z, Z, negatives="bank"), "negatives", "bank", "in_batch"),
    (lambda: dc.info_nce(Z, Z, negatives=()), "negatives", "is empty", "in_batch"),
    (lambda: dc.info_nce(Z, Z, negatives="queue"), "queue", "is None", "negatives='queue'"),
    (lambda: dc.info_nce(Z, Z, queue=Z), "queue", "is given", "negatives='queue'"),
    (
        lambda: dc.info_nce(Z, Z, negatives="queue", queue=Z[:, :3]),
        "queue",
        "has shape",
        r"\(any, 4\)",
    ),
    (
        lambda: dc.info_nce(Z, Z, negatives="rows", row_negatives=Z),
        "row_negatives",
        "has shape",
        r"\(6, any, 4\)",
    ),
    (
        lambda: dc.info_nce(Z, Z, negatives="queue", queue=Z, symmetric=True),
        "symmetric",
        "is True",
        "in_batch",
    ),
    (lambda: dc.siglip(Z, Z, positives=SOFT), "positives", "has shape", r"\(6, 6\)"),
    (lambda: dc.nt_xent_multi(Z), "views", "one view", "two or more"),
    (lambda: dc.pair_sum(Z, Z, "cos", dc.PairMask()), "fn", "'cos'", "softplus"),
    (lambda: dc.pair_expect(Z, Z, 1.0, 1.0, "city"), "cost", "'city'", "sqdist"),
    (
        lambda: dc.nt_xent(Z, torch.where(Z > 1, math.nan, Z), check_finite=True),
        "z2",
        "not finite",
        "leave these rows out",
    ),
    (lambda: dc.loss("nt_xnet"), "name", "'nt_xnet'", "'nt_xent'"),
    (lambda: dc.loss("nt_xent", temprature=0.5), "temprature", "unknown", "'temperature'"),
    (lambda: dc.explain("sup"), "name", "'sup'", "'sup_con'"),
]


@pytest.mark.parametrize(("call", "argument", "found", "fix"), REFUSED)
def test_a_refused_input_names_argument_finding_and_fix(call, argument, found, fix):
    with pytest.raises(dc.ContrastInputError, match=found) as caught:
        call()
    error = caught.value
    assert error.argument == argument
    assert f"argument '{argument}'" in str(error)
    with pytest.raises(dc.ContrastInputError, match=fix):
        raise error


WARNED = [
    (lambda: dc.sup_con(Z, torch.arange(6)), "no two rows of one class"),
    (
        lambda: dc.info_nce(Z, Z, negatives="queue", queue=dc.KeyQueue(8, 4)),
        "no row with a positive",
    ),
    (lambda: dc.nt_xent(Z, Z, 20.0), "outside 0.001 to 10"),
    (lambda: dc.clip_loss(200 * Z, Z, normalize=False), "longer than 100"),
    (
        lambda: dc.sup_con(torch.stack([Z, Z]), LABELS, ids=torch.tensor([0, 0, 1, 2, 3, 4])),
        "an id twice in one view",
    ),
]


@pytest.mark.filterwarnings("ignore::diptych_contrast.ContrastWarning")
@pytest.mark.parametrize(("call", "text"), WARNED)
def test_a_doubtful_input_is_warned_about(call, text):
    with pytest.warns(dc.ContrastWarning, match=text):
        call()


def test_an_unknown_keyword_is_refused_as_by_any_function():
    with pytest.raises(TypeError, match="'reduce'"):
        dc.nt_xent(Z, Z, reduce="mean")


def statistics(scores, positive, kept, temperature):
    """Statistics of the pairs from a stored score matrix."""
    negative = kept & ~positive
    s, p = scores[negative].double(), scores[positive].double()
    best = scores.masked_fill(~(negative | positive), -math.inf)
    hits = positive.gather(1, best.argmax(1, keepdim=True))[:, 0]
    return {
        "n_positive_pairs": positive.sum(),
        "pos_mean": p.mean(),
        "pos_var": p.var(correction=0),
        "neg_mean": s.mean(),
        "neg_var": s.var(correction=0),
        "exp_neg_mean": (s / temperature).exp().mean(),
        "top1": hits.double().mean(),
        "logit_max": best.max() / temperature,
    }


@pytest.mark.parametrize("name", ["nt_xent", "ids", "both", "sup_con", "clip_loss", "info_nce",
                                  "symmetric", "siglip", "soft", "multi"])  # fmt: skip
def test_a_loss_tells_the_statistics_of_its_pairs(name):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 12, 5, generator=g, dtype=torch.float64)
    labels, ids = torch.arange(12) % 3, torch.arange(12) // 2
    unit = torch.nn.functional.normalize(torch.cat([x, y]), dim=1)
    z, eye = unit @ unit.t(), torch.eye(24, dtype=torch.bool)
    partner, t = eye.roll(12, 0), 0.4
    one = torch.eye(12, dtype=torch.bool)
    cross = unit[:12] @ unit[12:].t()
    all_pairs = torch.ones(12, 12, dtype=torch.bool)
    same = labels.repeat(2)[:, None] == labels.repeat(2)
    twin = ids.repeat(2)[:, None] == ids.repeat(2)
    call, scores, positive, kept = {
        "nt_xent": (lambda **o: dc.nt_xent(x, y, t, **o), z, partner, ~eye),
        "ids": (lambda **o: dc.nt_xent(x, y, t, ids=ids, **o), z, partner, ~twin),
        "both": (
            lambda **o: dc.nt_xent(x, y, t, ids=ids, labels=labels, **o), z, partner, ~twin & ~same,
        ),
        "sup_con": (
            lambda **o: dc.sup_con((x, y), labels, t, **o), z, same & ~eye, ~eye,
        ),
        "clip_loss": (lambda **o: dc.clip_loss(x, y, t, **o), cross, one, all_pairs),
        "info_nce": (lambda **o: dc.info_nce(x, y, t, **o), cross, one, all_pairs),
        "symmetric": (lambda **o: dc.info_nce(x, y, t, symmetric=True, **o), cross, one, all_pairs),
        "siglip": (lambda **o: dc.siglip(x, y, -math.log(t), **o), cross, one, all_pairs),
        "soft": (
            lambda **o: dc.soft_sup_con((x, y), torch.rand(12, 3), t, **o), z, partner, ~eye,
        ),
        "multi": (lambda **o: dc.nt_xent_multi((x, y), t, **o), z, partner, ~eye),
    }[name]  # fmt: skip
    loss, info = call(return_info=True, tile=7)
    if name != "soft":
        assert loss.item() == pytest.approx(call().item())
    expected = statistics(scores, positive, kept, t)
    if name in {"clip_loss", "symmetric"}:
        backward = statistics(scores.t(), positive, kept, t)
        both = scores.argmax(1) == torch.arange(12)
        expected["top1"] = (both & (scores.argmax(0) == torch.arange(12))).double().mean()
        assert backward["neg_mean"] == pytest.approx(expected["neg_mean"])
    if name == "symmetric":
        del expected["top1"]
    for field, value in expected.items():
        assert float(getattr(info, field)) == pytest.approx(float(value), rel=1e-6), field
    assert int(info.n_valid) == info.n_rows
    assert int(info.n_zero_rows) == 0


def test_zero_rows_are_counted():
    z = Z.clone()
    z[2] = 0
    assert int(dc.nt_xent(z, Z, return_info=True)[1].n_zero_rows) == 1
    assert int(dc.sup_con(z, LABELS, return_info=True)[1].n_zero_rows) == 1


def test_queue_and_row_negatives_are_told_together():
    own = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(1))
    _, info = dc.info_nce(
        Z, Z, negatives=("queue", "rows"), queue=Z + 1, row_negatives=own, return_info=True
    )
    unit = torch.nn.functional.normalize
    s = torch.cat([unit(Z, dim=1) @ unit(Z + 1, dim=1).t(),
                   torch.einsum("nd,nkd->nk", unit(Z, dim=1), unit(own, dim=2))], 1)  # fmt: skip
    assert float(info.neg_mean) == pytest.approx(float(s.mean()), rel=1e-5)
    assert float(info.exp_neg_mean) == pytest.approx(float((s / 0.07).exp().mean()), rel=1e-4)


# The table of losses (check 23).


PAIRWISE = [name for name, spec in dc.losses().items() if "pairwise" in spec.function.__module__]


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_loss_is_explained_and_equals_its_dense_reference(name):
    spec = dc.losses()[name]
    text = " ".join(dc.explain(name).split())
    assert spec.formula in text
    assert spec.paper in text
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, 5, generator=g, dtype=torch.float64)
    soft = torch.rand(9, 3, generator=g)
    labels = torch.tensor([0, 0, 1, 1, 1, -1, 2, 2, -1])
    calls = {
        "sup_con": [((torch.stack([x, y]), labels), {"mode": mode}) for mode in ("out", "in")],
        "soft_sup_con": [((torch.stack([x, y]), soft), {}), ((x,), {"weights": (soft, soft)})],
        "info_nce": [
            ((x, y), {}),
            ((x, y), {"symmetric": True}),
            ((x, y), {"negatives": ("in_batch", "queue"), "queue": x + 1}),
            ((x, y), {"negatives": "rows", "row_negatives": torch.stack([x + 1, y - 1], 1)}),
        ],
        "nt_xent": [((x, y), {}), ((x, y), {"ids": labels.abs(), "labels": labels.abs()})],
        "dcl": [((x, y), {}), ((x, y), {"weight": soft[:, 0].double()})],
        "n_pairs": [((x, y), {}), ((x, y), {"labels": labels.abs(), "l2": 0.02})],
        "contrastive_margin": [((x, labels.abs()), {"distance": d}) for d in ("euclid", "cosine")],
        "multi_similarity": [((x, labels.abs()), {})],
        "circle": [((x, labels.abs()), {})],
        "siglip": [((x, y), {}), ((x, y), {"positives": torch.rand(9, 9, generator=g)})],
    }.get(name, [((x, y), {})])
    for arguments, options in calls:
        ours = dc.loss(name, **options)(*arguments)
        torch.testing.assert_close(ours, spec.reference(*arguments, **options))


def test_the_package_runs_as_a_program(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["diptych_contrast", "list"])
    monkeypatch.delitem(sys.modules, "diptych_contrast.__main__")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("diptych_contrast", run_name="__main__")
    assert end.value.code == 0
    assert "sup_con" in capsys.readouterr().out


def test_values_on_another_device_are_not_looked_at():
    assert not readable(torch.empty(1, device="meta"))


def test_the_command_line_lists_and_explains(capsys):
    assert main(["list"]) == 0
    assert "nt_xent" in capsys.readouterr().out
    assert main(["explain", "sup_con"]) == 0
    assert "Khosla" in capsys.readouterr().out
    assert main(["explain", "supcon"]) == 2
    assert "did you mean 'sup_con'" in capsys.readouterr().err


PUBLIC = """
PairMask pair_lse pair_expect pair_max pair_sum PairInfo ContrastInputError ContrastWarning
default_tile nt_xent info_nce sup_con soft_sup_con clip_loss siglip dcl dclw hcl debiased
contrastive_margin multi_similarity n_pairs circle mv_info_nce mv_dhel poly_view pairwise_views
average_views nt_xent_multi Prototypes sinkhorn swav_loss PrototypeQueue proto_nce cluster_density
spherical_kmeans cacr amcl PairTemperature feature_transform PairGate arbitrary_pairs sep_clr
SepWeights joint_entropy sup_alignment soft_con balanced_regulariser logit_adjust
estimate_class_distribution self_balanced_sampling self_distillation cluster_accuracy triplet birank
boost_abs boost_rel boost_kl boost_pro label_guided KeyQueue CrossBatchMemory MomentumEncoder
cosine_momentum Temperature gather_with_grad gather_no_grad world grad_cache ProjectionHead
MultiHead head multi_crop_forward ClassBalancedSampler SubjectSampler alignment uniformity rank_me
effective_rank alpha_req nesum tolerance modality_gap positive_negative_scores gradient_balance
collapse_report knn_probe linear_probe few_label_probe ridge_probe retrieval losses loss explain
hypersphere gaussian_pairs
"""


def test_every_public_name_is_found_at_the_top():
    missing = [name for name in PUBLIC.split() if not hasattr(dc, name)]
    assert not missing
    rooms = "kernel pairwise multiview cluster reweight salient discover matching state dist"
    rooms += " gradcache heads samplers diagnostics probes registry testing"
    for room in rooms.split():
        assert importlib.import_module(f"diptych_contrast.{room}")


def test_an_input_error_survives_the_way_to_another_process():
    error = dc.ContrastInputError("nt_xent", argument="z1", found="is empty", fix="pass rows")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.argument, copy.fix) == (str(error), "z1", "pass rows")


LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
WITH_NAN = {
    "nt_xent": lambda x, y, **more: dc.nt_xent(x, y, ids=LABELS, **more),
    "nt_xent, labels": lambda x, y, **more: dc.nt_xent(x, y, labels=LABELS, **more),
    "dcl": lambda x, y, **more: dc.dcl(x, y, ids=LABELS, **more),
    "sup_con": lambda x, y, **more: dc.sup_con(torch.stack([x, y]), LABELS, **more),
    "clip_loss": dc.clip_loss,
    "info_nce": dc.info_nce,
    "mv_dhel": lambda x, y, **more: dc.mv_dhel(torch.stack([x, y]), **more),
    "multi_similarity": lambda x, y, **more: dc.multi_similarity(x, LABELS, **more),
    "contrastive_margin": lambda x, y, **more: dc.contrastive_margin(x, LABELS, **more),
}


@pytest.mark.parametrize("empty", ["skip", "zero"])
@pytest.mark.parametrize("name", WITH_NAN)
@pytest.mark.parametrize("rows", [1, 6])
def test_a_row_that_is_no_number_is_not_taken_for_an_empty_one(name, rows, empty):
    x, y = torch.randn(2, 6, 4)
    x[:rows] = torch.nan
    assert WITH_NAN[name](x, y, empty=empty).isnan()
