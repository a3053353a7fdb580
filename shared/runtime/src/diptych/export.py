"""Export of a graph, written only when it computes what the PyTorch model computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.contract import Exportable
from diptych.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

EXTRA = "pip install 'diptych[export]'"


def export_part(parts: Mapping[str, Exportable], part: str | None, form: str, out: Path) -> Path:
    """Export one graph of a pipeline.

    Args:
        parts: Graphs by name.
        part: Which; may be None where there is only one.
        form: "onnx" or "pt2".
        out: The file; written when the parity check has passed.

    Returns:
        ``out``.

    Raises:
        UsageError: Unknown part or form, or a package that is missing.
        TrainingError: The exported graph differs from the model by more than its tolerance.
    """
    if part is None and len(parts) > 1:
        raise UsageError(f"--part is needed: this pipeline exports {', '.join(parts)}")
    name = part or next(iter(parts))
    if name not in parts:
        raise UsageError(f"--part {name}: unknown; this pipeline exports {', '.join(parts)}")
    graph = parts[name]
    if form not in graph.formats:
        raise UsageError(f"--format {form}: '{name}' can be exported as {', '.join(graph.formats)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.partial{out.suffix}")
    try:
        with _quiet_exporters():
            run = _to_onnx(graph, beside) if form == "onnx" else _to_pt2(graph, beside)
            _require_parity(graph, run, name)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return out


def _dynamic(graph: Exportable) -> tuple[dict[int, Any], ...]:
    """The axes that may vary, in the order of the inputs; equal names are one size."""
    from torch.export import Dim

    names = {n for axes in graph.dynamic_axes.values() for n in axes.values()}
    sizes = {name: Dim(name, min=1) for name in names}
    return tuple(
        {axis: sizes[label] for axis, label in graph.dynamic_axes.get(key, {}).items()}
        for key in graph.examples
    )


def _to_pt2(graph: Exportable, path: Path) -> Callable[[], list[np.ndarray]]:
    import torch

    inputs = tuple(graph.examples.values())
    program = torch.export.export(graph.module, inputs, dynamic_shapes=_dynamic(graph))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine, and its user's name in them
    torch.export.save(program, path)
    return lambda: _arrays(torch.export.load(path).module()(*inputs))


def _to_onnx(graph: Exportable, path: Path) -> Callable[[], list[np.ndarray]]:
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch needs it
    except ImportError as error:
        raise UsageError(f"export to ONNX needs {error.name}: {EXTRA}") from None
    inputs = tuple(graph.examples.values())
    program = torch.onnx.export(
        graph.module,
        inputs,
        input_names=list(graph.examples),
        output_names=list(graph.outputs),
        dynamic_shapes=_dynamic(graph),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # as it is where no path is given
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine, and its user's name in them
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {key: value.numpy(force=True) for key, value in graph.examples.items()}
    return lambda: list(session.run(None, feed))


def _require_parity(graph: Exportable, run: Callable[[], list[np.ndarray]], name: str) -> None:
    import numpy as np
    import torch

    with torch.no_grad():
        expected = _arrays(graph.module(*graph.examples.values()))
    for want, got in zip(expected, run(), strict=True):
        if want.dtype.kind in "biu" and not np.array_equal(want, got):
            raise TrainingError(
                f"export of '{name}': {int((want != got).sum())} of {want.size} whole numbers "
                "differ: no file was written; use another --format"
            )
        scale = max(float(np.abs(want).max()), 1e-12)
        error = float(np.abs(want - got).max()) / scale
        if not error <= graph.tolerance:
            raise TrainingError(
                f"export of '{name}': the exported graph differs by {error:.1e} (relative), more "
                f"than {graph.tolerance:.0e}: no file was written; use another --format"
            )


def _arrays(outputs: Any) -> list[np.ndarray]:
    values = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [value.numpy(force=True) for value in values]


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """The exporters warn about their own future and print progress; neither helps a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = logging.getLogger("torch.onnx")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
