"""The configuration of ``mclrec``: every value, its unit and its default.

Facts of a prepared folder, on which the other rooms rely (JSON, free of names of people):

    kind         "interactions" or "clinical"
    format       how the source was read: "csv", "omop", ...
    codes        distinct source codes
    events       events kept
    duplicates   events left out because the same one came before
    tie_share    share of dated events whose time another event of the subject has
    repeat_share share of events after a subject's first step whose item came before
    baskets      whether events are joined into baskets, each a step
    generated    seed of the embedded sample, where the data are it
    times        "absolute", "relative" (microseconds since the subject's first event) or "none"

``index.parquet`` has one row a subject beside ``item`` and ``unit``: subject (pseudonym), events,
source, and split where the source or ``split.file`` has one. ``events.parquet`` has the events in
the order of subjects and time: subject (row of the index), code (row of ``codes.parquet``), time
(microseconds or null), basket (number within the subject, or null). ``codes.parquet``: code (as
in the source, in the order of first appearance) and description.
"""

from __future__ import annotations

import codecs
from datetime import date, datetime
from typing import Annotated, Literal, get_args

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
    EvaluateSection,
    OptimSection,
    PipelineConfig,
    PredictSection,
    Section,
    SplitSection,
    TrainSection,
)

Format = Literal[
    "auto", "csv", "parquet", "recbole", "sequences", "pairs", "omop", "meds", "synthea"
]
Baseline = Literal["popularity", "recency", "frequency", "markov1", "itemknn", "blend", "sasrec"]
SplitKind = Literal["auto", "leave_one_out", "subject", "global_time"]
OmopTable = Literal[
    "drug_exposure", "condition_occurrence", "procedure_occurrence", "measurement", "observation"
]
TimeUnit = Literal["auto", "s", "ms", "us", "ns"]
Ratio = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
COUNTING_BASELINES = tuple(name for name in BASELINES if name != "sasrec")  # need no training
FULL_UP_TO = 50_000  # items whose softmax objective.loss=auto computes whole


def _known_encoding(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except LookupError:
        raise ValueError(f"'{name}' is no encoding: utf-8, latin-1 and cp1252 are usual") from None


def _as_text(value: object) -> object:
    """A date in a YAML file needs no quotes."""
    return value.isoformat() if isinstance(value, date) else value


def _moment(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"'{text}' is no ISO 8601 time, such as 2024-05-31") from None
    return text


Moment = Annotated[str, BeforeValidator(_as_text), AfterValidator(_moment)]


class ColumnsSection(Section):
    """Which column plays which role; null: found by name."""

    subject: str | None = Field(None, description="User or patient.", json_schema_extra=AT_PREDICT)
    item: str | None = Field(None, description="Item or code.", json_schema_extra=AT_PREDICT)
    time: str | None = Field(None, description="Time of the event.", json_schema_extra=AT_PREDICT)
    basket: str | None = Field(None, description="Visit or order.", json_schema_extra=AT_PREDICT)


class OmopSection(Section):
    """OMOP CDM 5.3 and 5.4."""

    tables: tuple[OmopTable, ...] = Field(
        ("drug_exposure", "condition_occurrence", "procedure_occurrence"),
        min_length=1,
        description="Event tables to read where they exist.",
    )
    unmapped: Literal["drop", "source_value"] = Field(
        "drop", description="Events of concept 0: leave out, or keep under their source value."
    )


class MedsSection(Section):
    """MEDS 0.3 and 0.4."""

    codes: tuple[str, ...] = Field(
        ("*",), min_length=1, description='Glob patterns of codes that are items: ["RxNorm/*"].'
    )
    use_splits: bool = Field(True, description="Use the splits that the data come with.")


class EventDataSection(DataSection):
    """Which events are read, and how they are ordered."""

    format: Format = Field("auto", description="Form of the data.", json_schema_extra=AT_PREDICT)
    kind: Literal["auto", "interactions", "clinical"] = Field(
        "auto", description="auto: omop, meds and synthea are clinical, all else interactions."
    )
    columns: ColumnsSection = ColumnsSection()
    time_format: str | None = Field(
        None,
        description="strftime form of times; null: ISO 8601 or numbers.",
        json_schema_extra=AT_PREDICT,
    )
    time_unit: TimeUnit = Field(
        "auto",
        description="Unit of numeric times since 1970; auto: by size.",
        json_schema_extra=AT_PREDICT,
    )
    encoding: Annotated[str, AfterValidator(_known_encoding)] = Field(
        "utf-8", description="Encoding of text files.", json_schema_extra=AT_PREDICT
    )
    now: Moment | None = Field(
        None, description="Later events are warned of; null: the file's own date + 1 day."
    )
    ties: Literal["auto", "source", "random", "basket"] = Field(
        "auto",
        description="Order of equal times: as in the source, keyed random, or joined to a basket; "
        "auto: source, for clinical data basket.",
    )
    basket: Literal["auto", "set", "flat"] = Field(
        "auto",
        description="set: one step a basket; flat: one an event; auto: flat, for clinical set.",
    )
    drop_duplicates: bool = Field(
        True, description="Leave out repeats of the same subject, item and time."
    )
    min_subject_events: PositiveInt | Literal["auto"] = Field(
        "auto", description="Events a subject needs; auto: 5, for clinical data 3."
    )
    min_item_events: PositiveInt | Literal["auto"] = Field(
        "auto", description="Events an item needs; auto: 5."
    )
    omop: OmopSection = OmopSection()
    meds: MedsSection = MedsSection()


class EventSplitSection(SplitSection):
    """Who, or what, is tested."""

    kind: SplitKind = Field("auto", description="auto: leave_one_out, for clinical data subject.")
    fractions: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        (0.7, 0.1, 0.2), description="Training, validation and test part of subjects or of time."
    )
    cuts: tuple[Moment, Moment] | None = Field(
        None, description="global_time: where validation and test begin; null: by fractions."
    )

    @model_validator(mode="after")
    def _whole(self) -> EventSplitSection:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: {list(self.fractions)} do not add up to 1")
        return self


