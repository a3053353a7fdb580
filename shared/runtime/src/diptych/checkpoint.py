"""Checkpoints: a folder of safetensors and JSON that is whole or absent, without pickle.

``fits/<name>/checkpoints/step-00001234/`` holds ``model.safetensors`` (names
``module/parameter``), ``optim.safetensors``, ``state.json`` and ``sha256.json``. ``last`` and
``best`` beside them are text files with the name of a checkpoint. The newest intact folder is
the one to go on from, so a process may be killed between any two bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.contract import JSON
from diptych.errors import DataError, UsageError
from diptych.files import read_json, write_json, write_text
from diptych.folders import remove_leftovers, write_folder

Tensors = Mapping[str, Mapping[str, Tensor]]  # module name -> parameter or buffer name -> tensor

MODEL, OPTIM, STATE, DIGESTS = "model.safetensors", "optim.safetensors", "state.json", "sha256.json"
_NAME = re.compile(r"step-(\d{8,})(-finished)?")
_SHOWN = 5  # mismatches that a refusal spells out


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint, read into memory.

    Args:
        name: Name of its folder.
        tensors: Parameters and buffers by module.
        optim: Optimizers, schedules and the gradient scaler as their ``state_dict`` gave them.
        state: Everything else, plain JSON.
    """

    name: str
    tensors: Tensors
    optim: Any
    state: Mapping[str, JSON]


def name_of(step: int, *, finished: bool = False) -> str:
    """The name of a checkpoint's folder: ``step-00001234``, with ``-finished`` after the fit."""
    return f"step-{step:08d}{'-finished' if finished else ''}"


def save(folder: Path, name: str, tensors: Tensors, optim: Any, state: Mapping[str, JSON]) -> None:
    """Write a checkpoint and make it the last one.

    Args:
        folder: Folder of the fit.
        name: What :func:`name_of` gives.
        tensors: The ``state_dict`` of every module of the task.
        optim: Nested mappings and sequences of tensors and plain values.
        state: Plain JSON, without NaN.

    Raises:
        TypeError: A value can be stored neither as tensor nor as JSON.
    """
    optim_tensors: dict[str, Tensor] = {}
    content = {**state, "optim": _encode(optim, optim_tensors, "optim")}
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)

    def write(beside: Path) -> None:
        write_tensors(beside / MODEL, tensors)
        save_file(_apart(optim_tensors), beside / OPTIM)
        (beside / STATE).write_text(text, encoding="utf-8")
        digests = {name: _sha256(beside / name) for name in (MODEL, OPTIM, STATE)}
        write_json(beside / DIGESTS, digests)

    write_folder(_checkpoints(folder) / name, write)
    point(folder, "last", name)


def point(folder: Path, pointer: Literal["last", "best"], name: str) -> None:
    """Make ``last`` or ``best`` name a checkpoint."""
    target = _checkpoints(folder) / pointer
    if not (target.is_file() and target.read_text(encoding="utf-8").strip() == name):
        write_text(target, name + "\n")


def prune(folder: Path, best: str | None, newest: int = 2) -> None:
    """Delete all checkpoints but the newest and the best."""
    names = _names(folder)
    _remove(folder, [name for name in names[newest:] if name != best])


def finalize(folder: Path) -> None:
    """Keep only the best checkpoint of a finished fit (the last where nothing was validated)."""
    kept = best(folder).name
    point(folder, "best", kept)
    point(folder, "last", kept)
    _remove(folder, [name for name in _names(folder) if name != kept])


def best(folder: Path, pointer: Literal["best", "last"] = "best") -> Path:
    """The folder of a fit's best checkpoint, of its last where nothing was validated.

    Args:
        folder: Folder of the fit.
        pointer: "last" asks for the last one alone.

    Raises:
        DataError: The fit has no checkpoint, or the files ``best`` and ``last`` are damaged.
    """
    for known in dict.fromkeys((pointer, "last")):
        target = _checkpoints(folder) / known
        if target.is_file():
            name = target.read_text(encoding="utf-8", errors="replace").strip()
            if _NAME.fullmatch(name) and (_checkpoints(folder) / name).is_dir():
                return _checkpoints(folder) / name
    raise DataError(f"{folder}: holds no checkpoint that can be read: train this fit again")


