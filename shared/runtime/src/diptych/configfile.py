"""Settings from files and options, and errors that a person can act on.

Every value that somebody set is a :class:`Setting` that remembers where it stands, so that an
error names the file and line, or the option.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from diptych.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)
Keys = tuple[str, ...]

LARGEST_FILE = 1_000_000  # bytes; a configuration is a page, so more is a mistaken file
STAGES = "stages"


@dataclass(frozen=True)
class Setting:
    """One value that somebody set.

    Args:
        path: Keys from the root; below ``stages.<stage>`` the rest is one dotted key.
        value: The value, not yet validated.
        origin: Where it stands: "my.yaml, line 7", "--set train.epochs=3".
    """

    path: Keys
    value: Any
    origin: str


@dataclass
class Settings:
    """Settings in the order of their precedence, and what could not be read."""

    items: list[Setting] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_file(path: Path, model: type[BaseModel], settings: Settings, name: str = "") -> None:
    """Add the settings of a YAML file.

    Args:
        path: The file.
        model: The configuration's model: tells sections from mapping values.
        settings: Receives the settings, or the problem.
        name: How messages call the file; "" for its path as given.
    """
    name = name or str(path)
    try:
        raw = path.read_bytes()
        if len(raw) > LARGEST_FILE:
            raise ValueError(f"{len(raw)} bytes are no configuration; name a YAML file")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        settings.problems.append(f"{name}: cannot be read ({error.strerror}); check the path")
    except UnicodeDecodeError as error:
        settings.problems.append(f"{name}: byte {error.start} is not UTF-8; save it as UTF-8")
    except ValueError as error:
        settings.problems.append(f"{name}: {error}")
    else:
        read_text(text, name, model, settings)


def read_text(text: str, name: str, model: type[BaseModel], settings: Settings) -> None:
    """Add the settings of YAML text; ``name`` stands in messages."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.nodes import MappingNode

    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        if root is None:
            return
        if not isinstance(root, MappingNode):
            line = root.start_mark.line + 1
            problem = "no keys found; write sections such as `train:` with `epochs: 10` below"
            settings.problems.append(f"{name}, line {line}: {problem}")
            return
        if _has_aliases(root):
            settings.problems.append(f"{name}: uses YAML aliases (`*name`); write the values out")
            return
        # Constructing the whole first finds keys that stand twice.
        yaml.constructor.construct_object(root, deep=True)
        settings.items.extend(_node_settings(yaml, root, model, model, (), name))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        what = str(error.problem or error.context).strip().splitlines()[0]
        settings.problems.append(f"{name}{line}: not valid YAML: {what}")
    except (YAMLError, ValueError, RecursionError) as error:
        what = str(error).strip().splitlines()[0]
        settings.problems.append(f"{name}: not valid YAML: {what}")


def _has_aliases(root: Any) -> bool:
    """Whether a node stands in two places; such references can nest without end."""
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            return True
        seen.add(id(node))
        if isinstance(node, MappingNode):
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, SequenceNode):
            waiting.extend(node.value)
    return False


def _node_settings(
    yaml: Any, node: Any, root: type[BaseModel], model: type[BaseModel], before: Keys, name: str
) -> Iterator[Setting]:
    from ruamel.yaml.nodes import MappingNode

    for key_node, value_node in node.value:
        keys = (*before, *str(yaml.constructor.construct_object(key_node)).split("."))
        inner = section_at(root, keys)
        if isinstance(value_node, MappingNode) and inner is not None:
            yield from _node_settings(yaml, value_node, root, inner, keys, name)
            continue
        value = yaml.constructor.construct_object(value_node, deep=True)
        if value is None and inner is not None:
            continue  # a section whose lines are all commented out
        yield Setting(_stored(keys), value, f"{name}, line {key_node.start_mark.line + 1}")


def read_mapping(
    values: Mapping[str, Any], origin: str, model: type[BaseModel], settings: Settings
) -> None:
    """Add the settings of a mapping with nested or dotted keys."""

    def walk(part: Mapping[str, Any], before: Keys) -> None:
        for key, value in part.items():
            keys = (*before, *str(key).split("."))
            if isinstance(value, Mapping) and section_at(model, keys) is not None:
                walk(value, keys)
            else:
                settings.items.append(Setting(_stored(keys), value, origin))

    walk(values, ())


