import pytest
import torch

import diptych_contrast as dc


def test_a_loss_by_name_is_the_loss_with_arguments_set():
    x, y = torch.randn(2, 6, 4)
    torch.testing.assert_close(dc.loss("nt_xent", temperature=0.3)(x, y), dc.nt_xent(x, y, 0.3))


def test_an_unknown_name_or_keyword_is_answered_with_the_nearest():
    with pytest.raises(dc.ContrastInputError, match="did you mean 'nt_xent'"):
        dc.loss("nt_xnt")
    with pytest.raises(dc.ContrastInputError, match="did you mean 'temperature'"):
        dc.loss("nt_xent", temprature=0.1)
    with pytest.raises(dc.ContrastInputError, match="did you mean"):
        dc.explain("sup_conn")


@pytest.mark.parametrize("name", dc.losses())
def test_every_loss_explains_itself_and_has_a_dense_reference(name):
    text = dc.explain(name)
    assert name in text.splitlines()[0]
    assert "def " in text
    assert dc.losses()[name].formula
    assert callable(dc.losses()[name].reference)