def newest_intact(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from.

    Args:
        folder: Folder of the fit.

    Returns:
        The newest intact checkpoint, if any, and one line for each damaged one that was skipped.
    """
    _rescue(folder)
    remove_leftovers(_checkpoints(folder))
    skipped: list[str] = []
    for name in _names(folder):
        try:
            return read(_checkpoints(folder) / name), skipped
        except DataError as error:
            skipped.append(str(error))
    return None, skipped


def read(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every byte of it.

    Args:
        path: Folder of the checkpoint.

    Raises:
        DataError: A file is missing or damaged.
    """
    problem = damage(path)
    if problem:
        raise DataError(f"{path}: damaged checkpoint: {problem}")
    try:
        state = read_json(path / STATE)
        optim = _decode(state.pop("optim"), load_file(path / OPTIM))
        return Checkpoint(path.name, read_tensors(path / MODEL), optim, state)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: damaged checkpoint: {error}") from error


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's files; "" where nothing is."""
    try:
        digests = read_json(path / DIGESTS)
        if set(digests) != {MODEL, OPTIM, STATE}:
            return f"{DIGESTS} names other files than expected"
        for name, digest in digests.items():
            if _sha256(path / name) != digest:
                return f"{name} differs from its sha256"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, TypeError, OSError) as error:
        return f"{DIGESTS} cannot be read ({type(error).__name__})"
    return ""


def best_tensors(folder: Path) -> Tensors:
    """Parameters and buffers of a fit's best checkpoint, by module.

    Args:
        folder: Folder of the fit.

    Raises:
        DataError: There is none, or it is damaged.
    """
    return _tensors_of(best(folder))


def load_modules(
    folder: Path, modules: Mapping[str, nn.Module], which: Literal["best", "last"] = "best"
) -> None:
    """Copy a fit's weights into modules, strictly.

    Args:
        folder: Folder of the fit.
        modules: By name; the checkpoint may hold further ones that only training needed.
        which: The best checkpoint or the last one.

    Raises:
        DataError: There is no checkpoint, it is damaged, or its tensors do not fit.
    """
    path = best(folder, which)
    load_tensors(modules, _tensors_of(path), str(path))


def load_tensors(modules: Mapping[str, nn.Module], tensors: Tensors, source: str) -> None:
    """Copy tensors into modules, strictly.

    Args:
        modules: By name.
        tensors: By module name; more modules than given are allowed.
        source: Words for the error.

    Raises:
        DataError: A module or one of its tensors is missing, superfluous or of another shape.
    """
    for name, module in modules.items():
        problems = ["no such module"] if name not in tensors else _mismatches(module, tensors[name])
        if problems:
            raise DataError(
                f"{source}: module '{name}' does not fit: {_listed(problems)}: open it with the "
                "version that wrote it, or train again"
            )
        module.load_state_dict(dict(tensors[name]))


