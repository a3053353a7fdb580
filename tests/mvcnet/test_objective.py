from itertools import combinations
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import diptych_contrast as dc
from diptych_mvcnet.config import TAKES_IDS, MVCNetConfig, ObjectiveSection
from diptych_mvcnet.model import MVCNet, MVCNetOutput, forward_views
from diptych_mvcnet.objective import cross_model_loss, cross_view_loss, mvcnet_loss
from diptych_mvcnet.views import build_views

torch.set_num_threads(1)
TAU = 0.2


def features(views, n, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, views, n, d, generator=generator, dtype=torch.float64)
    return list(draw[0]), list(draw[1])


def ntx(a, b, leaves_out=lambda i, k, n: False):
    """Broadcast cosine, one row after the other, as the formula reads."""
    pool, n = torch.cat([a, b]), len(a)
    s = F.cosine_similarity(pool[:, None], pool[None], dim=-1) / TAU
    rows = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k != i and (k == partner or not leaves_out(i, k, n))]
        rows.append(torch.logsumexp(s[i, others], 0) - s[i, partner])
    return torch.stack(rows).mean()


def plain_cvc(zc, zt, keep, negatives):
    terms = []
    for view, kept in enumerate(keep, start=1):
        if kept and negatives == "all":
            terms.append(ntx(torch.cat([zc[0], zt[0]]), torch.cat([zc[view], zt[view]])))
        elif kept:
            terms.append((ntx(zc[0], zc[view]) + ntx(zt[0], zt[view])) / 2)
    return torch.stack(terms).mean() if terms else torch.zeros(())


def plain_cmc(zc, zt, negatives):
    n = len(zc[0])
    same_trial = (lambda i, k, _: i % n == k % n) if negatives != "all" else lambda *_: False
    return ntx(torch.cat(zc), torch.cat(zt), same_trial)


@pytest.mark.parametrize("negatives", ["same_branch", "all"])
@pytest.mark.parametrize("keep", [[True, True, True], [True, False, True], [False] * 3])
def test_the_cross_view_loss_is_its_formula(negatives, keep):
    zc, zt = features(4, 5)
    found = cross_view_loss(zc, zt, keep, negatives=negatives)
    assert float(found) == pytest.approx(float(plain_cvc(zc, zt, keep, negatives)), abs=1e-12)


@pytest.mark.parametrize("negatives", ["exclude_same_trial", "all"])
def test_the_cross_model_loss_is_its_formula(negatives):
    zc, zt = features(4, 5)
    found = cross_model_loss(zc, zt, negatives=negatives)
    assert float(found) == pytest.approx(float(plain_cmc(zc, zt, negatives)), abs=1e-12)


@pytest.mark.parametrize("negatives", ["exclude_same_trial", "all"])
def test_large_batches_equal_the_dense_form_with_gradients(negatives):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 32, 512, generator=generator).requires_grad_()
    exact = z.detach().double().requires_grad_()
    loss = cross_model_loss(list(z[0]), list(z[1]), negatives=negatives)
    pool = F.normalize(exact.reshape(256, 512), dim=1)
    s, row = pool @ pool.T / TAU, torch.arange(256)
    trial, partner = row % 32, (row + 128) % 256
    allowed = trial[:, None] != trial if negatives != "all" else row[:, None] != row
    allowed[row, partner] = True
    expected = torch.logsumexp(s.masked_fill(~allowed, -torch.inf), 1) - s[row, partner]
    loss.backward()
    expected.mean().backward()
    assert loss.item() == pytest.approx(expected.mean().item(), abs=1e-6)
    assert z.grad.allclose(exact.grad.float(), atol=1e-6)


def test_a_single_trial_has_no_contrast():
    zc, zt = features(4, 1)
    for one in zc + zt:
        one.requires_grad_()
    loss = cross_view_loss(zc, zt, [True] * 3) + cross_model_loss(zc, zt)
    assert loss.item() == 0
    loss.backward()
    assert all(not one.grad.any() for one in zc + zt)
    assert cross_model_loss(zc[:1], zt[:1], negatives="all").item() == 0


