"""Models as files that run without maekit, torch or timm: ONNX, and torch's own pt2.

`torch.export` records the model once; `torch.onnx` translates that record. A file is kept only after it has run, at
several batch sizes, and agreed with the model it came from; it says by itself what it is (``metadata_props`` of ONNX,
``maekit.json`` inside a pt2 file). maekit opens no pt2 file but the one it has just written.

B batch, C channels, H W pixels, N patches, D token width.
"""

import contextlib
import errno
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from maekit.disk import put
from maekit.errors import MaekitError
from maekit.interchange.graphs import Graph, Model, graph_of

TOLERANCE = 1e-4
"""Largest difference that a file may show: float32 sums in another order stay two digits below it."""
OPSET = 18
"""Of ONNX: the one torch translates into; onnxruntime 1.20, the oldest that ``maekit[export]`` takes, reads it."""
LARGEST_IN_ONE_FILE = 2_000_000_000
"""Bytes of weights inside an .onnx file; protobuf ends at 2^31 - 1, graph included."""
FACTS = "maekit.json"
"""Name of what a pt2 file says about itself: ``torch.export.load(path, extra_files={"maekit.json": ""})`` fills it."""

Runner = Callable[..., list[Tensor]]


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: of the file; weights too large for it lie in ``path`` + ".data".
        inputs: name -> shape and type, such as "(batch, 3, 224, 224) float32".
        outputs: likewise.
        differences: output -> largest difference from the torch model that was measured, relative to
            max(1, largest absolute value of that output); of integers and bools, absolute: they must be equal.
    """

    path: Path
    inputs: dict[str, str]
    outputs: dict[str, str]
    differences: dict[str, float]


class _Port(NamedTuple):
    """Shape and type of an input or output; sides left open have names."""

    shape: list[int | str]
    dtype: str

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.shape))}) {self.dtype}"


def export_onnx(
    model: Model,
    path: str | Path,
    *,
    what: str = "encoder",
    pool: str = "mean",
    dynamic_size: bool = False,
    mask_ratio: float = 0.75,
    spec: dict[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    task: str = "classes",
) -> Exported:
    """Write an ONNX file (opset 18, float32) of any batch size, proved with onnxruntime on the CPU.

    Encoder: ``images`` (B, C, H, W) -> ``features``. Classifier: ``images`` -> ``logits``. Autoencoder: ``images`` and
    ``noise`` (B, N) -> ``loss``, ``pred``, ``mask``, ``ids_restore``, ``latent``, as `MaskedAutoencoder.forward`.
    Images are normalised already, with the mean and std that ``metadata_props`` name.

    The file is made in a hidden folder beside its place and moved once it is whole and proved. Weights of more than
    2 GB cannot lie in it (protobuf): they go to ``path`` + ".data", which must travel with it and is moved first.

    Args:
        model: in any mode, precision and device; stays as it is.
        path: of the file; nothing that exists is replaced.
        what: "encoder" | "autoencoder"; a VisionTransformer, from ``load_classifier``, is always a classifier.
        pool: of an encoder: "mean" | "cls" | "tokens", as `MaskedAutoencoder.features`; a classifier has its own.
        dynamic_size: take images of any multiple of the patch side, at least two patches each way; positions are
            resampled inside the graph as `resample_positions` does (bicubic, cubic_coeff_a -0.75, half_pixel). Of
            other images ONNX leaves the rest at the right and bottom out without a word; a pt2 file refuses them.
        mask_ratio: of an autoencoder, fixed in the file.
        spec: of the autoencoder that a classifier came from.
        classes: names of a classifier's outputs.
        task: what they are, as `load_classifier` says; of "regression" the output is called ``numbers``.

    Raises:
        MaekitError: E-ENV-IMPORT without the packages of ``maekit[export]``; E-CONFIG-EXPORT for what cannot be
            exported; E-CONFIG-POOL, E-CONFIG-MASK; E-CKPT-PARITY if the file gives other numbers than the model: by
            more than 1e-4, relative to max(1, largest absolute value of the output); E-ENV-OUT, E-ENV-DISK. After any
            of them no new file is on the disk.
    """
    _require_onnx()
    graph = graph_of(model, what, pool, dynamic_size, mask_ratio, spec, classes, task)
    return _export(graph, Path(path), _save_onnx, _onnx_runner)


def export_pt2(
    model: Model,
    path: str | Path,
    *,
    what: str = "encoder",
    pool: str = "mean",
    dynamic_size: bool = False,
    mask_ratio: float = 0.75,
    spec: dict[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    task: str = "classes",
) -> Exported:
    """Write a pt2 file (``torch.export.save``) of any batch size, proved after reading it again.

    ``torch.export.load(path).module()(images)`` runs it with torch alone; inputs, outputs, arguments, proof and errors
    are those of `export_onnx`, but outputs come without names, in that order. Always one file.

    Raises:
        MaekitError: as `export_onnx`, without E-ENV-IMPORT.
    """
    graph = graph_of(model, what, pool, dynamic_size, mask_ratio, spec, classes, task)
    return _export(graph, Path(path), _save_pt2, _pt2_runner)


def _require_onnx() -> None:
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            import_module(name)
    except ImportError as error:
        raise MaekitError(
            "E-ENV-IMPORT",
            "ONNX export",
            found=f"no package {error.name}" if error.name else error,
            expected="onnx, onnxscript and onnxruntime",
            hint="pip install 'maekit[export]'",
        ) from error


def _record(graph: Graph) -> ExportedProgram:
    """Record the graph with torch.export, its batch (and image size) left open."""
    batch = Dim("batch", min=1)
    images: dict[int, Any] = {0: batch}
    if graph.any_size:
        images |= {axis: graph.patch * Dim(name, min=2) for axis, name in ((2, "rows"), (3, "columns"))}
    shapes: dict[str, Any] = {"images": images, "noise": {0: batch}}
    example = graph.example(graph.sizes()[-1], 2)
    with torch.no_grad():
        program = torch.export.export(
            graph.module, example, dynamic_shapes=tuple(shapes[name] for name in graph.inputs), strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    return program


def _save_pt2(program: ExportedProgram, graph: Graph, file: Path) -> None:
    memory = io.BytesIO()  # given a name, torch's writer ends the whole process when the disk is full
    torch.export.save(program, memory, extra_files={FACTS: json.dumps(graph.facts)})
    file.write_bytes(memory.getbuffer())


def _save_onnx(program: ExportedProgram, graph: Graph, file: Path) -> None:
    import onnx_ir as ir

    translated = torch.onnx.export(
        program,
        dynamo=True,
        input_names=graph.inputs,
        output_names=graph.outputs,
        opset_version=OPSET,
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        verbose=False,  # True would print
    )
    assert translated is not None
    model = translated.model
    ports = [port for side in _ports(graph, program) for port in side.values()]
    for value, port in zip([*model.graph.inputs, *model.graph.outputs], ports, strict=True):
        value.shape = ir.Shape(port.shape)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # traces of the export
    model.metadata_props.clear()
    model.metadata_props.update(graph.facts)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    translated.save(file, external_data=weights > LARGEST_IN_ONE_FILE)


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Translate the sort of `random_masking`: (B, N) along its second axis.

    ONNX defines TopK to give equal values in the order of their places, which is a stable sort; torch has no
    translation of ``aten.sort.stable`` of its own.
    """
    from onnxscript import opset18

    assert dim == 1 and not descending
    count: Any = opset18.Shape(values, start=1, end=2)
    return opset18.TopK(values, count, axis=1, largest=0, sorted=1)


