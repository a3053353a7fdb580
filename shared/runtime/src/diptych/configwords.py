"""A configuration in words: errors with what is allowed, and the commented file."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from io import StringIO
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from diptych.configfile import (
    STAGES,
    Keys,
    default_values,
    dotted,
    section_at,
    section_of,
    values_of,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

WIDTH = 96  # characters of a comment line
WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}
CLOSE_ENOUGH = 0.6  # likeness below which no name is suggested


def explain(
    model: type[BaseModel], values: Mapping[str, Any], error: ValidationError
) -> Iterator[tuple[Keys, Keys, str]]:
    """Translate a validation error into plain sentences.

    Args:
        model: The configuration's model.
        values: The values that were refused.
        error: What pydantic says.

    Returns:
        Keys of each refused value, the same with the keys inside it, and what was given and what
        is allowed.
    """
    for detail in error.errors(include_url=False):
        keys = _known_keys(model, detail["loc"])
        place = tuple(str(part) for part in detail["loc"])
        yield keys, place, _sentence(model, values, keys, detail)


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> Keys:
    """The part of a pydantic location that names a key of the configuration."""
    keys: Keys = ()
    section: type[BaseModel] | None = model
    for part in location:
        if section is None or not isinstance(part, str):
            break
        keys = (*keys, part)
        found = section.model_fields.get(part)
        section = section_of(found.annotation) if found else None
    return keys


def _sentence(
    model: type[BaseModel], values: Mapping[str, Any], keys: Keys, detail: ErrorDetails
) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown key; {nearest(dotted(keys), names(model))}"
    allowed = describe(schema_at(model, keys))
    if detail["type"] == "missing":
        return f"is missing; allowed: {allowed}"
    reason = detail.get("ctx", {}).get("error")
    given = values
    for key in keys:
        given = given.get(key, {}) if isinstance(given, Mapping) else {}
    if isinstance(reason, ValueError | AssertionError):
        if section_at(model, keys) is not None:
            return str(reason)
        return f"given {show(given)}, {reason}"
    return f"given {show(given)}, allowed: {allowed}"


def show(value: Any) -> str:
    """A value as it may stand in a message: short, with YAML's words for null and truth."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def names(model: type[BaseModel], before: Keys = ()) -> list[str]:
    """Every valid dotted name: sections and values."""
    found = []
    for name, info in model.model_fields.items():
        found.append(dotted((*before, name)))
        inner = section_of(info.annotation)
        if inner is not None:
            found += names(inner, (*before, name))
    return found


def nearest(given: str, valid: list[str]) -> str:
    """The valid name that is most like the given one, or all names of its section.

    Example:
        >>> nearest("train.epoch", ["train.epochs", "train.batch"])
        'nearest valid name: train.epochs'
    """
    section, _, key = given.rpartition(".")

    def likeness(name: str) -> float:
        other, _, last = name.rpartition(".")
        alike = SequenceMatcher(None, key, last).ratio()
        return alike if other == section else 0.95 * alike  # the right key, the wrong section

    best = max(valid, key=likeness, default="")
    if best and likeness(best) >= CLOSE_ENOUGH:
        return f"nearest valid name: {best}"
    beside = [name for name in valid if name.rpartition(".")[0] == section]
    return f"valid names: {', '.join(beside or valid)}"