def pairs_of_terms(batch, views):
    """Signs of all pairs of features (branch, view, trial), read off the gradients.

    With orthogonal features the gradient at u in the direction of k is the sign of the pair.
    """
    rows = [(b, v, t) for b in range(2) for v in range(views) for t in range(batch)]
    eye = torch.eye(len(rows), dtype=torch.float64).reshape(2, views, batch, -1)
    signs = []
    for term in ("cvc", "cmc"):
        z = eye.clone().requires_grad_()
        zc, zt = list(z[0]), list(z[1])
        loss = (
            cross_view_loss(zc, zt, [True] * (views - 1))
            if term == "cvc"
            else cross_model_loss(zc, zt)
        )
        loss.backward()
        gradient = z.grad.reshape(len(rows), -1)
        signs.append({
            (rows[i], rows[k]): float(torch.sign(gradient[i, k] * (gradient[i, k].abs() > 1e-12)))
            for i, k in combinations(range(len(rows)), 2)
        })  # fmt: skip
    return signs


def test_no_pair_is_attracted_by_one_term_and_repelled_by_the_other():
    cvc, cmc = pairs_of_terms(batch=3, views=4)
    assert {-1.0, 0.0, 1.0} == set(cvc.values()) == set(cmc.values())
    assert [pair for pair in cvc if cvc[pair] * cmc[pair] < 0] == []
    attracted = {pair for pair, sign in cmc.items() if sign < 0}
    assert attracted == {((0, v, t), (1, v, t)) for v in range(4) for t in range(3)}


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 999))
@pytest.mark.parametrize("sound", [True, False])
def test_the_order_of_trials_does_not_matter(sound, order, seed):
    zc, zt = features(4, 5, seed=seed)
    cvc, cmc = ("same_branch", "exclude_same_trial") if sound else ("all", "all")
    moved = [[z[list(order)] for z in branch] for branch in (zc, zt)]
    for loss, keep, negatives in (
        (cross_view_loss, ([True] * 3,), cvc),
        (cross_model_loss, (), cmc),
    ):
        one, other = (loss(*z, *keep, negatives=negatives) for z in ((zc, zt), moved))
        assert float(one) == pytest.approx(float(other), abs=1e-12)


def outputs_of(zc, zt, labels, classes=2):
    logits = [z[:, :classes] for z in zc]
    return [MVCNetOutput(*one) for one in zip(logits, zc, zt, strict=True)], labels


def objective(**values):
    return MVCNetConfig.model_validate({"objective": values})


def test_a_view_with_changed_labels_is_no_positive():
    zc, zt = features(4, 6)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    outputs, labels = outputs_of(zc, zt, [y, y, y, 1 - y])
    found = mvcnet_loss(outputs, labels, objective())
    without = plain_cvc(zc, zt, [True, True, False], "same_branch")
    assert float(found["cvc"]) == pytest.approx(float(without), abs=1e-12)
    kept = mvcnet_loss(outputs, labels, objective(), keep=[True] * 3)
    both = mvcnet_loss(outputs, labels, objective(cvc_pairs="all"))
    assert float(kept["cvc"]) == float(both["cvc"]) != float(found["cvc"])


def test_the_total_is_the_weighted_sum_with_cross_entropy_summed_over_views():
    zc, zt = features(4, 6)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    outputs, labels = outputs_of(zc, zt, [y, y, y, 1 - y])
    found = mvcnet_loss(outputs, labels, objective(lambda_cvc=0.3, lambda_cmc=0.7))
    by_hand = sum(
        -torch.log_softmax(z[:, :2], 1)[range(6), label].mean()
        for z, label in zip(zc, labels, strict=True)
    )
    assert float(found["ce"]) == pytest.approx(float(by_hand), abs=1e-12)
    total = found["ce"] + 0.3 * found["cvc"] + 0.7 * found["cmc"]
    assert float(found["total"]) == pytest.approx(float(total), abs=1e-12)


def test_terms_of_weight_zero_cost_nothing():
    zc, zt = features(1, 6)
    y = torch.zeros(6, dtype=torch.long)
    outputs, labels = outputs_of(zc, zt, [y])
    found = mvcnet_loss(outputs, labels, objective(lambda_cvc=0, lambda_cmc=0))
    assert float(found["cvc"]) == float(found["cmc"]) == 0
    assert float(found["total"]) == float(found["ce"])


def test_trials_of_one_class_are_no_negatives_on_request():
    zc, zt = features(2, 4)
    y = torch.tensor([0, 1, 0, 1])
    found = cross_view_loss(zc, zt, [True], class_negatives="other_class", labels=y)
    expected = (
        sum(ntx(z[0], z[1], lambda i, k, n: bool(y[i % n] == y[k % n])) for z in (zc, zt)) / 2
    )
    assert float(found) == pytest.approx(float(expected), abs=1e-12)


