"""Zones in three lines of Python: fit on a manifest, predict a study, save and load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, cast

from torch import nn

from diptych import artifacts, checkpoint, loop
from diptych.config import dump_yaml, load, load_yaml, merge, resolve
from diptych.contract import Fit, Task
from diptych.errors import DataError
from diptych.files import read_json, write_json, write_text
from diptych.findings import Findings
from diptych.folders import write_folder
from diptych.prepared import Prepared
from diptych.randomness import isolated_globals, seed_globals
from diptych.split import Split
from diptych_pirads.check import check
from diptych_pirads.config import PiradsConfig
from diptych_pirads.layout import locate
from diptych_pirads.novelty import ARTIFACT
from diptych_pirads.predict import Segmenter, Zones, predict_study, segmenter_of
from diptych_pirads.scale import ARTIFACT as SCALE
from diptych_pirads.split import everyone, splits_of
from diptych_pirads.store import prepare
from diptych_pirads.task import MODEL, build, modules

CONFIG, FACTS, WEIGHTS, LEFT = "config.yaml", "facts.json", "model.safetensors", "artifacts"


class ZonalSegmenter:
    """The dual-path network for prostate zones, without a run folder.

    It measures nothing: `diptych pirads train` gives the same network with baselines, statistics
    and a report.

    Args:
        recipe: Name of a recipe.
        seed: Seed of initialisation, order and augmentation.
        overrides: Values over the recipe's, by dotted key.

    Example:
        ``ZonalSegmenter().fit("studies.csv").predict("case_t2.nii.gz").volumes["pz"]``
    """

    def __init__(
        self, recipe: str = "fast", seed: int = 0, overrides: Mapping[str, Any] | None = None
    ) -> None:
        self.recipe = recipe
        self.seed = seed
        self.overrides = overrides
        self._fitted: Segmenter | None = None

    def fit(self, manifest: Path | str) -> Self:
        """Train on the studies of a manifest.

        Args:
            manifest: `studies.csv`. Where its column split is filled, its training part is
                trained on, its validation part chooses the best epoch and its test part is left
                alone; else all studies are trained on for the whole schedule.

        Returns:
            The fitted segmenter.

        Raises:
            DataError: The findings of data that cannot be used.
        """
        config = merge(load(PiradsConfig, recipe=self.recipe), self.overrides or {})
        config = merge(config, {"run.seeds": [self.seed]})
        source = Path(manifest)
        findings = check(config, source)
        if findings.errors:
            lines = "\n".join(one.line() for one in findings.errors)
            raise DataError(lines, findings)
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            prepared = prepare(config, source, Path(folder) / "prepared")
            self._fitted = self._train(config, prepared)
        return self

    def predict(
        self, path: Path | str, psa: float | None = None, lesions: Path | str | None = None
    ) -> Zones:
        """Segment one study.

        Args:
            path: A T2-weighted image, a folder of its DICOM files, or a manifest of one study.
            psa: Serum PSA in ng/mL.
            lesions: Mask of lesions whose sectors are wanted.

        Returns:
            Zones on the grid of the file, volumes, disagreement of the paths and more.

        Raises:
            DataError: The findings of a study that cannot be used.
            ValueError: The path holds several studies.
        """
        studies, findings = locate(Path(path))
        errors = [one for one in findings if one.severity == "error"]
        if errors:
            raise DataError(errors[0].line(), Findings(tuple(findings)))
        names = {(one.subject, one.study) for one in studies}
        if len(names) != 1:
            raise ValueError(f"{path}: {len(names)} studies: predict them one by one")
        study = replace(
            studies[0],
            psa=studies[0].psa if psa is None else psa,
            lesions=studies[0].lesions if lesions is None else Path(lesions),
        )
        return predict_study(self._ready(), study, study.study)

    def save(self, folder: Path | str) -> None:
        """Write the fitted segmenter, so that `load` gives it back anywhere.

        Args:
            folder: Gets configuration, facts, weights and statistics; no image, no name.
        """
        fitted = self._ready()

        def write(target: Path) -> None:
            write_text(target / CONFIG, dump_yaml(fitted.config))
            write_json(target / FACTS, dict(fitted.facts))
            checkpoint.write_tensors(target / WEIGHTS, {MODEL: fitted.network.state_dict()})
            parts = {ARTIFACT: dict(fitted.novelty), SCALE: dict(fitted.scale)}
            left = {name: part for name, part in parts.items() if part}
            if left:
                artifacts.save(left, target / LEFT)

        write_folder(Path(folder), write)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """A segmenter that `save` wrote.

        Args:
            folder: The folder.

        Raises:
            DataError: It holds no segmenter, or one of another version.
        """
        source = Path(folder)
        missing = [name for name in (CONFIG, FACTS, WEIGHTS) if not (source / name).is_file()]
        if missing:
            raise DataError(f"{source}: no saved segmenter: {', '.join(missing)} is missing")
        config = load_yaml(PiradsConfig, source / CONFIG)
        facts = read_json(source / FACTS)
        fit = Fit("final", Split(()), config.run.seeds[0], stage=config.train.stages[-1])
        built = modules(resolve(config, fit), facts, fit)
        tensors = checkpoint.read_tensors(source / WEIGHTS)
        checkpoint.load_tensors(built, tensors, str(source))
        left = artifacts.load(source / LEFT) if (source / LEFT).is_dir() else {}
        made = cls(seed=config.run.seeds[0])
        made._fitted = segmenter_of(built[MODEL].eval(), facts, config, left)
        return made

    def _ready(self) -> Segmenter:
        if self._fitted is None:
            raise ValueError("this segmenter is not fitted: call fit, or load a saved one")
        return self._fitted

    def _train(self, config: PiradsConfig, prepared: Prepared) -> Segmenter:
        index = prepared.index
        divided = "split" in index.columns and index["split"].is_not_null().any()
        split = splits_of(config.split, index)[0] if divided else everyone(index)
        split = replace(split, test=())
        built: dict[str, nn.Module] = {}
        left: Mapping[str, Any] = {}
        for number, stage in enumerate(config.train.stages):
            fit = Fit(stage, split, self.seed, stage=stage)
            own = resolve(config, fit)
            if not built:
                with isolated_globals():
                    seed_globals(self.seed, stage, 0, 0)
                    built = modules(own, prepared.facts, fit)
            train = own.train
            if not split.validation:
                train = train.model_copy(update={"metric": None, "patience": None})
            settings = loop.Settings(
                train,
                own.run,
                self.seed,
                stage=stage,
                facts=dict(prepared.facts),
                better="higher" if train.metric else None,
                validate_first=bool(number) and train.metric is not None,
            )
            task = cast("Task", build(own, prepared, fit, built, {}))
            left = loop.fit(task, settings).artifacts
        network = built[MODEL].eval()
        return segmenter_of(network, dict(prepared.facts), config, left)