class EncoderSection(Section):
    """The transformer over one sequence, and the two augmenters."""

    dim: PositiveInt = Field(64, description="Size of item and sequence vectors.")
    layers: PositiveInt = Field(2, description="Transformer blocks.")
    heads: PositiveInt = Field(2, description="Attention heads; divides dim.")
    inner: PositiveInt = Field(256, description="Hidden size of the feed-forward part.")
    max_len: PositiveInt = Field(50, description="Steps of the window, the most recent ones.")
    dropout: Dropout = Field(0.5, description="Dropout of vectors.")
    attn_dropout: Dropout = Field(0.5, description="Dropout of attention weights.")
    norm: Literal["post", "pre"] = Field("post", description="Where layers are normalised.")
    tied: bool = Field(True, description="Whether scores use the item embedding.")
    mask_row: bool = Field(False, description="One more, unused row in the table, as published.")
    items: PositiveInt | None = Field(
        None, description="Rows of the item table; null: those of the fit's catalogue."
    )
    augmenter_hidden: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="Hidden sizes of the augmenters; null: dim/2 and dim/4."
    )

    @model_validator(mode="after")
    def _divides(self) -> EncoderSection:
        if self.dim % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide dim {self.dim}")
        return self


class SequenceViewsSection(Section):
    """The two random views of a prefix."""

    crop: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="Share that is cut away.")
    mask: Ratio = Field(0.5, description="Share of steps that is hidden.")
    reorder: Ratio = Field(0.8, description="Share of consecutive steps that is shuffled.")


class MCLRecObjectiveSection(Section):
    """What is minimised (Qin et al., SIGIR 2023)."""

    kind: Literal["mclrec", "sasrec"] = Field("mclrec", description="sasrec: L_rec alone.")
    schedule: Literal["two_stage", "official", "joint", "bilevel"] = Field(
        "two_stage", description="Steps of a batch; two_stage is the paper's Algorithm 1."
    )
    unit: Literal["prefix", "sequence"] = Field(
        "prefix", description="An instance is a prefix, or a subject with all its steps."
    )
    loss: Literal["auto", "full", "sampled", "gbce"] = Field(
        "auto", description="auto: full cross-entropy up to 50,000 items, else sampled."
    )
    negatives: PositiveInt = Field(256, description="Negatives of sampled and gbce.")
    sampler: Literal["uniform", "in_batch"] = Field("uniform", description="Source of negatives.")
    logq: bool = Field(True, description="Correct sampled logits by their sampling rate.")
    gbce_t: Ratio = Field(0.75, description="Calibration t of gBCE.")
    lambda_: NonNegativeFloat = Field(0.0, description="Weight of L_cl1, the random views.")
    beta: NonNegativeFloat = Field(0.05, description="Weight of L_cl2, the learnt views.")
    tau: PositiveFloat = Field(1.0, description="Temperature of L_cl1.")
    sim: Literal["dot", "cos"] = Field("dot", description="Similarity of L_cl1.")
    regulariser: Literal["paper", "official"] = Field("paper", description="Form of R.")
    gamma: NonNegativeFloat = Field(0.1, description="Weight of R in the encoder step, x beta.")
    augmenter_gamma: NonNegativeFloat | None = Field(
        None, description="Weight of R in the augmenter step; null: gamma x beta; official: 0.1."
    )
    mask_same_subject: bool = Field(
        True, description="Prefixes of one subject are no negatives of each other."
    )
    contrast_every: PositiveInt = Field(
        1, description="Batches from one with contrast to the next; 1: every batch."
    )
    pad_in_softmax: bool = Field(False, description="Count padding as a class, as published.")


