import doctest
import importlib
import pkgutil

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


def test_the_examples_of_all_docstrings_hold():
    public = {name: getattr(dc, name) for name in dir(dc)} | {"torch": torch, "nn": torch.nn}
    tried = 0
    for found in pkgutil.walk_packages(dc.__path__, "diptych_contrast."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            result = doctest.testmod(module, globs=public | vars(module))
            assert result.failed == 0, module.__name__
            tried += result.attempted
    assert tried > 50
