"""Weights from elsewhere: another run's, or a published checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych import run as runs
from diptych.config import merge, override
from diptych.contract import Artifact, Facts, Fit, Pipeline, Weights
from diptych.errors import UsageError
from diptych.files import read_json, write_json
from diptych.run import RunFolder
from diptych.split import Split

if TYPE_CHECKING:
    from torch import Tensor, nn

TENSORS, RECORD = "init.safetensors", "init.json"


@dataclass(frozen=True)
class Initial:
    """Tensors that fits start from, and the sources they have seen.

    Args:
        tensors: By module, then by name.
        sources: First 12 hex digits of the files the weights were trained on, where known.
        partial: Whether tensors that do not match may be left as initialised.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    sources: tuple[str, ...]
    partial: bool

    def keep(self, folder: RunFolder) -> None:
        """Copy the weights into a run, so that it can be resumed without their origin."""
        from diptych import checkpoint

        checkpoint.write_tensors(folder.path / TENSORS, self.tensors)
        write_json(folder.path / RECORD, {"sources": list(self.sources), "partial": self.partial})


def read_initial(pipeline: Pipeline, origin: str, *, partial: bool) -> Initial:
    """Read the weights behind ``--init``.

    Args:
        pipeline: Opens published checkpoints.
        origin: RUN, RUN:FIT or a file.
        partial: Whether mismatching tensors may be left out.

    Raises:
        UsageError: Nothing readable is there.
    """
    from diptych import checkpoint

    path = Path(origin)
    name = "final"
    if not path.exists() and ":" in origin:
        before, _, name = origin.rpartition(":")
        path = Path(before)
    if path.is_file():
        return Initial(_published_weights(pipeline, path, pipeline.config()).tensors, (), partial)
    if not path.exists():
        raise UsageError(f"--init {origin}: does not exist: give a run, RUN:FIT or a weights file")
    folder = runs.open_folder(path)
    fits = {fit.name: fit for fit in folder.fits() if folder.finished(fit.name)}
    if name not in fits:
        raise UsageError(f"--init {origin}: finished fits are {', '.join(fits) or 'none yet'}")
    tensors = checkpoint.best_tensors(folder.fit(name))
    return Initial(tensors, tuple(seen_sources(folder, fits[name])), partial)


def seen_sources(folder: RunFolder, fit: Fit) -> list[str]:
    """Sources and their files (first 12 hex of the hash) that a fit of a run was trained on."""
    from diptych.manifest import Manifest

    names: list[set[str]] = []
    for entry in Manifest.read(folder.path).sources:
        names += [entry.names] * entry.rows
    return sorted(set().union(*(names[row] for row in (*fit.split.train, *fit.split.validation))))


def initialise(folder: RunFolder, fit: Fit, modules: Mapping[str, nn.Module]) -> list[str]:
    """Copy the weights that a fit starts from into fresh modules.

    Args:
        folder: The run; may keep weights given by ``--init``.
        fit: Starts from an earlier fit, from the run's initial weights, or from nothing.
        modules: Changed in place. A resumed fit overwrites them by its checkpoint.

    Returns:
        Lines that say which tensors matched and which did not.
    """
    from diptych import checkpoint

    if fit.starts_from:
        tensors = checkpoint.best_tensors(folder.fit(fit.starts_from))
        return checkpoint.init_from(modules, tensors, carries=fit.carries, partial=False)
    if (folder.path / TENSORS).is_file():
        tensors = checkpoint.read_tensors(folder.path / TENSORS)
        partial = read_json(folder.path / RECORD)["partial"]
        return checkpoint.init_from(modules, tensors, carries=(), partial=partial)
    return []


@dataclass(frozen=True)
class Published:
    """A published checkpoint in the form of trained fits: one final fit, nothing else."""

    pipeline: Pipeline
    config: Any
    weights: Weights
    fits: Sequence[Fit] = field(default=(Fit("final", Split(()), 0),))
    final: str = "final"

    def modules(self, fit: str) -> Mapping[str, nn.Module]:
        """The published modules in evaluation mode."""
        from diptych import checkpoint

        built = self.pipeline.modules(self.config, self.weights.facts, self.fits[0])
        checkpoint.init_from(built, self.weights.tensors, carries=(), partial=False)
        for module in built.values():
            module.eval().requires_grad_(False)
        return built

    def facts(self, fit: str) -> Facts:
        """The published facts."""
        return self.weights.facts

    def artifacts(self, fit: str) -> Mapping[str, Artifact]:
        """A published checkpoint brings none."""
        return {}


def published(pipeline: Pipeline, path: Path, sets: Sequence[str], section: str) -> Published:
    """Open a published checkpoint as trained fits.

    Raises:
        UsageError: The pipeline reads no published weights.
    """
    config = override(pipeline.config(), sets, section)
    weights = _published_weights(pipeline, path, config)
    return Published(pipeline, merge(config, weights.overrides, str(path)), weights)


def _published_weights(pipeline: Pipeline, path: Path, config: Any) -> Weights:
    if pipeline.weights is None:
        raise UsageError(f"{path}: {pipeline.name} opens no published weights: give a run folder")
    return pipeline.weights(config, path)