def init_from(
    modules: Mapping[str, nn.Module], tensors: Tensors, *, carries: Sequence[str], partial: bool
) -> list[str]:
    """Start modules from the weights of an earlier fit, another run or a file.

    Args:
        modules: The modules to start.
        tensors: The weights, by module name.
        carries: Names of modules to copy; empty means all names that both have.
        partial: Whether tensors that do not fit are left out instead of refused.

    Returns:
        One line a module and one for each tensor that was left out, with the reason.

    Raises:
        UsageError: Nothing fits, a carried module is missing, or tensors differ without
            ``partial``.
    """
    missing = [name for name in carries if name not in modules or name not in tensors]
    names = [name for name in (carries or modules) if name in modules and name in tensors]
    if missing or not names:
        have = f"the weights hold {_listed(list(tensors))}, the model has {_listed(list(modules))}"
        what = f"no module {_listed(missing)} to carry" if missing else "no module in common"
        raise UsageError(f"initial weights: {what}: {have}: choose weights of the same model")
    problems = {name: _mismatches(modules[name], tensors[name]) for name in names}
    flat = [f"{name}: {problem}" for name in names for problem in problems[name]]
    if flat and not partial:
        raise UsageError(
            f"initial weights: {len(flat)} tensors do not fit: {_listed(flat)}: give weights of "
            "the same model, or add --init-partial to copy what fits"
        )
    lines = []
    for name in names:
        own = modules[name].state_dict()
        fitting = {
            key: tensor
            for key, tensor in tensors[name].items()
            if key in own and own[key].shape == tensor.shape
        }
        modules[name].load_state_dict(fitting, strict=False)
        lines.append(f"{name}: {len(fitting)} of {len(own)} tensors matched")
        lines += [f"{name}: {problem}: left out" for problem in problems[name]]
    lines += [f"{name}: not taken: as initialised" for name in modules if name not in names]
    return lines


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write ``module/parameter`` tensors to a safetensors file.

    Raises:
        ValueError: A module's name holds "/".
        TypeError: A state holds something else than tensors.
    """
    flat: dict[str, Tensor] = {}
    for module, state in tensors.items():
        if "/" in module:
            raise ValueError(f"module {module!r}: '/' separates modules from parameters: rename it")
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"module {module!r}: its state {key!r} is a {type(tensor).__name__}: keep "
                    "state in buffers"
                )
            flat[f"{module}/{key}"] = tensor
    save_file(_apart(flat), path)


def read_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read a safetensors file of ``module/parameter`` tensors.

    Args:
        path: The file.

    Returns:
        Tensors by module on the CPU.

    Raises:
        DataError: It cannot be read or has other names.
    """
    try:
        flat = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        module, separator, key = name.partition("/")
        if not separator:
            raise DataError(f"{path}: tensor '{name}' is not named module/parameter")
        tensors.setdefault(module, {})[key] = tensor
    return tensors


def _checkpoints(folder: Path) -> Path:
    return folder / "checkpoints"


def _names(folder: Path) -> list[str]:
    """Names of the checkpoints, newest first."""
    entries = _checkpoints(folder).glob("step-*") if _checkpoints(folder).is_dir() else ()
    names = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(names, key=lambda name: (name.endswith("-finished"), _step(name)), reverse=True)


def _rescue(folder: Path) -> None:
    """Give intact folders their name back that were killed between two renames."""
    for hidden in _checkpoints(folder).glob(".step-*"):
        target = hidden.with_name(hidden.name[1:].rpartition(".")[0])
        if _NAME.fullmatch(target.name) and not target.exists() and not damage(hidden):
            hidden.rename(target)


def _step(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Delete checkpoints; the rename first keeps a half-deleted one from being found."""
    for name in names:
        path = _checkpoints(folder) / name
        hidden = path.with_name(f".{name}.00000000")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _tensors_of(path: Path) -> Tensors:
    problem = damage(path)
    if problem:
        raise DataError(
            f"{path}: damaged checkpoint: {problem}: restore it from a copy, or train again"
        )
    return read_tensors(path / MODEL)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with its own memory as safetensors demands."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if _memory(own) in seen or own.untyped_storage().nbytes() != own.nbytes:
            own = own.clone()
        seen.add(_memory(own))
        apart[name] = own
    return apart


def _mismatches(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    own = module.state_dict()
    problems = [f"'{key}' is missing" for key in own if key not in tensors]
    problems += [f"'{key}' is unknown to the model" for key in tensors if key not in own]
    problems += [
        f"'{key}' has shape {tuple(tensors[key].shape)}, the model's is {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    return problems


def _listed(words: Sequence[str]) -> str:
    rest = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> JSON:
    """A state_dict as JSON that gives the very same values back; tensors go beside it."""
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"tensor": where}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors, f"{where}/{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, tensors, f"{where}/{i}") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        pairs = [[key, _encode(item, tensors, f"{where}/{key}")] for key, item in value.items()]
        if all(isinstance(key, int | str) for key, _ in pairs):
            return {"pairs": pairs}
    raise TypeError(
        f"{where} is a {type(value).__name__}: optimizers and schedules may hold tensors, numbers, "
        "strings, lists and mappings of numbers or names to these"
    )


def _decode(value: JSON, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content}


def snapshot(value: Any) -> Any:
    """A copy of nested mappings and sequences on the CPU, which later steps do not change."""
    if isinstance(value, Tensor):
        copy = value.detach().cpu()
        return copy.clone() if _memory(copy) == _memory(value) else copy
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
