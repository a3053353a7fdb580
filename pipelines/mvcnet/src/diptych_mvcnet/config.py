"""The configuration of ``mvcnet``: every value, its unit and its default (the recipe ``fast``).

Facts of a prepared folder, on which the other rooms rely (JSON, free of names of people):

    ch_names      electrode names in the order of the channel axis
    sfreq         Hz, after resampling
    n_times       samples of an epoch, T
    classes       class names; the label ``y`` of the index is the position in this list
    class_mirror  class name -> class name after exchanging left and right
    window        [start, end) of an epoch in seconds after the cue
    filter        {"band": [low, high] or null, "phase": "zero" | "causal", "notch": Hz or null}
    unpaired      lateral electrodes without a partner; not empty means no reflected view
    bayes_accuracy  only for the generated sample: the best accuracy that anyone can reach

Columns of its index beside ``item``, ``unit`` and ``subject``: session, run (strings), trial,
label (class name), y (class number), onset_s, source, rejected, and optionally split, fold and
lesion_side. The array ``epochs`` is float32 (N, C, T) in microvolt, filtered and not aligned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from diptych.config import (
    AT_PREDICT,
    DataSection,
    OptimSection,
    PredictSection,
    RunSection,
    Section,
    SplitSection,
    TrainSection,
)

ClosedFormBaseline = Literal[
    "majority", "logvar_lda", "csp_lda", "fbcsp_lda", "tangent_lr", "mdm", "fgmdm"
]
NetworkBaseline = Literal["ifnet", "ifnet_views", "ifnet_two_band", "eegnet", "shallow"]
CLOSED_FORM_BASELINES: tuple[str, ...] = get_args(ClosedFormBaseline)
NETWORK_BASELINES: tuple[str, ...] = get_args(NetworkBaseline)
BRAINDECODE = "braindecode:"
WIDE_BAND_METHODS = ("fbcsp_lda", "ifnet_two_band")
WIDE_BAND_HZ = (4.0, 40.0)
WITHIN_SUBJECT = ("within_cv", "within_cv_plain", "co", "co_per_class", "cross_run")

Protocol = Literal[
    "within_cv",
    "within_cv_plain",
    "co",
    "co_per_class",
    "cross_run",
    "cross_session",
    "loso",
    "fixed",
]
AlignTest = Literal["auto", "train", "block", "online", "none"]
ViewName = Literal["flip", "freq_shift", "reflect", "scale", "noise", "surrogate"]


def _as_text(values: Any) -> Any:
    """Event codes are text: ``769`` in a YAML file means the annotation "769"."""
    if isinstance(values, (str, int)):
        values = [values]
    return [str(value) for value in values] if isinstance(values, (list, tuple)) else values


def _increasing(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError(f"[{pair[0]}, {pair[1]}]: give the lower value first")
    return pair


def _odd(samples: int | None) -> int | None:
    if samples is not None and samples % 2 == 0:
        raise ValueError(f"{samples} is even: take {samples + 1}, so that a kernel has a centre")
    return samples


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"{list(values)}: name each one once")
    return values


def _known_baselines(names: tuple[str, ...]) -> tuple[str, ...]:
    known = (*CLOSED_FORM_BASELINES, *NETWORK_BASELINES)
    for name in names:
        if name not in known and not (name.startswith(BRAINDECODE) and name[len(BRAINDECODE) :]):
            raise ValueError(
                f"'{name}' is no baseline: choose among {', '.join(known)} or {BRAINDECODE}<Class>"
            )
    return _distinct(names)


Codes = Annotated[tuple[str, ...], BeforeValidator(_as_text)]
Names = Annotated[tuple[str, ...], AfterValidator(_distinct)]
Interval = Annotated[tuple[float, float], AfterValidator(_increasing)]


class FilterSection(Section):
    """Filters on the continuous recording."""

    band: Interval | None = Field((8.0, 30.0), description="Pass band in Hz; null filters nothing.")
    phase: Literal["zero", "causal"] = Field(
        "zero", description="zero: linear-phase FIR; causal: Butterworth order 4, as in a stream."
    )
    notch: PositiveFloat | None = Field(None, description="Mains frequency to remove, in Hz.")


class RejectSection(Section):
    """Trials that are left out."""

    peak_uv: PositiveFloat | None = Field(
        None, description="Largest peak-to-peak amplitude of a channel in microvolt."
    )
    flat_uv: NonNegativeFloat | None = Field(
        0.1, description="A channel with a smaller standard deviation is flat, in microvolt."
    )


class EEGDataSection(DataSection):
    """Which recordings are read, and how trials are cut from them."""

    pattern: str | None = Field(
        None,
        description='File names, such as "S{subject:03d}R{run:02d}.edf"; null: by folders.',
        json_schema_extra=AT_PREDICT,
    )
    manifest: Path | None = Field(
        None,
        description="CSV with path, subject, session and run.",
        json_schema_extra=AT_PREDICT,
    )
    moabb: str | None = Field(
        None, description="Name of a MOABB data set; DATA is then the folder of its cache."
    )
    runs: Annotated[tuple[str, ...] | None, BeforeValidator(_as_text)] = Field(
        None, description="Runs to use; null: all.", json_schema_extra=AT_PREDICT
    )
    unit: Literal["auto", "V", "mV", "uV", "nV"] = Field(
        "auto",
        description="Unit of the stored samples; auto: as the file says.",
        json_schema_extra=AT_PREDICT,
    )
    channels: Names | None = Field(None, description="Channels to use; null: all electrodes.")
    rename: dict[str, str] = Field(
        default_factory=dict,
        description="Channel names in the files -> names to use.",
        json_schema_extra=AT_PREDICT,
    )
    interpolate: bool = Field(
        False,
        description="Fill in missing channels by splines, at most 20 % of them.",
        json_schema_extra=AT_PREDICT,
    )
    events: dict[str, Codes] = Field(
        default={
            "left_hand": ("left_hand", "T1", "769"),
            "right_hand": ("right_hand", "T2", "770"),
        },
        description="Class name -> annotations that mark its trials.",
    )
    classes: Names = Field(
        ("left_hand", "right_hand"), min_length=2, description="Classes in label order."
    )
    class_mirror: dict[str, str] = Field(
        default={"left_hand": "right_hand"},
        description="Classes that change places when left and right do; others stay.",
    )
    window: Interval = Field((0.5, 3.5), description="Start and end of a trial after its cue, s.")
    window_closed: bool = Field(False, description="Keep the sample at the end, as MOABB does.")
    filter: FilterSection = Field(FilterSection(), description="Filters.")
    resample_hz: PositiveFloat | None = Field(
        100.0, description="Sampling rate in Hz; null keeps the recording's."
    )
    reject: RejectSection = Field(RejectSection(), description="Trials that are left out.")
    cues: Codes = Field(
        (),
        description="Annotations that mark trials of unlabelled recordings (predict).",
        json_schema_extra=AT_PREDICT,
    )
    window_step_s: PositiveFloat | None = Field(
        None,
        description="Step of sliding windows over recordings without cues (predict), s; "
        "null: the length of a trial.",
        json_schema_extra=AT_PREDICT,
    )
    anonymise: bool = Field(False, description="Write copies without identifying header fields.")
    repair_crlf: bool = Field(
        False,
        description="Undo line-end conversion of a copied file.",
        json_schema_extra=AT_PREDICT,
    )
    allow_truncated: bool = Field(
        False,
        description="Use the whole records of a cut file.",
        json_schema_extra=AT_PREDICT,
    )
    allow_download: bool = Field(False, description="Let MOABB fetch what its cache lacks.")

    @model_validator(mode="after")
    def _every_class_has_events(self) -> EEGDataSection:
        missing = [name for name in self.classes if not self.events.get(name)]
        if missing:
            raise ValueError(
                f"classes {missing} have no annotations: add them to data.events or leave them out"
            )
        for name, mirrored in self.class_mirror.items():
            if self.class_mirror.get(mirrored, name) != name:
                raise ValueError(f"class_mirror sends {name} to {mirrored} but not back")
        return self


class AlignSection(Section):
    """Euclidean alignment (He and Wu 2020)."""

    train: bool = Field(True, description="Align training trials, per subject and session.")
    test: AlignTest = Field(
        "auto",
        description="Reference of test trials; auto: train within subjects, online otherwise.",
        json_schema_extra=AT_PREDICT,
    )
    shrinkage: float = Field(0.01, ge=0, le=1, description="Weight of the scaled identity.")
    online_prior: NonNegativeFloat = Field(
        5.0, description="Trials that the training reference counts for in online alignment."
    )
    online_include_current: bool = Field(
        True, description="A trial is part of its own online reference (no label is used)."
    )
    parity_double: bool = Field(
        False, description="Official order for within-subject tests: block, then online again."
    )


class FrequencyShiftSection(Section):
    """The view in frequency."""

    delta_hz: float = Field(0.1, description="Shift in Hz.")
    random: bool = Field(False, description="Draw the shift anew for every trial and epoch.")
    delta_max_hz: PositiveFloat = Field(1.0, description="Largest random shift in Hz.")
    parity_dt: PositiveFloat | None = Field(
        None, description="Sampling step of the official code (0.004 s at every rate)."
    )


class ReflectSection(Section):
    """The view in space."""

    pairs: tuple[tuple[str, str], ...] | None = Field(
        None, description="Electrodes that change places; null: by their names."
    )
    allow_partial: bool = Field(False, description="Lateral electrodes without a partner stay.")
    keep_with_lesion: bool = Field(
        False, description="Reflect trials of subjects with a known lesion side too."
    )
    parity_binary_swap: bool = Field(False, description="Exchange labels 0 and 1 for all.")


class ViewsSection(Section):
    """What each training trial is seen as, beside itself."""

    use: Annotated[tuple[ViewName, ...], AfterValidator(_distinct)] = Field(
        ("flip", "freq_shift", "reflect"), description="Views, in this order."
    )
    freq_shift: FrequencyShiftSection = Field(
        FrequencyShiftSection(), description="Shift of the spectrum."
    )
    reflect: ReflectSection = Field(ReflectSection(), description="Exchange of left and right.")
    scale_factor: float = Field(0.8, description="Factor of the view `scale`.")
    noise_std: NonNegativeFloat = Field(
        0.5, description="Half width of the uniform noise of `noise`, in standard deviations."
    )
    surrogate_phase: float = Field(
        0.5, ge=0, le=1, description="Phase noise of `surrogate`, as a part of a full turn."
    )


class CNNSection(Section):
    """The convolutional branch (IFNet)."""

    filters: PositiveInt = Field(64, description="Spatial filters of a band.")
    kernel_s: PositiveFloat = Field(0.252, description="Temporal kernel in seconds.")
    kernel: Annotated[PositiveInt | None, AfterValidator(_odd)] = Field(
        None, description="Temporal kernel in samples, odd; wins."
    )
    pool_s: PositiveFloat = Field(0.5, description="Average pooling in seconds.")
    pool: PositiveInt | None = Field(None, description="Average pooling in samples; wins.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Probability of dropping a feature.")
    bands: tuple[Interval, ...] | None = Field(
        None, min_length=1, description="Bands in Hz with spatial filters of their own."
    )


class TransformerSection(Section):
    """The attention branch, a regulariser during training."""

    tokens: Literal["channels", "time"] = Field("channels", description="What a token is.")
    embed_dim: PositiveInt | None = Field(
        128, description="Width of a token; null: the samples of an epoch (official)."
    )
    heads: PositiveInt = Field(2, description="Attention heads.")
    layers: PositiveInt = Field(1, description="Encoder layers.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Probability of dropping a feature.")


class ProjectorSection(Section):
    """From tokens to the features of the convolutional branch."""

    form: Literal["factorised", "parity"] = Field(
        "factorised", description="factorised: one map for all tokens first; parity: official."
    )
    rank: PositiveInt = Field(32, description="Features of a token in the factorised form.")


class ModelSection(Section):
    """The network."""

    cnn: CNNSection = Field(CNNSection(), description="Convolutional branch.")
    transformer: TransformerSection = Field(TransformerSection(), description="Attention branch.")
    projector: ProjectorSection = Field(ProjectorSection(), description="Projector.")
    head: Literal["cnn", "fused"] = Field(
        "cnn", description="Features that are classified: the CNN's, or those of both branches."
    )

    @model_validator(mode="after")
    def _tokens_divide_among_heads(self) -> ModelSection:
        branch = self.transformer
        if branch.embed_dim is None:
            if branch.tokens == "time":
                raise ValueError("transformer.tokens = time needs a number as embed_dim")
        elif branch.embed_dim % branch.heads:
            raise ValueError(
                f"transformer.embed_dim {branch.embed_dim} is no multiple of heads {branch.heads}"
            )
        return self


TAKES_IDS = ("nt_xent", "dcl", "dclw")  # losses that can leave rows of one trial out


class ObjectiveSection(Section):
    """What is minimised: CE + lambda_cvc * CVC + lambda_cmc * CMC."""

    contrast: Literal[
        "nt_xent", "dcl", "dclw", "hcl", "debiased", "mv_info_nce", "mv_dhel", "cacr"
    ] = Field("nt_xent", description="Loss of both contrasts, from diptych_contrast.")
    lambda_cvc: NonNegativeFloat = Field(0.1, description="Weight of the cross-view contrast.")
    lambda_cmc: NonNegativeFloat = Field(0.1, description="Weight of the cross-model contrast.")
    temperature: PositiveFloat = Field(0.2, description="Temperature of both contrasts.")
    cvc_pairs: Literal["label_consistent", "all"] = Field(
        "label_consistent", description="all: pair views whose label changed too (official)."
    )
    cvc_negatives: Literal["same_branch", "all"] = Field(
        "same_branch", description="all: the other branch's features are negatives too (official)."
    )
    cmc_negatives: Literal["exclude_same_trial", "all"] = Field(
        "exclude_same_trial", description="all: other views of a trial are negatives (official)."
    )
    negatives: Literal["all", "other_class", "supcon"] = Field(
        "all", description="Trials of the same class: negatives, left out, or positives."
    )

    @model_validator(mode="after")
    def _classes_agree_with_pairs(self) -> ObjectiveSection:
        if self.negatives != "all" and self.cvc_pairs == "all":
            raise ValueError(
                f"negatives: {self.negatives} looks at labels and cvc_pairs: all ignores them: "
                "set cvc_pairs=label_consistent"
            )
        return self

    @model_validator(mode="after")
    def _contrast_can_leave_out(self) -> ObjectiveSection:
        if self.contrast != "nt_xent" and self.negatives != "all":
            raise ValueError(
                f"contrast: {self.contrast} knows no classes: set negatives=all or contrast=nt_xent"
            )
        apart = self.lambda_cmc > 0 and self.cmc_negatives == "exclude_same_trial"
        if apart and self.contrast not in TAKES_IDS:
            raise ValueError(
                f"contrast: {self.contrast} cannot leave other views of a trial out of the "
                f"negatives: set cmc_negatives=all, or contrast to one of {', '.join(TAKES_IDS)}"
            )
        return self


class MVCNetTrainSection(TrainSection):
    """The training loop."""

    metric: Literal["accuracy", "nll"] | None = Field(
        "nll", description="Validation metric that chooses the best epoch."
    )
    drop_last: Literal["auto"] | bool = Field(
        "auto", description="Drop a smaller last batch; auto: in loso only."
    )
    inner_validation: bool = Field(
        False,
        description="The last 20 % of each class of the training part choose the number of "
        "epochs in a fit NAME/inner before NAME is trained on all of it.",
    )
    group_epochs: PositiveInt = Field(
        12,
        description="Where each participant is split alone: most epochs of the fit `final` over "
        "all of them, whose epochs are many times longer; as recipe loso.",
    )


class MVCNetSplitSection(SplitSection):
    """How trials are divided."""

    kind: Protocol = Field("within_cv", description="Protocol.")
    gap_trials: NonNegativeInt = Field(0, description="Training trials dropped at fold borders.")
    parity_class_sorted: bool = Field(
        False, description="Official order of test trials: class by class, not in time."
    )


class EvaluateSection(Section):
    """What the model is compared with."""

    baselines: Annotated[tuple[str, ...], AfterValidator(_known_baselines)] = Field(
        ("csp_lda", "tangent_lr", "ifnet"),
        description="Baselines: "
        + ", ".join((*CLOSED_FORM_BASELINES, *NETWORK_BASELINES))
        + f", {BRAINDECODE}<Class>.",
    )


class ExportSection(Section):
    """How a model leaves the run."""

    tolerance: PositiveFloat = Field(1e-4, description="Largest relative difference to PyTorch.")


class MVCNetConfig(Section):
    """The whole configuration."""

    data: EEGDataSection = Field(EEGDataSection(), description="Recordings and trials.")
    align: AlignSection = Field(AlignSection(), description="Euclidean alignment.")
    views: ViewsSection = Field(ViewsSection(), description="Views of a trial.")
    model: ModelSection = Field(ModelSection(), description="Network.")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="Losses.")
    optim: OptimSection = Field(OptimSection(), description="Optimizer.")
    train: MVCNetTrainSection = Field(MVCNetTrainSection(), description="Training loop.")
    split: MVCNetSplitSection = Field(MVCNetSplitSection(), description="Protocol.")
    evaluate: EvaluateSection = Field(EvaluateSection(), description="Comparison.")
    predict: PredictSection = Field(PredictSection(), description="Prediction.")
    export: ExportSection = Field(ExportSection(), description="Export.")
    run: RunSection = Field(
        RunSection(parallel_fits="auto"), description="Where and how the run computes."
    )
    stages: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Overrides of a stage's fits."
    )

    @model_validator(mode="after")
    def _bands_were_recorded(self) -> MVCNetConfig:
        band = self.data.filter.band
        if band is None:
            return self
        wanted = {
            f"evaluate.baselines: {name}": WIDE_BAND_HZ
            for name in self.evaluate.baselines
            if name in WIDE_BAND_METHODS
        }
        wanted |= {f"model.cnn.bands: {list(one)}": one for one in self.model.cnn.bands or ()}
        for what, (low, high) in wanted.items():
            if low < band[0] or high > band[1]:
                raise ValueError(
                    f"{what} needs {low:g}-{high:g} Hz, data.filter.band is {band[0]:g}-"
                    f"{band[1]:g} Hz: set data.filter.band=[{min(low, band[0]):g}, "
                    f"{max(high, band[1]):g}]"
                )
        return self


def align_test_mode(config: MVCNetConfig) -> Literal["train", "block", "online", "none"]:
    """The alignment of test trials that ``align.test`` means under ``split.kind``.

    Args:
        config: The configuration.

    Returns:
        "train" within subjects and "online" across them where ``align.test`` is "auto"; "none"
        where training trials are not aligned either.
    """
    if config.align.test != "auto":
        return config.align.test
    if not config.align.train:
        return "none"
    return "train" if config.split.kind in WITHIN_SUBJECT else "online"
