#!/usr/bin/env python3
"""Set-up, demo, tests, lint, docs and wheels of the workspace, with the standard library only.

    python3 tools/dev.py demo [PIPELINE|all]   set up, run the demo, say where the report is
    python3 tools/dev.py test [--all|--ci]     set up, lint, test
    python3 tools/dev.py setup | lint | docs | wheels

Everything lives in ``.venv`` beside this folder; nothing else on the machine is changed. pip is
used with the user's own configuration, under the versions of ``constraints.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = str(BIN / ("python.exe" if os.name == "nt" else "python"))
STAMP = VENV / "diptych-setup.json"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = (3, 11)
SHARED = ["shared/contrast", "shared/runtime"]
TOOLS = [
    "build", "codespell", "deptry", "edfio", "eeglabio", "furo", "hatchling", "highdicom",
    "hypothesis", "import-linter", "mypy", "myst-parser", "onnx", "onnxruntime", "onnxscript",
    "psutil", "pybv", "pytest", "pytest-cov", "pytest-timeout", "pytest-xdist", "ruff", "sphinx",
    "sphinx-gallery", "tensorboard",
]  # fmt: skip


def main() -> int:
    """Run one command; returns its exit code."""
    if sys.version_info < OLDEST:
        return _fail("Python 3.11 or newer is needed, this is " + sys.version.split()[0])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="install everything for development")
    demo = commands.add_parser("demo", help="run a pipeline on its generated sample")
    demo.add_argument("pipeline", nargs="?", default="mvcnet", choices=[*pipelines(), "all"])
    test = commands.add_parser("test", help="lint, then fast tests")
    test.add_argument("--all", action="store_true", help="slow tests and tests on real data too")
    test.add_argument("--ci", action="store_true", help="everything, the documentation too")
    for name, text in (("lint", "all linters"), ("docs", "build the documentation")):
        commands.add_parser(name, help=text)
    commands.add_parser("wheels", help="build one wheel a folder into dist/")
    options = parser.parse_args()
    try:
        return _run(options)
    except subprocess.CalledProcessError as error:
        return _fail("this command failed: " + " ".join(map(str, error.cmd)))
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it was")


def _run(options: argparse.Namespace) -> int:
    if options.command == "demo":
        names = pipelines() if options.pipeline == "all" else [options.pipeline]
        setup(names, tools=False)
        return max(demo(name) for name in names)
    setup(pipelines(), tools=True)
    if options.command == "lint":
        return lint()
    if options.command == "docs":
        return docs()
    if options.command == "wheels":
        return wheels()
    if options.command == "test":
        return test_everything(options)
    return 0


def pipelines() -> list[str]:
    """Names of the pipelines in this checkout, mvcnet first."""
    names = sorted(path.parent.name for path in ROOT.glob("pipelines/*/pyproject.toml"))
    return sorted(names, key=lambda name: name != "mvcnet")


def setup(names: list[str], *, tools: bool) -> None:
    """Create ``.venv`` and install what is missing; does nothing when all is there.

    Args:
        names: Pipelines to install.
        tools: Whether tests, linters and documentation are wanted too.
    """
    folders = SHARED + [path.as_posix() for path in _packages()] + ["pipelines/" + n for n in names]
    wanted = folders + (TOOLS if tools else [])
    state = _state()
    known = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    have = set(known.get("installed", [])) if known.get("state") == state else set()
    if have >= set(wanted) and Path(PYTHON).exists():
        return
    print("Setting up .venv (the first time this takes some minutes) ...", flush=True)
    _make_environment()
    _pip("install", "--quiet", "--upgrade", "pip>=24")
    _install_torch()
    editable = [part for folder in folders for part in ("--editable", str(ROOT / folder))]
    extras = TOOLS if tools else []
    _pip("install", "--quiet", "--constraint", str(CONSTRAINTS), *editable, *extras)
    STAMP.write_text(json.dumps({"state": state, "installed": sorted(have | set(wanted))}))


def _packages() -> list[Path]:
    return sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("packages/*/pyproject.toml"))


def _state() -> str:
    """A hash of everything that decides what is installed."""
    files = [CONSTRAINTS, ROOT / "VERSION", *sorted(ROOT.glob("*/*/pyproject.toml"))]
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content + sys.version.encode() + str(ROOT).encode()).hexdigest()


def _make_environment() -> None:
    works = Path(PYTHON).exists() and _succeeds([PYTHON, "-m", "pip", "--version"])
    if not works:
        try:
            _call([sys.executable, "-m", "venv", "--clear", str(VENV)])
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            raise SystemExit(
                _fail("Python cannot make a virtual environment: install its venv module "
                      "(Debian and Ubuntu: apt install python3-venv)")
            ) from None  # fmt: skip


def _install_torch() -> None:
    """The pinned torch; without an NVIDIA driver its CPU build, where the index offers one."""
    pin = next(
        line.strip() for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")
    )
    if _succeeds([PYTHON, "-c", "import torch, sys; sys.exit(torch.__version__.split('+')[0] != "
                  + repr(pin.split("==")[1]) + ")"]):  # fmt: skip
        return
    if shutil.which("nvidia-smi") is None and sys.platform.startswith("linux"):
        cpu = [PYTHON, "-m", "pip", "install", "--quiet", pin + "+cpu"]
        if _succeeds(cpu):
            return
    _pip("install", "--quiet", pin)


def demo(name: str) -> int:
    """Run one pipeline's demo and say where its report is."""
    out = ROOT / "demo" / name
    start = time.monotonic()
    code = subprocess.call([_tool("diptych"), name, "demo", "--out", str(out)])
    if code == 0:
        print(f"\n{name}: the report is {out / 'run' / 'report.html'}")
        print(f"{name}: {time.monotonic() - start:.0f} s")
    return code


