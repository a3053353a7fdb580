"""A look at the machine: versions, devices, memory, optional packages, installed pipelines."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from diptych import installed

GIGABYTE = 1e9
LEAST_PYTHON = (3, 11)
LEAST_DISK = 5.0  # GB; a prepared data set and its checkpoints rarely need less


@dataclass(frozen=True)
class Check:
    """One look at the machine.

    Args:
        name: What was looked at.
        status: "ok"; "note" works, but something is missing; "problem" must be mended.
        found: What is there.
        fix: What to do; "" where nothing is.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    found: str
    fix: str = ""


def doctor() -> list[Check]:
    """Look at everything; a look that fails is a problem of its own, never an exception."""
    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("memory", _memory),
        ("disk", _disk),
        ("packages", _packages),
        ("pipelines", _pipelines),
    ]
    checks: list[Check] = []
    for name, look in looks:
        try:
            checks.extend(look())
        except Exception as error:  # one broken library must not hide the rest
            found = f"{type(error).__name__}: {error}"
            checks.append(Check(name, "problem", found, f"install {name} anew"))
    return checks


def _python() -> Iterator[Check]:
    words = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < LEAST_PYTHON:
        yield Check("python", "problem", words, "install Python 3.11 or later")
    else:
        yield Check("python", "ok", words)


def _torch() -> Iterator[Check]:
    import torch

    yield Check("torch", "ok", torch.__version__)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = found.total_memory / GIGABYTE
            yield Check(f"cuda:{index}", "ok", f"{found.name}, {memory:.0f} GB")
    elif torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    else:
        built = torch.version.cuda
        fix = "install the GPU driver, or a torch build for its version" if built else ""
        yield Check("gpu", "note", "none; training runs on the CPU", fix)
    yield Check("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs")


def _memory() -> Iterator[Check]:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        yield Check("memory", "note", "not readable on this system")
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container or a batch job may use
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    if allowed.isdigit() and int(allowed) / GIGABYTE < total:
        yield Check("memory", "ok", f"{int(allowed) / GIGABYTE:.1f} GB of {total:.1f} GB allowed")
    else:
        yield Check("memory", "ok", f"{total:.1f} GB")


def _disk() -> Iterator[Check]:
    for name, folder in (("disk", Path.cwd()), ("disk, temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / GIGABYTE
        low = free < LEAST_DISK
        fix = "make room, or work in a folder on a larger disk" if low else ""
        yield Check(name, "note" if low else "ok", f"{free:.1f} GB free", fix)


def _packages() -> Iterator[Check]:
    """Requirements of every installed wheel of the family, with its extras."""
    names = {f"diptych-{name}" for name in installed.points()} | {"diptych", "diptych-contrast"}
    for name in sorted(names):
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "problem", "not installed as a package", f"pip install {name}")
            continue
        yield Check(name, "ok", found.version)
        yield from _requirements(name, [Requirement(text) for text in found.requires or ()])


def _requirements(wheel: str, requirements: list[Requirement]) -> Iterator[Check]:
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = _extra(requirement)
        if extra is None and requirement.marker and not requirement.marker.evaluate():
            continue  # for another system or Python
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if extra is None:
                fix = f"pip install '{requirement}'"
                yield Check(wheel, "problem", f"{requirement.name} is missing", fix)
            else:
                missing.setdefault(extra, []).append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            fix = f"pip install '{wanted}'"
            yield Check(wheel, "problem", f"{requirement.name} {version}, needs {wanted}", fix)
    for extra, names in missing.items():
        fix = f"pip install '{wheel}[{extra}]'"
        yield Check(wheel, "note", f"extra {extra}: no {', '.join(names)}", fix)


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to, or None where it is always needed."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    words = str(requirement.marker).partition("extra == ")[2]
    return words.strip("\"'() ") or None


def _pipelines() -> Iterator[Check]:
    for name in installed.points():
        try:
            yield Check(name, "ok", installed.load(name).title)
        except Exception as error:  # one broken wheel must not hide the others
            found = f"cannot be loaded: {type(error).__name__}: {error}"
            yield Check(name, "problem", found, f"pip install --force-reinstall diptych-{name}")
