"""OMOP, MEDS and Synthea folders to events, with what is wrong about their tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import polars as pl

from diptych.findings import Finding, Severity
from diptych_mclrec.config import EventDataSection
from diptych_mclrec.read_tables import Raw, broken_parquet, separator_of, to_events
from diptych_mclrec.read_text import empty, row_words, unreadable

TABLE_ENDS = (".parquet", ".csv", ".csv.gz")
NO_ITEMS = ("MEDS_BIRTH", "MEDS_DEATH")
MEDS_PARTS = {"train": "train", "tuning": "validation", "held_out": "test"}
SYNTHEA_TABLES = {"medications": "RxNorm", "conditions": "SNOMED", "procedures": "SNOMED"}
# Where the time of a table stands: the stem of its _datetime and _date columns.
OMOP_TIMES = {
    "drug_exposure": "drug_exposure_start",
    "condition_occurrence": "condition_start",
    "procedure_occurrence": "procedure",
    "measurement": "measurement",
    "observation": "observation",
}
MOSTLY_UNMAPPED = 0.5


@dataclass(frozen=True)
class Clinical:
    """What a clinical folder gives.

    Args:
        findings: About its tables.
        parts: Events of each file, with the file.
        descriptions: Item -> name in words.
        splits: Subject -> part, where the folder has splits.
        others: Files that hold no events.
    """

    findings: list[Finding]
    parts: list[tuple[Path, Raw]] = field(default_factory=list)
    descriptions: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[Path] = ()


def table_of(folder: Path, name: str) -> Path | None:
    """A table of a folder by name, in any case and any of the known forms."""
    wanted = {f"{name}{end}" for end in TABLE_ENDS}
    found = sorted(path for path in folder.iterdir() if path.name.lower() in wanted)
    return found[0] if found else None


def _open(path: Path) -> tuple[pl.DataFrame | None, list[Finding]]:
    """A whole table with lower-case column names; text where it is CSV."""
    try:
        if path.suffix == ".parquet":
            return _lower(pl.read_parquet(path)), []
        if not path.stat().st_size:
            return None, [empty(path)]
        separator = separator_of(path)
        scan = pl.scan_csv(path, infer_schema_length=0, separator=separator)
        return _lower(scan.collect(engine="streaming")), []
    except (pl.exceptions.PolarsError, OSError) as error:
        if path.suffix == ".parquet":
            return None, [broken_parquet(path, error)]
        return None, unreadable(path, path, ",", error)


def _lower(table: pl.DataFrame) -> pl.DataFrame:
    return table.rename({name: name.lower() for name in table.columns})


def _lacking(table: pl.DataFrame, wanted: Sequence[str], path: Path, code: str) -> list[Finding]:
    missing = [name for name in wanted if name not in table.columns]
    if not missing:
        return []
    found = f"no column {', '.join(missing)} among {', '.join(table.columns)}"
    return [Finding("error", code, path.name, found, f"add {', '.join(missing)} to the table")]


def read_omop(folder: Path, data: EventDataSection) -> Clinical:
    """An OMOP CDM 5.3 or 5.4 folder; the item is ``<table>/<concept id>``."""
    person_path = table_of(folder, "person")
    tables = {name: path for name in data.omop.tables if (path := table_of(folder, name))}
    if person_path is None or not tables:
        lacking = "person" if person_path is None else " or ".join(data.omop.tables)
        found = f"no table {lacking} as .parquet or .csv"
        fix = "export person and at least one event table, or set data.omop.tables"
        return Clinical([Finding("error", "omop.missing_table", folder.name, found, fix)])
    person, findings = _open(person_path)
    if person is not None:
        findings += _lacking(person, ["person_id"], person_path, "omop.columns")
    if person is None or findings:
        return Clinical(findings)
    parts = [(path, _omop_events(name, path, data)) for name, path in tables.items()]
    findings = [finding for _, raw in parts for finding in raw.findings]
    for path, raw in parts:
        if raw.frame is not None:
            findings += _persons(raw.frame, person, path)
    others = [person_path]
    if (period := table_of(folder, "observation_period")) is not None:
        others.append(period)
        findings += _outside_observation(parts, period)
    descriptions: Mapping[str, str] = {}
    if (concept := table_of(folder, "concept")) is not None:
        others.append(concept)
        descriptions = _concept_names(parts, concept)
    return Clinical(findings, parts, descriptions, others=others)


def _omop_events(name: str, path: Path, data: EventDataSection) -> Raw:
    table, findings = _open(path)
    if table is None:
        return Raw(findings)
    prefix, stem = name.partition("_")[0], OMOP_TIMES[name]
    concept, source = f"{prefix}_concept_id", f"{prefix}_source_value"
    times = [one for one in (f"{stem}_datetime", f"{stem}_date") if one in table.columns]
    wanted = ["person_id", concept, *([] if times else [f"{stem}_date"])]
    if data.omop.unmapped == "source_value":
        wanted.append(source)
    if lacking := _lacking(table, wanted, path, "omop.columns"):
        return Raw(lacking, None, table.height)
    number = pl.col(concept).cast(pl.Int64, strict=False)
    mapped = number.is_not_null() & (number != 0)
    item = pl.format("{}/{}", pl.lit(prefix), number)
    if data.omop.unmapped == "source_value":
        own = pl.format("{}/src:{}", pl.lit(prefix), pl.col(source).cast(pl.String))
        item = pl.when(mapped).then(item).otherwise(own)
    visit = pl.lit(None, pl.Int64)
    if "visit_occurrence_id" in table.columns:
        visit = pl.col("visit_occurrence_id").cast(pl.Int64, strict=False)
    header = 0 if path.suffix == ".parquet" else 1
    frame = table.with_row_index("row", offset=1 + header).select(
        subject=pl.col("person_id").cast(pl.Int64, strict=False).cast(pl.String),
        item=item,
        time=pl.coalesce([_moment(table[one]) for one in times]),
        visit=visit,
        row=pl.col("row").cast(pl.Int64),
        mapped=mapped,
    )
    findings = _unmapped(frame, path, data)
    if data.omop.unmapped == "drop":
        frame = frame.filter("mapped")
    if not frame.height:
        return Raw([*findings, *([] if table.height else [empty(path)])], None, table.height)
    raw = to_events(frame.drop("visit", "mapped"), path, data, header)
    findings += raw.findings
    if raw.frame is None:
        return Raw(findings, None, table.height)
    # The day stands for a missing visit, as a negative number that no visit has.
    day = -(pl.col("time").dt.epoch("d").cast(pl.Int64) + 10**7)
    basket = pl.coalesce(pl.lit(frame["visit"].cast(pl.Int64)), day)
    return Raw(findings, raw.frame.with_columns(basket=basket), table.height)


def _moment(column: pl.Series) -> pl.Expr:
    """A date or datetime column as text, so that bad cells of both are found in one place."""
    text = pl.col(column.name)
    if column.dtype == pl.String:
        return pl.when(text.str.strip_chars() != "").then(text)
    return text.cast(pl.Datetime("us")).dt.strftime("%Y-%m-%dT%H:%M:%S%.6f")


def _unmapped(frame: pl.DataFrame, path: Path, data: EventDataSection) -> list[Finding]:
    count = int((~frame["mapped"]).sum())
    if not count:
        return []
    share = count / frame.height
    severity: Severity = "error" if share > MOSTLY_UNMAPPED else "warning"
    kept = data.omop.unmapped == "source_value"
    done = "kept under their source value" if kept else "left out"
    found = f"{count} of {frame.height} rows ({share:.0%}) have concept 0: {done}"
    if kept:
        severity = "warning"
    fix = "map the source codes, or set data.omop.unmapped to source_value"
    return [Finding(severity, "omop.unmapped", path.name, found, fix)]


def _persons(events: pl.DataFrame, person: pl.DataFrame, path: Path) -> list[Finding]:
    known = person.select(
        subject=pl.col("person_id").cast(pl.Int64, strict=False).cast(pl.String),
        born=pl.col("year_of_birth").cast(pl.Int32, strict=False)
        if "year_of_birth" in person.columns
        else pl.lit(None, pl.Int32),
    ).unique("subject", keep="first", maintain_order=True)
    findings = []
    orphans = events.join(known, on="subject", how="anti", maintain_order="left")
    if orphans.height:
        names = orphans["subject"].unique(maintain_order=True).to_list()
        found = f"{orphans.height} rows of persons that person does not hold: " + _some(names)
        where = row_words(orphans["row"].to_list(), path.name)
        fix = "add the persons, or remove their rows"
        findings.append(Finding("error", "omop.orphan", where, found, fix))
    early = events.join(known, on="subject").filter(pl.col("time").dt.year() < pl.col("born"))
    if early.height:
        found = f"{early.height} events lie before the person's year of birth"
        where = row_words(early["row"].sort().to_list(), path.name)
        fix = "check the dates and year_of_birth"
        findings.append(Finding("warning", "omop.before_birth", where, found, fix))
    return findings


def _outside_observation(parts: Sequence[tuple[Path, Raw]], path: Path) -> list[Finding]:
    table, findings = _open(path)
    start, end = "observation_period_start_date", "observation_period_end_date"
    if table is None or (
        findings := _lacking(table, ["person_id", start, end], path, "omop.columns")
    ):
        return findings
    bounds = (
        table.select(
            subject=pl.col("person_id").cast(pl.Int64, strict=False).cast(pl.String),
            start=_day(table[start]),
            end=_day(table[end]),
        )
        .group_by("subject")
        .agg(pl.col("start").min(), pl.col("end").max())
    )
    frames = [raw.frame.select("subject", "time") for _, raw in parts if raw.frame is not None]
    if not frames:
        return []
    events = pl.concat(frames).join(bounds, on="subject")
    day = pl.col("time").dt.date()
    outside = events.filter((day < pl.col("start")) | (day > pl.col("end"))).height
    if not outside:
        return []
    found = f"{outside} of {events.height} events lie outside the persons' observation periods"
    fix = "they are used; correct the periods, or remove the events"
    return [Finding("warning", "omop.observation_period", path.name, found, fix)]


def _day(column: pl.Series) -> pl.Expr:
    text = pl.col(column.name)
    return text.str.to_date(strict=False) if column.dtype == pl.String else text.cast(pl.Date)


def _concept_names(parts: Sequence[tuple[Path, Raw]], path: Path) -> dict[str, str]:
    """Names of the concepts that occur; a table that cannot be read only costs the names."""
    table, _ = _open(path)
    if table is None or not {"concept_id", "concept_name"} <= set(table.columns):
        return {}
    names = dict(table.select(pl.col("concept_id").cast(pl.String), "concept_name").rows())
    items = {
        item for _, raw in parts if raw.frame is not None for item in raw.frame["item"].unique()
    }
    found = {item: names.get(item.partition("/")[2]) for item in sorted(items)}
    return {item: name for item, name in found.items() if name}


def read_synthea(folder: Path, data: EventDataSection) -> Clinical:
    """A Synthea CSV folder; the item is ``RxNorm/<code>`` or ``SNOMED/<code>``."""
    patients_path = table_of(folder, "patients")
    tables = {name: path for name in SYNTHEA_TABLES if (path := table_of(folder, name))}
    if patients_path is None or not tables:
        found = "no patients, or none of " + ", ".join(SYNTHEA_TABLES)
        fix = "give the csv folder of a Synthea run"
        return Clinical([Finding("error", "synthea.missing_table", folder.name, found, fix)])
    patients, findings = _open(patients_path)
    if patients is not None:
        findings += _lacking(patients, ["id"], patients_path, "synthea.columns")
    if patients is None or findings:
        return Clinical(findings)
    opened: dict[str, pl.DataFrame] = {}
    for name, path in tables.items():
        table, said = _open(path)
        if table is not None:
            said += _lacking(table, ["start", "patient", "code"], path, "synthea.columns")
        findings += said
        if table is not None and not said:
            opened[name] = table
    encounters = _encounters(opened.values())
    parts = []
    descriptions: dict[str, str] = {}
    for name, table in opened.items():
        raw, words = _synthea_events(table, SYNTHEA_TABLES[name], tables[name], data, encounters)
        findings += raw.findings
        descriptions |= words
        if raw.frame is not None:
            findings += _strangers(raw.frame, patients, tables[name])
        parts.append((tables[name], raw))
    return Clinical(findings, parts, descriptions, others=[patients_path])


def _encounters(tables: Iterable[pl.DataFrame]) -> dict[str, int]:
    names = {
        name
        for table in tables
        if "encounter" in table.columns
        for name in table["encounter"].drop_nulls().unique()
    }
    return {name: number for number, name in enumerate(sorted(names))}


def _synthea_events(
    table: pl.DataFrame,
    vocabulary: str,
    path: Path,
    data: EventDataSection,
    encounters: Mapping[str, int],
) -> tuple[Raw, dict[str, str]]:
    code = pl.format("{}/{}", pl.lit(vocabulary), pl.col("code"))
    columns = {"subject": pl.col("patient"), "item": code, "time": pl.col("start")}
    if "encounter" in table.columns:
        number = pl.col("encounter").replace_strict(encounters, default=None, return_dtype=pl.Int64)
        columns["basket"] = number
    frame = table.with_row_index("row", offset=2).select(
        **columns, row=pl.col("row").cast(pl.Int64)
    )
    words: dict[str, str] = {}
    if "description" in table.columns:
        named = (
            table.select(item=code, words="description").drop_nulls().unique("item", keep="first")
        )
        words = dict(named.sort("item").rows())
    return to_events(frame, path, data, header=1), words


def _strangers(events: pl.DataFrame, patients: pl.DataFrame, path: Path) -> list[Finding]:
    orphans = events.filter(~pl.col("subject").is_in(patients["id"].implode()))
    if not orphans.height:
        return []
    found = f"{orphans.height} rows of patients that the patients table does not hold"
    where = row_words(orphans["row"].to_list(), path.name, 1)
    return [
        Finding("error", "synthea.orphan", where, found, "add the patients, or remove the rows")
    ]


def read_meds(source: Path, data: EventDataSection) -> Clinical:
    """A MEDS 0.3 or 0.4 folder, or one of its data files."""
    files = meds_files(source, data)
    if not files:
        found = "no .parquet below data/"
        fix = "give a MEDS folder with data/ and metadata/"
        return Clinical([Finding("error", "meds.missing_table", source.name, found, fix)])
    parts, findings = [], []
    seen: dict[str, Path] = {}
    for path in files:
        raw, subjects = _meds_events(path, data)
        again = [name for name in subjects if name in seen]
        if again:
            found = f"{len(again)} subjects are also in {seen[again[0]].name}: {_some(again)}"
            findings.append(_uncontiguous(path.name, found))
        seen.update(dict.fromkeys(subjects, path))
        findings += raw.findings
        parts.append((path, raw))
    metadata = source / "metadata"
    codes, splits = metadata / "codes.parquet", metadata / "subject_splits.parquet"
    others = [path for path in (codes, splits) if path.is_file()]
    descriptions: dict[str, str] = {}
    held: dict[str, str] = {}
    if codes.is_file():
        descriptions, said = _meds_codes(codes)
        findings += said
    if splits.is_file() and data.meds.use_splits:
        held, said = _meds_splits(splits)
        findings += said
    return Clinical(findings, parts, descriptions, held, others)


def meds_files(source: Path, data: EventDataSection) -> list[Path]:
    """The data files of a MEDS folder that are not excluded, or the one file itself."""
    if source.is_file():
        return [source]
    return [
        path
        for path in sorted((source / "data").glob("**/*.parquet"))
        if not any(fnmatchcase(path.relative_to(source).as_posix(), one) for one in data.exclude)
    ]


def _meds_events(path: Path, data: EventDataSection) -> tuple[Raw, list[str]]:
    try:
        scan = pl.scan_parquet(path, row_index_name="row", row_index_offset=1)
        names = scan.collect_schema().names()
        missing = [one for one in ("subject_id", "time", "code") if one not in names]
        if missing:
            found = f"no column {', '.join(missing)} among {', '.join(names)}"
            fix = "a MEDS file has subject_id, time and code"
            return Raw([Finding("error", "events.columns", path.name, found, fix)]), []
        chosen = scan.select(
            pl.col("row").cast(pl.Int64), subject="subject_id", time="time", item="code"
        )
        table = chosen.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        return Raw([broken_parquet(path, error)]), []
    findings = _meds_order(table, path)
    subjects = table["subject"].unique(maintain_order=True).cast(pl.String).to_list()
    codes = table["item"].unique().drop_nulls().to_list()
    wanted = [
        code
        for code in codes
        if not code.startswith(NO_ITEMS)
        and any(fnmatchcase(code, pattern) for pattern in data.meds.codes)
    ]
    events = table.filter(
        pl.col("time").is_not_null() & (pl.col("item").is_in(wanted) | pl.col("item").is_null())
    )
    if not events.height:
        return Raw([*findings, empty(path)], None, table.height), subjects
    raw = to_events(events, path, data)
    return Raw([*findings, *raw.findings], raw.frame, table.height), subjects


def _meds_order(table: pl.DataFrame, path: Path) -> list[Finding]:
    findings = []
    subject = pl.col("subject")
    starts = table.filter((subject != subject.shift()).fill_null(value=True))
    again = starts.filter(~subject.is_first_distinct())
    if again.height:
        names = again["subject"].unique(maintain_order=True).cast(pl.String).to_list()
        where = row_words(again["row"].to_list(), path.name)
        found = f"subjects that start a second time: {_some(names)}"
        findings.append(_uncontiguous(where, found))
    dated = table.filter(pl.col("time").is_not_null())
    same = subject == subject.shift()
    back = dated.filter(same & (pl.col("time") < pl.col("time").shift()))
    if back.height:
        where = row_words(back["row"].to_list(), path.name)
        found = f"time decreases within a subject in {back.height} rows"
        fix = "sort by subject_id, then time"
        findings.append(Finding("error", "meds.sorted", where, found, fix))
    return findings


def _uncontiguous(where: str, found: str) -> Finding:
    return Finding("error", "meds.contiguous", where, found, "sort by subject_id, then time")


def _meds_codes(path: Path) -> tuple[dict[str, str], list[Finding]]:
    table, findings = _open(path)
    if table is None:
        return {}, findings
    if lacking := _lacking(table, ["code", "description"], path, "events.columns"):
        return {}, lacking
    return dict(table.select("code", "description").drop_nulls().rows()), []


def _meds_splits(path: Path) -> tuple[dict[str, str], list[Finding]]:
    from diptych_mclrec.split_file import parts_of

    table, findings = _open(path)
    if table is None:
        return {}, findings
    if lacking := _lacking(table, ["subject_id", "split"], path, "events.columns"):
        return {}, lacking
    return parts_of(table.select(pl.col("subject_id").cast(pl.String), "split"), path)


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
