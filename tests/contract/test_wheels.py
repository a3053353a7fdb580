"""The wheels hold all that their programs need."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from .conftest import NAMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the project's wheels; only other people's packages are shared."""
    folder = tmp_path_factory.mktemp("wheels")
    projects = [str(path.parent) for path in sorted(ROOT.glob("*/*/pyproject.toml"))]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    pip(Path(sys.executable), *build, "--wheel-dir", str(folder), *projects)
    venv.create(folder / "environment", with_pip=False, symlinks=os.name != "nt")
    binaries = "Scripts" if os.name == "nt" else "bin"
    python = folder / "environment" / binaries / Path(sys.executable).name
    wheels = [str(path) for path in folder.glob("*.whl")]
    pip(Path(sys.executable), "--python", str(python), "install", "--quiet", "--no-deps", *wheels)
    # Packages of a .pth folder are found, its own .pth files, which hold the checkout, are not.
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(site.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path, *words: str) -> None:
    subprocess.check_call([python, "-m", "pip", *words])


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [name for name in NAMES if name != "toy"])
def test_an_installed_wheel_runs_its_demo(pipeline: str, python: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    source = f"import diptych_{pipeline} as package; print(package.__file__)"
    place = subprocess.check_output([python, "-c", source], text=True, env=environment)
    assert str(python.parents[1]) in place
    demo = [python, "-m", "diptych", pipeline, "demo", "--out", str(tmp_path / "demo")]
    subprocess.run(demo, check=True, capture_output=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "demo" / "run" / "report.html").is_file()