class MCLRecOptimSection(OptimSection):
    """The two optimizers."""

    augmenter_lr: PositiveFloat = Field(1e-3, description="Learning rate of the augmenters.")


class MCLRecTrainSection(TrainSection):
    """The training loop."""

    epochs: NonNegativeInt = Field(100, description="Epochs of training.")
    batch: PositiveInt = Field(256, description="Instances in a global batch.")
    patience: PositiveInt | None = Field(
        10, description="Epochs without a better metric before training stops."
    )
    metric: str | None = Field(
        "ndcg@10", description="Validation metric that chooses the best epoch."
    )
    length_groups: PositiveInt = Field(
        8, description="Groups of like length that a batch is encoded in; changes no result."
    )
    bucket: bool = Field(
        False, description="Instances of like length share a batch; changes the negatives."
    )


class RankingSection(EvaluateSection):
    """How rankings are scored."""

    k: tuple[PositiveInt, ...] = Field(
        (5, 10, 20, 50), min_length=1, description="Lengths of the lists."
    )
    seen: Literal["auto", "keep", "mask"] = Field(
        "auto", description="Items of the history: candidates, or left out; auto: by repeats."
    )
    ties: Literal["pessimistic", "average", "optimistic"] = Field(
        "pessimistic", description="Rank of a target among equal scores."
    )
    steps: Literal["last", "all"] = Field("last", description="Steps of a test subject.")
    min_history: PositiveInt = Field(1, description="Steps that a prediction needs before it.")
    tile: PositiveInt = Field(8192, description="Items scored at a time.")
    sampled_negatives: NonNegativeInt = Field(
        0, description="Rank among so many random items (misleading; said in red); 0: all."
    )
    min_count: PositiveInt = Field(
        5, description="Subjects an item needs to be named in clinical reports."
    )
    baselines: tuple[Baseline, ...] | None = Field(
        BASELINES, description="Baselines printed beside the model; null: all."
    )


class RecommendSection(PredictSection):
    """What ``predict`` writes."""

    k: PositiveInt = Field(10, description="Items of a list.")
    seen: Literal["auto", "keep", "mask"] = Field("auto", description="As evaluate.seen.")


class ExportSection(Section):
    """What an exported graph gives."""

    what: Literal["topk", "scores", "vector"] = Field(
        "topk", description="Ids and scores of the best, all scores, or the sequence vector."
    )
    k: PositiveInt = Field(10, description="Items of a list.")


class MCLRecConfig(PipelineConfig):
    """Everything that decides a run."""

    data: EventDataSection = EventDataSection()
    model: EncoderSection = EncoderSection()
    views: SequenceViewsSection = SequenceViewsSection()
    objective: MCLRecObjectiveSection = MCLRecObjectiveSection()
    optim: MCLRecOptimSection = MCLRecOptimSection()
    train: MCLRecTrainSection = MCLRecTrainSection()
    split: EventSplitSection = EventSplitSection()
    evaluate: RankingSection = RankingSection()
    predict: RecommendSection = RecommendSection()
    export: ExportSection = ExportSection()

    def split_kind(self, kind: str) -> Literal["leave_one_out", "subject", "global_time"]:
        """The protocol that holds for data of a kind."""
        if self.split.kind != "auto":
            return self.split.kind
        return "subject" if kind == "clinical" else "leave_one_out"

    def least_events(self, kind: str) -> tuple[int, int]:
        """Events that a subject and an item of data of a kind need."""
        subject, item = self.data.min_subject_events, self.data.min_item_events
        default = 3 if kind == "clinical" else 5
        return default if subject == "auto" else subject, 5 if item == "auto" else item

    def joins_baskets(self, kind: str) -> bool:
        """Whether events of data of a kind are joined into baskets, each a step."""
        if self.data.basket != "auto":
            return self.data.basket == "set"
        return kind == "clinical" or self.data.ties == "basket"
