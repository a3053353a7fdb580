"""The run folder: what a training leaves, opened again here or on another machine."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel

from diptych.config import digest, dump_yaml, load_yaml, merge, resolve
from diptych.configfile import default_values, dotted, leaves
from diptych.contract import Artifact, Config, Facts, Fit, FitResult, Pipeline
from diptych.errors import DataError, UsageError
from diptych.files import read_json, write_json, write_text
from diptych.split import Split

if TYPE_CHECKING:
    from torch import nn

    from diptych.prepared import Prepared

FORMAT = 1
Settled = TypeVar("Settled", bound=BaseModel)
BY_CONTENT, NOT_KEPT = "sha256-", "not-kept"  # what stands in config.yaml for the user's paths


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and the small files in it.

    Args:
        path: The run folder.
    """

    path: Path

    @property
    def prepared(self) -> Path:
        """The prepared data, where the run made them itself."""
        return self.path / "prepared"

    @property
    def evaluation(self) -> Path:
        """Scores, results and pictures."""
        return self.path / "evaluation"

    def fit(self, name: str) -> Path:
        """The folder of a fit."""
        return self.path / "fits" / name

    def exists(self) -> bool:
        """Whether this is a run folder."""
        return (self.path / "run.json").is_file()

    def finished(self, name: str) -> bool:
        """Whether a fit has ended."""
        return (self.fit(name) / "fit.json").is_file()

    def result(self, name: str) -> FitResult:
        """What a finished fit tells later fits."""
        from diptych import artifacts

        stored = read_json(self.fit(name) / "fit.json")["result"]
        return FitResult(**stored, artifacts=artifacts.load(self.fit(name) / "artifacts"))

    def facts(self, name: str) -> Facts:
        """The facts that a finished fit was trained with."""
        facts: Facts = read_json(self.fit(name) / "fit.json")["facts"]
        return facts

    def fits(self) -> list[Fit]:
        """Every planned fit, in order."""
        stored = read_json(self.path / "split.json")
        splits = {key: _split_from(value) for key, value in stored["splits"].items()}
        return [_fit_from(entry, splits[entry["split"]]) for entry in stored["fits"]]

    def write_fits(self, fits: Sequence[Fit]) -> None:
        """Write ``split.json``: each different split once, and the fits that use them."""
        splits = {fit.split.digest(): fit.split for fit in fits}
        stored = {
            "splits": {key: _split_to(split) for key, split in splits.items()},
            "fits": [_fit_to(fit) for fit in fits],
        }
        write_json(self.path / "split.json", stored)

    @contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[None]:
        """Hold a lock of the run, so that jobs that share the folder do not meet.

        Raises:
            UsageError: Another process holds it and ``wait`` is False.
        """
        folder = self.path / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name.replace("/", "--"))
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise UsageError(
                f"{self.path}: '{name}' is being worked on by another process: wait for it to "
                "end, or stop it first"
            ) from None
        try:
            yield
        finally:
            lock.release()


def open_folder(path: Path) -> RunFolder:
    """A run folder that exists and that this version can read.

    Raises:
        UsageError: It is no run folder, or one of a later format.
    """
    folder = RunFolder(path)
    if not folder.exists():
        hint = "it does not exist" if not path.exists() else "it holds no run.json"
        raise UsageError(f"{path}: not a run folder ({hint}): give the folder that 'train' wrote")
    stored = read_json(path / "run.json")
    if stored["format"] != FORMAT:
        raise UsageError(
            f"{path}: run format {stored['format']}, this version reads format {FORMAT}: install "
            f"diptych-{stored['pipeline']} {stored['version']} to open it, or train again"
        )
    return folder


def create(folder: RunFolder, pipeline: Pipeline, config: BaseModel, command: str) -> None:
    """Write the files that identify a new run.

    Args:
        folder: Where; must not exist or be empty.
        pipeline: Whose run it is.
        config: The resolved config, which alone reproduces the run.
        command: The command that reproduces it, with DATA and RUN for paths.

    Raises:
        UsageError: The folder holds something already.
    """
    refuse_occupied(folder.path)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.path / "config.yaml", dump_yaml(portable(config)))
    write_json(folder.path / "environment.json", environment(config, command))
    identity = {"format": FORMAT, "pipeline": pipeline.name, "version": version(pipeline)}
    write_json(folder.path / "run.json", identity)


def refuse_occupied(out: Path) -> None:
    """Refuse a place for a new run that holds something already.

    Raises:
        UsageError: It is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file: give a new folder with --out")
    if out.exists() and any(out.iterdir()):
        raise UsageError(
            f"{out}: exists and is not empty: choose another --out, or go on with an "
            "interrupted run by --resume"
        )


def refuse_inside(out: Path, data: Path) -> None:
    """Refuse to write into the user's data folder.

    Raises:
        UsageError: ``out`` is the data folder or lies in it.
    """
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise UsageError(f"{out}: lies inside the data folder: choose another place with --out")


def version(pipeline: Pipeline) -> str:
    """The installed version of a pipeline's wheel."""
    try:
        return metadata.version(f"diptych-{pipeline.name}")
    except metadata.PackageNotFoundError:
        return metadata.version("diptych")


def environment(config: BaseModel, command: str) -> dict[str, Any]:
    """Versions and numbers that bit-identity depends on; nothing that names a machine."""
    import torch

    run = config.run  # type: ignore[attr-defined]
    packages = ("diptych", "diptych-contrast", "torch", "numpy", "scipy", "lightning-fabric")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "packages": versions,
        "threads": run.threads or torch.get_num_threads(),
        "processes": run.devices * run.nodes,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cpus": os.cpu_count(),
    }


def stored_config(folder: RunFolder, pipeline: Pipeline) -> Config:
    """The run's own config."""
    return load_yaml(pipeline.config, folder.path / "config.yaml")