def lint() -> int:
    """Every linter, all of them even if one complains."""
    sources = [p.relative_to(ROOT).as_posix() for p in ROOT.glob("*/*/src")]
    commands = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", *sources, "tools"],
        ["lint-imports", "--no-cache"],
        ["codespell", *sources, "tests", "tools", "docs", *(p.name for p in ROOT.glob("*.md"))],
        ["python", "tools/limits.py"],
    ]
    codes = [_lint(command) for command in commands]
    codes += [_deptry(folder) for folder in sorted(ROOT.glob("*/*/pyproject.toml"))]
    return max(codes)


def _lint(command: list[str]) -> int:
    tool, *rest = command
    code = subprocess.call([_tool(tool), *rest], cwd=ROOT)
    print(f"{'ok  ' if code == 0 else 'FAIL'} {tool} {rest[0] if rest else ''}", flush=True)
    return code


def _tool(name: str) -> str:
    return str(BIN / name)


def _deptry(project: Path) -> int:
    code = subprocess.call([_tool("deptry"), "src"], cwd=project.parent)
    print(f"{'ok  ' if code == 0 else 'FAIL'} deptry {project.parent.name}", flush=True)
    return code


def test_everything(options: argparse.Namespace) -> int:
    """Lint, then the tests that were asked for."""
    codes = [lint()]
    marks = [] if options.all or options.ci else ["-m", "not slow and not data"]
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    workers = str(min(os.cpu_count() or 1, 8))
    tests = [PYTHON, "-m", "pytest", "-n", workers, "--dist", "worksteal", *marks]
    if options.ci:
        codes.append(docs())
    codes.append(subprocess.call(tests, cwd=ROOT, env=threads))
    return max(codes)


def docs() -> int:
    """Build the documentation; a warning is an error."""
    sphinx = [PYTHON, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "docs/_build/html"]
    code = subprocess.call(sphinx, cwd=ROOT)
    print(f"{'ok  ' if code == 0 else 'FAIL'} docs: docs/_build/html/index.html", flush=True)
    return code


def wheels() -> int:
    """One wheel a folder into ``dist/``."""
    for project in sorted(ROOT.glob("*/*/pyproject.toml")):
        _pip(
            "wheel", "--quiet", "--no-deps", "--wheel-dir", str(ROOT / "dist"), str(project.parent)
        )
    print("\n".join(sorted(path.name for path in (ROOT / "dist").glob("*.whl"))))
    return 0


def _pip(*arguments: str) -> None:
    _call([PYTHON, "-m", "pip", *arguments])


def _call(command: list[str]) -> None:
    subprocess.check_call(command, cwd=ROOT)


def _succeeds(command: list[str]) -> bool:
    nowhere = subprocess.DEVNULL
    return subprocess.call(command, cwd=ROOT, stdout=nowhere, stderr=nowhere) == 0


def _fail(message: str) -> int:
    print("dev.py: " + message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
