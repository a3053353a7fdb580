"""What other programs import."""

import importlib
import subprocess
import sys

import pytest

import diptych_mclrec


def test_every_public_name_is_there():
    for name in diptych_mclrec.__all__:
        assert getattr(diptych_mclrec, name) is not None


@pytest.mark.parametrize("room", ["data", "augment", "losses", "demo"])
def test_the_names_of_a_binding_module_are_those_of_the_package(room):
    module = importlib.import_module(f"diptych_mclrec.{room}")
    for name in module.__all__:
        if name != "prepare":  # a room of its own
            assert getattr(module, name) is getattr(diptych_mclrec, name)


def test_the_pipeline_is_known_without_torch():
    code = (
        "import sys, diptych_mclrec, diptych_mclrec.pipeline as p; p.PIPELINE.config();"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
