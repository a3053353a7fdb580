"""Times of any source to microseconds in UTC, with the rows that are no time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import polars as pl

NAIVE = (
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d %H:%M",
)
ZONED = (
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M%#z",
)
HEAD = 1000
NUMBER = r"^\s*-?\d+(\.\d*)?([eE][+-]?\d+)?\s*$"
# Microseconds in a unit, and the largest size that numbers in it have in our centuries.
UNITS = {"s": (1e6, 1e11), "ms": (1e3, 1e14), "us": (1.0, 1e17), "ns": (1e-3, float("inf"))}
Unit = Literal["auto", "s", "ms", "us", "ns"]


@dataclass(frozen=True)
class Parsed:
    """A parsed column.

    Args:
        times: Datetime[us], UTC without zone; null where the cell is empty or no time.
        is_bad: Cells that hold something that is no time.
        unit: Unit that numbers were taken to have by their size; "" where it was not guessed.
        mixed: Whether some cells have a zone and others have none.
    """

    times: pl.Series
    is_bad: pl.Series
    unit: str = ""
    mixed: bool = False


def parse_times(raw: pl.Series, *, form: str | None = None, unit: Unit = "auto") -> Parsed:
    """Parse a column of times.

    Args:
        raw: Text (ISO 8601, or numbers), numbers since 1970, dates or datetimes.
        form: strftime form of text; None for ISO 8601 or numbers.
        unit: Unit of numbers; "auto" goes by their size.

    Returns:
        The times, and which cells are none.

    Example:
        >>> parse_times(pl.Series(["2020-01-01", "2020-13-01"])).is_bad.to_list()
        [False, True]
    """
    if raw.dtype == pl.Null:
        return Parsed(raw.cast(pl.Datetime("us")), pl.repeat(False, len(raw), eager=True))
    if raw.dtype == pl.Date or isinstance(raw.dtype, pl.Datetime):
        return Parsed(_naive(raw), pl.repeat(False, len(raw), eager=True))
    if raw.dtype.is_numeric():
        return _numbers(raw, raw, unit)
    if raw.dtype != pl.String:
        return Parsed(
            pl.repeat(None, len(raw), dtype=pl.Datetime("us"), eager=True), raw.is_not_null()
        )
    head = raw.drop_nulls().head(HEAD)
    if form is None and int(head.str.contains(NUMBER).sum()) > len(head) / 2:
        return _numbers(raw, raw.str.strip_chars().cast(pl.Float64, strict=False), unit)
    return _texts(raw, head, (form,) if form is not None else (*NAIVE, *ZONED))


def looks_like_time(sample: pl.Series) -> bool:
    """Whether a column holds dates or ISO 8601 texts."""
    if sample.dtype.is_temporal():
        return True
    if sample.dtype != pl.String or not sample.drop_nulls().len():
        return False
    parsed = _texts(sample, sample.drop_nulls(), (*NAIVE, *ZONED))
    return int(parsed.is_bad.sum()) < 0.1 * len(sample)


def to_microseconds(moment: str) -> int:
    """Microseconds since 1970 of an ISO 8601 time; without a zone it is UTC."""
    when = datetime.fromisoformat(moment)
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return round((when - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6)


def _naive(times: pl.Series) -> pl.Series:
    if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone is not None:
        times = times.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return times.cast(pl.Datetime("us"))


def _numbers(raw: pl.Series, numbers: pl.Series, unit: Unit) -> Parsed:
    finite = pl.when(pl.col("value").is_finite()).then("value")
    values = pl.DataFrame({"value": numbers.cast(pl.Float64)}).select(finite).to_series()
    guess = ""
    if unit == "auto":
        typical = values.abs().median()
        size = typical if isinstance(typical, float) else 0.0
        guess = next((name for name, (_, most) in UNITS.items() if size < most), "ns")
    factor = UNITS[guess or unit][0]
    if numbers.dtype.is_integer() and factor >= 1:
        micro = numbers.cast(pl.Int64, strict=False) * int(factor)
    else:
        micro = (values * factor).round().cast(pl.Int64, strict=False)
    times = micro.cast(pl.Datetime("us"))
    return Parsed(times, raw.is_not_null() & times.is_null(), guess)


def _texts(raw: pl.Series, head: pl.Series, forms: tuple[str, ...]) -> Parsed:
    """Parse by the form that suits the first cells, and what is left by the others."""
    wins = {form: int(_parse(head, form).is_not_null().sum()) for form in forms}
    ranked = sorted(forms, key=lambda form: -wins[form])
    times = _parse(raw, ranked[0])
    zones = {_has_zone(ranked[0])} if times.null_count() < len(times) else set()
    failed = (times.is_null() & raw.is_not_null()).arg_true()
    for form in ranked[1:]:
        if not len(failed):
            break
        again = _parse(raw.gather(failed), form)
        found = again.is_not_null()
        if found.any():
            zones.add(_has_zone(form))
            times = times.scatter(failed.filter(found), again.filter(found))
            failed = failed.filter(~found)
    return Parsed(times, times.is_null() & raw.is_not_null(), mixed=len(zones) > 1)


def _has_zone(form: str) -> bool:
    return "%z" in form or "%#z" in form or "%:z" in form


def _parse(raw: pl.Series, form: str) -> pl.Series:
    return _naive(raw.str.to_datetime(form, strict=False, time_unit="us", exact=True))