def _ports(graph: Graph, program: ExportedProgram) -> tuple[dict[str, _Port], dict[str, _Port]]:
    """Return inputs and outputs as the record has them, with names in place of torch's symbols."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs, outputs = (
        [values[str(name)] for name in names]
        for names in (program.graph_signature.user_inputs, program.graph_signature.user_outputs)
    )
    sides = {str(side): name for side, name in zip(inputs[0].shape, ("batch", "", "height", "width"), strict=True)}

    def port(value: Tensor) -> _Port:
        shape = [side if isinstance(side, int) else sides.get(str(side), "tokens") for side in value.shape]
        return _Port(shape, str(value.dtype).removeprefix("torch."))

    return (
        {name: port(value) for name, value in zip(graph.inputs, inputs, strict=True)},
        {name: port(value) for name, value in zip(graph.outputs, outputs, strict=True)},
    )


def _onnx_runner(file: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.as_tensor(value) for value in session.run(None, given)]

    return run


def _pt2_runner(file: Path) -> Runner:
    module = torch.export.load(file).module()

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            given = module(*inputs)
        return list(given) if isinstance(given, tuple | list) else [given]

    return run


def _prove(graph: Graph, run: Runner) -> dict[str, float]:
    """Run file and model on the same inputs: batches of 2 (as recorded), 1 and 3, every size of `Graph.sizes`."""
    sizes = graph.sizes()
    worst = dict.fromkeys(graph.outputs, 0.0)
    for size, batch in [(size, 2) for size in sizes] + [(sizes[0], 1), (sizes[-1], 3)]:
        inputs = graph.example(size, batch)
        for name, expected, found in zip(graph.outputs, graph.run(size, inputs), run(*inputs), strict=True):
            worst[name] = max(worst[name], _difference(expected, found))
    return worst


def _difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference as `Exported.differences` defines it; infinite where there is none to tell."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if not expected.is_floating_point():
        return float((expected.long() - found.long()).abs().max())
    worst = float((expected - found).abs().max()) / max(1.0, float(expected.abs().max()))
    return worst if math.isfinite(worst) else math.inf


def _export(
    graph: Graph,
    path: Path,
    save: Callable[[ExportedProgram, Graph, Path], None],
    open_: Callable[[Path], Runner],
) -> Exported:
    """Record, save into a hidden folder beside the place, prove, then move; whatever fails, the folder goes."""
    place = path if os.path.lexists(path) else _weights_of(path)
    if os.path.lexists(place):
        raise MaekitError("E-ENV-OUT", f"{place}", found="it exists", expected="a new name: nothing is replaced")
    with _hidden_folder(path) as folder:  # at once: recording takes a while
        program = _record(graph)
        file = folder / path.name  # under its final name: an ONNX file names the file of its weights
        save(program, graph, file)
        differences = _prove(graph, open_(file))
        if max(differences.values()) > TOLERANCE:
            measured = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
            raise MaekitError(
                "E-CKPT-PARITY",
                f"{path} was not written",
                found=f"differences from the torch model of {measured}",
                expected=f"at most {TOLERANCE:g} of max(1, largest absolute value)",
                hint="the weights for NaN or huge values, or another release of torch and onnxruntime",
            )
        for part in (_weights_of(file), file):  # so that there is never a file without its weights
            if part.exists():
                put(part, path.with_name(part.name))
    inputs, outputs = ({name: str(port) for name, port in side.items()} for side in _ports(graph, program))
    return Exported(path, inputs, outputs, differences)


def _weights_of(file: Path) -> Path:
    return file.with_name(file.name + ".data")


@contextlib.contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    folder = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        code = "E-ENV-DISK" if error.errno == errno.ENOSPC else "E-ENV-OUT"
        raise MaekitError(code, f"cannot write {path}", found=error.strerror or error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