def paths_of(config: BaseModel) -> dict[str, Path]:
    """The files that a configuration names, by dotted key."""
    found = {}
    for keys, _ in leaves(type(config)):
        value: Any = config
        for key in keys:
            value = getattr(value, key, None)
        if isinstance(value, Path):
            found[dotted(keys)] = value
    return found


def portable(config: Settled) -> Settled:
    """A configuration as a folder keeps it: the user's files by their content, not their path.

    Args:
        config: Any configuration; files of section ``run``, such as keys, leave no trace.
    """
    kept = {}
    for name, path in paths_of(config).items():
        if path.is_file() and not name.startswith("run."):
            kept[name] = BY_CONTENT + hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        elif not path.name.startswith(BY_CONTENT):
            kept[name] = NOT_KEPT
    return merge(config, kept) if kept else config


def for_other_data(config: Settled) -> Settled:
    """A run's configuration for reading data that are tested whole.

    Args:
        config: The run's configuration.

    Returns:
        The same without the files that describe the run's own data, and with the default split:
        other data need not allow the run's protocol.
    """
    own = [name for name, path in paths_of(config).items() if path.name.startswith(BY_CONTENT)]
    standard = default_values(type(config))
    return merge(config, {**dict.fromkeys(own), "split": standard.get("split", {})})


def require_files(folder: RunFolder, config: BaseModel) -> None:
    """Demand the files of a configuration that a run does not keep.

    Raises:
        UsageError: One is not there.
    """
    for name, path in paths_of(config).items():
        if not path.exists():
            raise UsageError(
                f"{folder.path}: its data are not prepared yet, and a run keeps no {name}: go on "
                f"with --resume --set {name}=FILE, the same file"
            )


def require_same(folder: RunFolder, pipeline: Pipeline, config: BaseModel) -> None:
    """Refuse to join a run with another config.

    Raises:
        UsageError: The configs differ in more than the section ``run``.
    """
    if digest(stored_config(folder, pipeline)) != digest(portable(config)):
        raise UsageError(
            f"{folder.path}: was made with another config: resume without --recipe, --config and "
            "--set, or choose another --out"
        )


@dataclass(frozen=True)
class TrainedFits:
    """Finished fits, opened on demand: the runtime's form of :class:`diptych.contract.Trained`.

    Args:
        folder: The run they live in.
        pipeline: Rebuilds the modules.
        config: The run's config, before the stage's and the fit's overrides.
        fits: Finished fits in order.
        final: Name of the fit that predicts.
    """

    folder: RunFolder
    pipeline: Pipeline
    config: Config
    fits: Sequence[Fit]
    final: str = "final"
    _modules: dict[str, Mapping[str, nn.Module]] = field(default_factory=dict, repr=False)

    def by_name(self, name: str) -> Fit:
        """A fit of the run.

        Raises:
            UsageError: The run has no finished fit of this name.
        """
        for fit in self.fits:
            if fit.name == name:
                return fit
        known = ", ".join(fit.name for fit in self.fits) or "none yet"
        raise UsageError(f"{self.folder.path}: no finished fit '{name}' (finished: {known})")

    def modules(self, fit: str) -> Mapping[str, nn.Module]:
        """The best modules of a fit in evaluation mode; the last opened fit is kept."""
        if fit not in self._modules:
            from diptych import checkpoint
            from diptych.randomness import isolated_globals

            known = self.by_name(fit)
            with isolated_globals():
                built = self.pipeline.modules(resolve(self.config, known), self.facts(fit), known)
            checkpoint.load_modules(self.folder.fit(fit), built)
            for module in built.values():
                module.eval().requires_grad_(False)
            self._modules.clear()
            self._modules[fit] = built
        return self._modules[fit]

    def facts(self, fit: str) -> Facts:
        """The facts that a fit was trained with."""
        return self.folder.facts(fit)

    def artifacts(self, fit: str) -> Mapping[str, Artifact]:
        """What a fit left; "csp_lda/final" names a baseline's artifacts for a fit."""
        from diptych import artifacts

        own = self.folder.fit(fit) / "artifacts"
        if not own.is_dir():
            own = self.folder.evaluation / "baselines" / fit
        return artifacts.load(own) if own.is_dir() else {}


def open_prepared(folder: RunFolder) -> Prepared:
    """The prepared data inside a run.

    Raises:
        DataError: The run was trained on prepared data that lie elsewhere.
    """
    from diptych.prepared import Prepared, is_prepared

    if not is_prepared(folder.prepared):
        raise DataError(
            f"{folder.path}: this run holds no prepared data of its own: give them with --data"
        )
    return Prepared.open(folder.prepared)


def same_fit(a: Fit, b: Fit) -> bool:
    """Whether two plans mean the same training by a name."""
    return _fit_to(a) == _fit_to(b)


def _fit_to(fit: Fit) -> dict[str, Any]:
    return {
        "name": fit.name,
        "split": fit.split.digest(),
        "seed": fit.seed,
        "stage": fit.stage,
        "method": fit.method,
        "overrides": dict(fit.overrides),
        "starts_from": fit.starts_from,
        "carries": list(fit.carries),
    }


def _fit_from(stored: Mapping[str, Any], split: Split) -> Fit:
    return Fit(**{**stored, "split": split, "carries": tuple(stored["carries"])})


def _split_to(split: Split) -> dict[str, Any]:
    rows = {part: list(values) for part, values in split.parts.items()}
    return {"disjoint_by": split.disjoint_by, **rows}


def _split_from(stored: Mapping[str, Any]) -> Split:
    parts = {part: tuple(stored[part]) for part in ("train", "validation", "test")}
    return Split(**parts, disjoint_by=stored["disjoint_by"])