def schema_at(model: type[BaseModel], keys: Keys) -> dict[str, Any]:
    """The JSON schema of the value that keys name; empty where the schema has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # defaults that JSON cannot hold are not needed here
        whole = model.model_json_schema()
    found: dict[str, Any] = _resolved(whole, whole.get("$defs", {}))
    for key in keys:
        options = [found, *found.get("anyOf", ())]
        inner = [option["properties"] for option in options if "properties" in option]
        found = inner[0].get(key, {}) if inner else {}
    return found


def _resolved(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_resolved(part, definitions) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        return _resolved(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _resolved(part, definitions) for key, part in schema.items() if key != "$defs"}


def describe(schema: Mapping[str, Any]) -> str:
    """What a resolved JSON schema allows, in words.

    Example:
        >>> describe({"type": "integer", "minimum": 0})
        'a whole number >= 0'
    """
    if "anyOf" in schema:
        options = dict.fromkeys(describe(option) for option in schema["anyOf"])
        words = " or ".join(option for option in options if option != "null")
        return f"{words}, or null" if "null" in options else words
    if "enum" in schema or "const" in schema:
        choices = [show(value).strip("'") for value in schema.get("enum", [schema.get("const")])]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    kind = schema.get("type", "")
    word = WORDS.get(kind, "any value")
    if kind in ("integer", "number"):
        limits = [f"{sign} {schema[key]:g}" for key, sign in LIMITS.items() if key in schema]
        return f"{word} {' and '.join(limits)}".strip()
    if kind in ("array", "object"):
        return (_describe_list if kind == "array" else _describe_mapping)(schema)
    word = "a path" if "path" in schema.get("format", "") else word
    return f"{word} like {schema['pattern']}" if "pattern" in schema else word


def _describe_mapping(schema: Mapping[str, Any]) -> str:
    if "properties" in schema:
        return f"a section with the keys {', '.join(schema['properties'])}"
    inner = schema.get("additionalProperties")
    words = f"a mapping to {describe(inner)}" if isinstance(inner, Mapping) else "a mapping"
    keys = schema.get("propertyNames", {})
    return f"{words} (keys: {describe(keys)})" if "enum" in keys else words


def _describe_list(schema: Mapping[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"a list of: {', '.join(describe(item) for item in schema['prefixItems'])}"
    words = "a list"
    least, most = schema.get("minItems"), schema.get("maxItems")
    if least is not None and least == most:
        words += f" of {least}"
    elif least or most:
        limits = [f"at least {least}"] * bool(least) + [f"at most {most}"] * bool(most)
        words += f" ({' and '.join(limits)})"
    items = schema.get("items")
    return f"{words}, each {describe(items)}" if items else words


_PLAIN = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)  # needs no quotes, but for words of YAML


def commented(config: BaseModel, header: str = "") -> str:
    """A configuration as YAML with a comment for each value: meaning, allowed, default.

    Args:
        config: The configuration; every field is written.
        header: Words for the first lines.

    Returns:
        YAML text that gives the same configuration when it is read.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Writes null as a word: an empty place looks like a mistake."""

    Representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    Representer.add_representer(
        str,
        lambda writer, text: writer.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if _PLAIN.fullmatch(text) else '"'
        ),
    )
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = Representer
    yaml.width = 10**6  # a long value stays on its line
    model = type(config)
    stream = StringIO()
    yaml.dump(
        _section(model, schema_at(model, ()), values_of(config), default_values(model), 0), stream
    )
    return "".join(f"# {line}\n" for line in header.splitlines()) + stream.getvalue()


def _section(
    model: type[BaseModel],
    schema: Mapping[str, Any],
    values: Mapping[str, Any],
    standard: Mapping[str, Any],
    indent: int,
) -> Any:
    from ruamel.yaml.comments import CommentedMap

    written = CommentedMap()
    for name, info in model.model_fields.items():
        inner, value, default = section_of(info.annotation), values[name], standard.get(name)
        if inner is not None and isinstance(value, Mapping):
            below = default if isinstance(default, Mapping) else {}
            part = schema["properties"][name]
            written[name] = _section(inner, part, value, below, indent + 2)
            comment = (info.description or inner.__doc__ or name).strip().splitlines()[0]
        else:
            written[name] = _flow(value, block=(name, indent) == (STAGES, 0))
            comment = _comment(info, schema["properties"][name], default, indent)
        blank = "" if indent else "\n"
        written.yaml_set_comment_before_after_key(name, before=blank + comment, indent=indent)
    return written


def _comment(info: FieldInfo, schema: Mapping[str, Any], default: Any, indent: int) -> str:
    parts = [(info.description or "").strip()]
    allowed = describe(schema)
    parts.append(f"{allowed[0].upper()}{allowed[1:]}; default {_inline(default)}.")
    return "\n".join(textwrap.wrap(" ".join(part for part in parts if part), WIDTH - indent))


def _flow(value: Any, block: bool = False) -> Any:
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)  # the one style that escapes every line break
    if isinstance(value, Mapping):
        mapping = CommentedMap((_flow(key), _flow(inner)) for key, inner in value.items())
        if not (block and value):
            mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list):
        sequence = CommentedSeq(_flow(inner) for inner in value)
        sequence.fa.set_flow_style()
        return sequence
    return value


def _inline(value: Any) -> str:
    """A default on one line, as YAML would read it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_inline(inner) for inner in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_inline(inner)}' for key, inner in value.items())}}}"
    return str(value) if isinstance(value, str) and value else show(value)