def read_option(option: str, model: type[BaseModel], settings: Settings) -> None:
    """Add the setting of one ``--set KEY=VALUE``; the value is a YAML scalar or list."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    origin = f"--set {option}"
    key, equals, text = option.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        settings.problems.append(f"{origin}: write KEY=VALUE, such as --set train.epochs=10")
        return
    target = field_at(model, keys)
    text_wanted = target is not None and _takes_only_text(target.annotation)
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        if not text_wanted:
            settings.problems.append(
                f"{origin}: the value is not valid YAML; put quotes around text with special "
                f"characters, such as --set '{key}=[\"*.txt\"]'"
            )
            return
        value = text
    if text_wanted and not isinstance(value, str | list | Mapping | None):
        value = text.strip()  # a subject called 007 is not the number 7
    read_mapping({key.strip(): value}, origin, model, settings)


def _takes_only_text(annotation: Any) -> bool:
    kinds = {annotation, *(get_args(annotation) if _is_union(annotation) else ())}
    return bool(kinds & {str, Path}) and kinds <= {str, Path, type(None), annotation}


def is_path(annotation: Any) -> bool:
    """Whether a field holds a path, perhaps with None."""
    return Path in (annotation, *get_args(annotation))


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _stored(keys: Keys) -> Keys:
    if keys[0] == STAGES and len(keys) > 2:
        return (*keys[:2], ".".join(keys[2:]))
    return keys


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model behind an annotation ``Section`` or ``Section | None``."""
    kinds = get_args(annotation) if _is_union(annotation) else (annotation,)
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0] if len(models) == 1 else None


def section_at(model: type[BaseModel], keys: Keys) -> type[BaseModel] | None:
    """The model whose keys stand below ``keys``, or None where a value stands."""
    if keys and keys[0] == STAGES and STAGES in model.model_fields:
        return section_at(model, keys[2:])
    section: type[BaseModel] | None = model
    for key in keys:
        found = section.model_fields.get(key) if section else None
        section = section_of(found.annotation) if found else None
    return section


def field_at(model: type[BaseModel], keys: Keys) -> FieldInfo | None:
    """The field that dotted keys name, or None."""
    if len(keys) > 2 and keys[0] == STAGES:
        return field_at(model, keys[2:])
    section = section_at(model, keys[:-1])
    return section.model_fields.get(keys[-1]) if section else None


def value_field(model: type[BaseModel], keys: Keys) -> FieldInfo | None:
    """The field of the value that keys name or reach into; None for sections and unknown keys."""
    for length in range(1, len(keys) + 1):
        found = field_at(model, keys[:length])
        if found is not None and section_at(model, keys[:length]) is None:
            return found
    return None


def leaves(model: type[BaseModel], before: Keys = ()) -> Iterator[tuple[Keys, FieldInfo]]:
    """Every value of a configuration with its keys, in order; sections are left out."""
    for name, found in model.model_fields.items():
        inner = section_of(found.annotation)
        if inner is None:
            yield (*before, name), found
        else:
            yield from leaves(inner, (*before, name))


def default_values(model: type[BaseModel]) -> dict[str, Any]:
    """The default values of a model as a nested mapping of JSON values."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        inner = section_of(info.annotation)
        if not info.is_required():
            default = info.get_default(call_default_factory=True, validated_data={})
            found[name] = to_jsonable_python(default)
        elif inner is not None:
            found[name] = default_values(inner)
    return _with_dotted_stages(model, found)


def values_of(config: BaseModel) -> dict[str, Any]:
    """The values of a configuration as a nested mapping of JSON values, in order."""
    return _with_dotted_stages(type(config), config.model_dump(mode="json"))


def _with_dotted_stages(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The same values; below each stage one dotted key a value, so that settings can meet."""
    stages = values.get(STAGES)
    if STAGES not in model.model_fields or not isinstance(stages, Mapping):
        return values
    flat = Settings()
    read_mapping({STAGES: stages}, "", model, flat)
    written: dict[str, Any] = {stage: {} for stage in stages}
    for setting in flat.items:
        put(written, setting.path[1:], setting.value)
    return {**values, STAGES: written}


