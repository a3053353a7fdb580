"""The configuration of ``pirads``: every value, its unit and its default (the recipe ``fast``).

Axes are z, y, x: slices from feet to head, rows from front to back, columns to the patient's left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from diptych.config import (
    AT_PREDICT,
    DataSection,
    EvaluateSection,
    OptimSection,
    PipelineConfig,
    PredictSection,
    Section,
    SplitSection,
    TrainSection,
)

Scheme = Literal[
    "auto",
    "zones4",
    "pz_tz",
    "msd05",
    "prostate158",
    "gland",
    "ucla_png",
    "prostatezones",
    "prostatex_masks",
]
Baseline = Literal["mean_shape", "box_atlas", "aniso", "unet"]
SHAPE_BASELINES: tuple[Baseline, ...] = ("mean_shape", "box_atlas")  # need no training
TRAINED_BASELINES: tuple[Baseline, ...] = ("aniso", "unet")  # networks, as many steps
Zone = Literal["pz", "tz", "dpu", "afs"]
Triple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Grid = tuple[PositiveInt, PositiveInt, PositiveInt]
HALVINGS = (2, 8, 8)  # three in-plane poolings and one through-plane


class GeometrySection(Section):
    """The grid on which the network works."""

    spacing: Triple = Field((3.0, 0.75, 0.75), description="Voxel size along z, y, x in mm.")
    size: Grid = Field((24, 112, 112), description="Voxels of a crop along z, y, x.")
    size_rounding: Literal["round", "floor"] = Field(
        "round", description="Voxels of a resampled series; floor: as Meyer et al. 2019."
    )

    @model_validator(mode="after")
    def _poolings_divide_the_crop(self) -> GeometrySection:
        for axis, size, factor in zip("zyx", self.size, HALVINGS, strict=True):
            if size % factor:
                near = max(factor, round(size / factor) * factor)
                raise ValueError(
                    f"size {size} along {axis} is no multiple of {factor}: take {near}"
                )
        return self


class CropSection(Section):
    """Where a crop is taken."""

    center: Literal["auto", "roi3", "label", "localizer", "volume"] = Field(
        "auto",
        description="Middle of a training crop; auto: what axial, sagittal and coronal series "
        "share, else the label, else the volume.",
    )
    jitter_mm: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (6.0, 8.0, 8.0), description="Largest shift of a training crop along z, y, x in mm."
    )


class NormalizeSection(Section):
    """Intensities, from the voxels of a crop-sized box that no label chooses."""

    mode: Literal["percentile", "zscore", "nyul"] = Field(
        "percentile",
        description="percentile: to [0, 1]; zscore: mean 0, standard deviation 1; nyul: to [0, 1], "
        "then to the mean deciles of the training part.",
    )
    low: float = Field(1.0, ge=0, lt=100, description="Percentile that becomes 0.")
    high: float = Field(99.0, gt=0, le=100, description="Percentile that becomes 1.")
    ignore_padding: bool = Field(True, description="Voxels of exactly 0 do not count.")

    @model_validator(mode="after")
    def _low_is_lower(self) -> NormalizeSection:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class PiradsDataSection(DataSection):
    """Which series and labels are read, and how they are brought to one grid."""

    channels: tuple[Literal["t2", "adc", "hbv"], ...] = Field(
        ("t2",), description="Series that the network sees, T2-weighted first."
    )
    scheme: Scheme = Field(
        "auto", description="What label values mean where the manifest does not say; auto: guessed."
    )
    series: str | None = Field(
        None,
        description="DICOM folders with several series: a SeriesInstanceUID or a pattern of the "
        "description, such as *t2*tra*.",
        json_schema_extra=AT_PREDICT,
    )
    strict: bool = Field(False, description="Zones that look exchanged are an error.")
    repair_nan: Literal["off", "median"] = Field(
        "off",
        description="Voxels that are no number: an error, or the median of their slice.",
        json_schema_extra=AT_PREDICT,
    )
    registration: Literal["none", "rigid"] = Field(
        "none",
        description="How ADC and high-b series come to the T2-weighted one: by their headers, or "
        "moved by up to 5 mm and 5 degrees.",
    )
    same_studies: Path | None = Field(
        None, description="JSON (or .json.gz) that maps studies of one data set to another's."
    )
    geometry: GeometrySection = Field(GeometrySection(), description="Working grid.")
    crop: CropSection = Field(CropSection(), description="Crops.")
    normalize: NormalizeSection = Field(NormalizeSection(), description="Intensities.")

    @model_validator(mode="after")
    def _t2_comes_first(self) -> PiradsDataSection:
        if self.channels[:1] != ("t2",) or len(set(self.channels)) != len(self.channels):
            raise ValueError(f"channels {list(self.channels)}: t2 comes first, each channel once")
        return self


class PathsSection(Section):
    """The zones of the two paths of the dual-path network; the rest is one more output of each."""

    a: tuple[Zone, ...] = Field(("pz", "tz", "dpu"), description="Zones of path a.")
    b: tuple[Zone, ...] = Field(("pz", "tz", "afs"), description="Zones of path b.")

    @model_validator(mode="after")
    def _paths_cover_all_and_share_some(self) -> PathsSection:
        missing = set(get_args(Zone)) - set(self.a) - set(self.b)
        if missing:
            raise ValueError(f"no path has {', '.join(sorted(missing))}: add it to one")
        if not set(self.a) & set(self.b):
            raise ValueError("the paths share no zone: give both at least one, such as pz")
        return self


class ModelSection(Section):
    """The network."""

    name: Literal["dualpath", "aniso", "unet"] = Field(
        "dualpath", description="dualpath; aniso: one path (Meyer et al. 2019); unet: MONAI's."
    )
    base: PositiveInt = Field(8, description="Filters of the first convolution.")
    share: Literal["none", "encoder", "stem"] = Field(
        "encoder", description="What the two paths have in common."
    )
    paths: PathsSection = Field(PathsSection(), description="Zones of the two paths.")
    up_kernel: Literal["stride", "meyer"] = Field(
        "stride", description="Kernel of up-convolutions; meyer: 2 x 2 x 2 with a trailing cut."
    )
    norm: Literal["instance", "batch"] = Field("instance", description="Normalisation.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Probability of dropping a feature.")
    fuse: Literal["product", "mean", "a_then_b"] = Field(
        "product", description="How two paths become one map of classes."
    )
    checkpoint: bool = Field(False, description="Recompute full-resolution blocks: less memory.")


Range = tuple[PositiveFloat, PositiveFloat]
Degrees = Annotated[float, Field(ge=0, le=180)]


class ViewsSection(Section):
    """What a training crop goes through; shifts are those of data.crop.jitter_mm."""

    flip: float = Field(0.5, ge=0, le=1, description="Probability of exchanging left and right.")
    rotation_degrees: tuple[Degrees, Degrees, Degrees] = Field(
        (10.0, 5.0, 5.0), description="Largest rotation about z, y, x."
    )
    scale: Range = Field((0.9, 1.1), description="Smallest and largest magnification.")
    gain: Range = Field((0.85, 1.15), description="Smallest and largest factor of intensities.")
    offset: NonNegativeFloat = Field(0.1, description="Largest number added to intensities.")
    gamma: Range = Field((0.8, 1.25), description="Smallest and largest exponent of intensities.")
    bias: NonNegativeFloat = Field(0.2, description="Largest logarithm of the coil's profile.")
    noise: NonNegativeFloat = Field(0.03, description="Largest standard deviation of noise.")
    blur: float = Field(0.7, ge=0, le=1, description="Largest sigma of blur in slices, voxels.")
    drop_channel: float = Field(
        0.25, ge=0, lt=1, description="Probability of taking away a channel other than T2."
    )

    @model_validator(mode="after")
    def _ranges_rise(self) -> ViewsSection:
        for name in ("scale", "gain", "gamma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low:g} is above {high:g}")
        return self


class DiceSection(Section):
    """The Dice term."""

    batch: bool = Field(True, description="Sums over the whole batch, on all devices.")
    absent: Literal["skip", "count"] = Field(
        "skip", description="Zones that a batch does not hold."
    )


class CoTrainingSection(Section):
    """Disagreement of the two paths about common zones, in the second stage."""

    weight: NonNegativeFloat = Field(0.5, description="Weight after the ramp.")
    ramp: float = Field(0.3, ge=0, le=1, description="Part of the stage over which it rises.")
    form: Literal["normalized", "mse", "js"] = Field("normalized", description="Disagreement.")
    views: Literal["intensity", "none"] = Field(
        "intensity", description="What the paths see differently."
    )
    unlabelled: bool = Field(True, description="Unlabelled studies take part.")
    per_step: PositiveInt = Field(1, description="How many of them are added to each batch.")


class TasksSection(Section):
    """Weights of the auxiliary tasks."""

    sdf: NonNegativeFloat = Field(0.2, description="Signed distances.")
    presence: NonNegativeFloat = Field(0.1, description="Zones that a slice holds.")
    reconstruct: NonNegativeFloat = Field(0.0, description="Masked blocks of the image.")


class AnatomySection(Section):
    """Contacts of zones that anatomy forbids."""

    weight: NonNegativeFloat = Field(0.05, description="Weight.")


class PartialSection(Section):
    """Studies whose labels leave several zones possible."""

    start: float = Field(0.5, ge=0, le=1, description="Part of stage 1 after which they join.")
    weight: NonNegativeFloat = Field(0.3, description="Weight beside four-zone studies.")
    per_step: PositiveInt = Field(1, description="How many are added to each batch.")


class ObjectiveSection(Section):
    """What is minimised."""

    kind: Literal["dice_ce", "meyer"] = Field(
        "dice_ce", description="meyer: Dice over all outputs, as in the code of Meyer et al. 2019."
    )
    fused: NonNegativeFloat = Field(0.5, description="Weight of the loss on the fused map.")
    class_weights: tuple[
        PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat
    ] = Field((1.0, 1.0, 1.0, 2.0, 2.0), description="Rest, PZ, TZ, DPU, AFS in the cross-entropy.")
    dice: DiceSection = Field(DiceSection(), description="Dice term.")
    co: CoTrainingSection = Field(CoTrainingSection(), description="Co-training.")
    tasks: TasksSection = Field(TasksSection(), description="Auxiliary tasks.")
    anatomy: AnatomySection = Field(AnatomySection(), description="Forbidden contacts.")
    partial: PartialSection = Field(PartialSection(), description="Partial labels.")


class PiradsOptimSection(OptimSection):
    """The optimizer."""

    name: Literal["adam", "adamw", "sgd"] = Field("adamw", description="Optimizer.")
    lr: PositiveFloat = Field(4e-3, description="Learning rate; of onecycle the peak.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay.")
    schedule: Literal["constant", "cosine", "onecycle", "plateau"] = Field(  # type: ignore[assignment]
        "onecycle", description="Learning rate over training."
    )


class PiradsTrainSection(TrainSection):
    """The training loop."""

    batch: PositiveInt = Field(2, description="Crops in a batch.")
    metric: Literal["dice"] | None = Field(
        "dice", description="Validation metric that chooses the best epoch."
    )
    ema: float | None = Field(
        0.999, gt=0, lt=1, description="Decay of the averaged weights; null: none."
    )
    stages: tuple[str, ...] = Field(
        ("stage-1", "stage-2"), description="Stages to train, in order."
    )


class PiradsSplitSection(SplitSection):
    """How patients are divided; a column split of the manifest wins."""

    kind: Literal["holdout", "kfold", "file"] = Field(
        "holdout",
        description="holdout: one division; kfold: each patient is tested once; file: split.file.",
    )
    fractions: tuple[PositiveFloat, NonNegativeFloat, PositiveFloat] = Field(
        (0.7, 0.1, 0.2),
        description="Parts of labelled patients for training, validation and test, sum 1; of "
        "kfold only validation counts.",
    )

    @model_validator(mode="after")
    def _parts_make_a_whole(self) -> PiradsSplitSection:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions {list(self.fractions)} sum to {sum(self.fractions):g}")
        if self.kind == "kfold" and self.folds < 2:
            raise ValueError("kfold needs two folds or more")
        if self.kind == "file" and self.file is None:
            raise ValueError("split.kind=file needs the CSV: set split.file")
        return self


class PiradsEvaluateSection(EvaluateSection):
    """How zones are scored."""

    baselines: tuple[Baseline, ...] | None = Field(
        None, description="Baselines printed beside the model; null: all; aniso, unet are trained."
    )
    surface: Literal["erosion6", "contour26", "uats_voxel"] = Field(
        "erosion6", description="Surface of a zone; the others are those of published code."
    )
    average: Literal["pooled", "two_sided"] = Field(
        "pooled", description="Mean over both surfaces together, or of two means."
    )
    empty: Literal["nan", "zero"] = Field(
        "nan", description="Distance to a zone that was missed; zero: as published code."
    )
    regions: Literal["gland", "image"] = Field(
        "gland", description="What base, mid and apex are thirds of."
    )


class PiradsPredictSection(PredictSection):
    """How a study is segmented."""

    postprocess: Literal["diptych", "meyer", "none"] = Field(
        "diptych", description="One piece a zone; meyer: as in their code."
    )
    resample: Literal["prob", "sdf_gauss"] = Field(
        "prob", description="Way back to the original grid; sdf_gauss: as Meyer et al. 2019."
    )
    sectors: Literal["2.1", "2"] = Field("2.1", description="PI-RADS version of the sector map.")
    least_piece_ml: NonNegativeFloat = Field(
        0.1, description="Smallest separate piece of the gland, in mL, that asks for a second look."
    )
    tta: Literal["flip", "none"] = Field("flip", description="Average over the mirrored image.")
    passes: PositiveInt = Field(2, description="Passes that centre the crop on the gland.")
    psa: NonNegativeFloat | None = Field(
        None,
        description="Serum PSA in ng/mL, where the input is one study.",
        json_schema_extra={"option": "--psa", "verbs": ["predict"]},
    )
    lesions: Path | None = Field(
        None,
        description="Mask of lesions, where the input is one study.",
        json_schema_extra={"option": "--lesions", "verbs": ["predict"]},
    )
    prob: bool = Field(False, description="Write class probabilities too.")
    dicom_seg: bool = Field(False, description="Write a DICOM segmentation too.")


class ExportSection(Section):
    """How a model leaves the run."""

    tolerance: PositiveFloat = Field(1e-4, description="Largest difference of probabilities.")


class PiradsConfig(PipelineConfig):
    """The whole configuration."""

    data: PiradsDataSection = Field(PiradsDataSection(), description="Series, labels, grid.")
    model: ModelSection = Field(ModelSection(), description="Network.")
    views: ViewsSection = Field(ViewsSection(), description="Augmentation.")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="Losses.")
    optim: PiradsOptimSection = Field(PiradsOptimSection(), description="Optimizer.")
    train: PiradsTrainSection = Field(PiradsTrainSection(), description="Training loop.")
    split: PiradsSplitSection = Field(PiradsSplitSection(), description="Division of patients.")
    evaluate: PiradsEvaluateSection = Field(PiradsEvaluateSection(), description="Scores.")
    predict: PiradsPredictSection = Field(PiradsPredictSection(), description="Prediction.")
    export: ExportSection = Field(ExportSection(), description="Export.")
    stages: dict[str, dict[str, Any]] = Field(
        default={"stage-2": {"train.epochs": 20}},
        description="Values of single stages, by dotted key.",
    )
