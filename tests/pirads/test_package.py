"""What other programs import."""

from __future__ import annotations

import subprocess
import sys

import diptych_pirads


def test_every_public_name_is_there() -> None:
    for name in diptych_pirads.__all__:
        assert getattr(diptych_pirads, name) is not None


def test_the_pipeline_is_known_without_torch() -> None:
    code = (
        "import sys, diptych_pirads, diptych_pirads.pipeline as p; p.PIPELINE.config();"
        "assert not {'torch', 'scipy', 'matplotlib', 'SimpleITK'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