def put(tree: dict[str, Any], path: Keys, value: Any) -> None:
    """Set a value in a nested mapping."""
    for key in path[:-1]:
        inner = tree.get(key)
        tree[key] = dict(inner) if isinstance(inner, Mapping) else {}
        tree = tree[key]
    tree[path[-1]] = value


def build(model: type[Model], tree: Mapping[str, Any], settings: Settings) -> Model:
    """Validate a configuration with settings on top of it.

    Args:
        model: The configuration's model.
        tree: Values below the settings: the defaults, or an earlier configuration.
        settings: What was set, the strongest last.

    Raises:
        UsageError: Every problem, a line each: where, which field, given, allowed.
    """
    values = deepcopy(dict(tree))
    origins: dict[Keys, str] = {}
    refused: list[str] = []
    for setting in settings.items:
        problem = _section_problem(model, setting)
        if problem:  # laid over the values it would hide whole sections from the later checks
            refused.append(problem)
            continue
        put(values, setting.path, setting.value)
        origins = {
            keys: origin
            for keys, origin in origins.items()
            if keys[: len(setting.path)] != setting.path
        }
        origins[setting.path] = setting.origin
    config, problems = _validate(model, values, origins, ())
    problems += _stage_problems(model, values, origins)
    problems = settings.problems + refused + list(dict.fromkeys(problems))
    if problems or config is None:
        raise UsageError("\n".join(problems))
    return config


def _section_problem(model: type[BaseModel], setting: Setting) -> str | None:
    """What is wrong with a value that stands where a section belongs, or None."""
    section = section_at(model, setting.path)
    found = field_at(model, setting.path)
    may_be_null = found is not None and type(None) in get_args(found.annotation)
    if section is None or isinstance(setting.value, Mapping):
        return None
    if setting.value is None and may_be_null:
        return None
    from diptych.configwords import describe, schema_at, show

    allowed = describe(schema_at(model, setting.path) or schema_at(section, ()))
    name = dotted(setting.path)
    return f"{setting.origin}, {name}: given {show(setting.value)}, allowed: {allowed}"


def _stage_problems(
    model: type[BaseModel], values: Mapping[str, Any], origins: Mapping[Keys, str]
) -> list[str]:
    """What is wrong in the stages' own values, each laid over the configuration."""
    stages = values.get(STAGES)
    problems: list[str] = []
    if STAGES not in model.model_fields or not isinstance(stages, Mapping):
        return problems
    for stage, overrides in stages.items():
        if not isinstance(overrides, Mapping):
            continue
        merged = deepcopy(dict(values))
        merged.pop(STAGES)
        own: dict[Keys, str] = {}
        for key, value in overrides.items():
            keys = tuple(str(key).split("."))
            put(merged, keys, value)
            own[keys] = origins.get((STAGES, stage, key), f"stages.{stage}")
        problems += _validate(model, merged, own, (STAGES, str(stage)))[1]
    return problems


def _validate(
    model: type[Model], values: Mapping[str, Any], origins: Mapping[Keys, str], below: Keys
) -> tuple[Model | None, list[str]]:
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        from diptych.configwords import explain

        problems = []
        for keys, place, sentence in explain(model, values, error):
            origin = _origin(keys, place, sentence, origins)
            if origin is None and below:
                continue  # not the stage's own doing: said for the whole configuration already
            parts = [part for part in (origin, ".".join((*below, *keys))) if part]
            problems.append(f"{', '.join(parts)}: {sentence}")
        return None, problems


def _origin(keys: Keys, place: Keys, sentence: str, origins: Mapping[Keys, str]) -> str | None:
    """Where a refused value stands.

    Args:
        keys: The key of the configuration that is refused, perhaps a whole section.
        place: The same, followed by keys inside its value.
        sentence: What is said of it.
        origins: Where each value that was set stands.
    """
    for length in range(len(place), 0, -1):
        if place[:length] in origins:
            return origins[place[:length]]
    inside = {path: where for path, where in origins.items() if path[: len(keys)] == keys}
    named = {
        path: where
        for path, where in inside.items()
        if re.search(rf"\b{re.escape(path[-1])}\b", sentence)
    }
    # A rule between several values names them; else each of them may be the wrong one.
    return " and ".join(dict.fromkeys((named or inside).values())) or None


def dotted(keys: Sequence[str]) -> str:
    """Keys as one name: "train.epochs"."""
    return ".".join(keys)