def test_trials_of_one_class_are_positives_on_request():
    zc, zt = features(1, 4)
    y = torch.tensor([0, 1, 0, 1])
    found = cross_model_loss(zc, zt, class_negatives="supcon", labels=[y])
    pool, label = torch.cat([zc[0], zt[0]]), y.repeat(2)
    s = F.cosine_similarity(pool[:, None], pool[None], dim=-1) / TAU
    rows = []
    for i in range(8):
        others = [k for k in range(8) if k != i]
        positives = [k for k in others if label[k] == label[i]]
        rows.append(torch.logsumexp(s[i, others], 0) - s[i, positives].mean())
    assert float(found) == pytest.approx(float(torch.stack(rows).mean()), abs=1e-12)


def test_classes_must_be_known_where_they_matter():
    with pytest.raises(ValueError, match="labels"):
        cross_model_loss(*features(2, 4), class_negatives="other_class")


OFFICIAL = MVCNetConfig.model_validate({
    "data": {"window_closed": True},
    "views": {"freq_shift": {"parity_dt": 0.004}, "reflect": {"parity_binary_swap": True}},
    "model": {
        "cnn": {"filters": 6, "kernel": 15, "pool": 20, "dropout": 0.0},
        "transformer": {"embed_dim": None, "dropout": 0.0},
        "projector": {"form": "parity"},
    },
    "objective": {"cvc_pairs": "all", "cvc_negatives": "all", "cmc_negatives": "all"},
})  # fmt: skip


def test_the_official_step_equals_four_separate_passes_and_broadcast_cosines():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 6, 101, generator=generator), torch.tensor([0, 1, 1, 0])
    views, labels = build_views(
        x, y, OFFICIAL.views.use, sfreq=250.0, mirror=torch.tensor([1, 0, 2, 4, 3, 5]),
        settings=OFFICIAL.views,
    )  # fmt: skip
    ours = MVCNet(6, 101, 2, sfreq=250.0, config=OFFICIAL)
    plain = MVCNet(6, 101, 2, sfreq=250.0, config=OFFICIAL)
    plain.load_state_dict(ours.state_dict())
    found = mvcnet_loss(forward_views(ours, views), labels, OFFICIAL)

    passes = [plain(view) for view in views]
    zc, zt = [one.z_cnn for one in passes], [one.z_tr for one in passes]
    ce = sum(F.cross_entropy(one.logits, label) for one, label in zip(passes, labels, strict=True))
    cvc, cmc = plain_cvc(zc, zt, [True] * 3, "all"), plain_cmc(zc, zt, "all")
    expected = {"ce": ce, "cvc": cvc, "cmc": cmc, "total": ce + 0.1 * cvc + 0.1 * cmc}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-5), name
    found["total"].backward()
    expected["total"].backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad.allclose(theirs.grad, rtol=1e-3, atol=1e-5)
    for name, value in plain.named_buffers():
        assert dict(ours.named_buffers())[name].allclose(value, atol=1e-6)


@pytest.mark.parametrize("name", get_args(ObjectiveSection.model_fields["contrast"].annotation))
def test_the_contrasts_take_any_loss_of_two_views(name):
    z_cnn, z_tr = features(3, 5)
    views = [(z_cnn[0], z_cnn[view]) for view in (1, 2)] + [
        (z_tr[0], z_tr[view]) for view in (1, 2)
    ]
    function, spec = getattr(dc, name), dc.losses()[name]
    several, options = "views>=2" in spec.needs, {} if name == "cacr" else {"temperature": TAU}
    expected = [
        function(pair, **options) if several else function(*pair, **options) for pair in views
    ]
    found = cross_view_loss(z_cnn, z_tr, [True, True], contrast=name)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    excluded = "exclude_same_trial" if name in TAKES_IDS else "all"
    loss = cross_model_loss(
        [z.requires_grad_() for z in z_cnn], z_tr, contrast=name, negatives=excluded
    )
    loss.backward()
    assert all(torch.isfinite(z.grad).all() for z in z_cnn)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"contrast": "hcl"}, "cmc_negatives=all"),
        ({"contrast": "dcl", "negatives": "supcon"}, "negatives=all"),
        ({"contrast": "clip_loss"}, "nt_xent"),
    ],
)
def test_a_contrast_that_cannot_do_what_is_asked_is_refused(values, word):
    with pytest.raises(ValueError, match=word):
        MVCNetConfig.model_validate({"objective": values})
    assert (
        MVCNetConfig.model_validate(
            {"objective": {"contrast": "hcl", "cmc_negatives": "all"}}
        ).objective.contrast
        == "hcl"
    )
