"""Models as files that run without maekit, torch or timm: ONNX, and torch's own pt2.

`torch.export` records the model once; `torch.onnx` translates that record. A file is kept only after it has run, at
several batch sizes, and agreed with the model it came from; it says by itself what it is (``metadata_props`` of ONNX,
``maekit.json`` inside a pt2 file). maekit opens no pt2 file but the one it has just written.

B batch, C channels, H W pixels, N patches, D token width.
"""

import contextlib
import copy
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from maekit import __version__
from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder, check_pool, pool_tokens
from maekit.model.masking import len_keep
from maekit.model.patches import resample_positions

TOLERANCE = 1e-4
"""Largest difference that a file may show: float32 sums in another order stay two digits below it."""
OPSET = 18
"""Of ONNX: the one torch's translations are written in, and read by onnxruntime since 1.14."""
LARGEST_IN_ONE_FILE = 2_000_000_000
"""Bytes of weights inside an .onnx file; protobuf ends at 2^31 - 1, graph included."""
FACTS = "maekit.json"
"""Name of what a pt2 file says about itself: ``torch.export.load(path, extra_files={"maekit.json": ""})`` fills it."""

Model = TypeVar("Model", MaskedAutoencoder, VisionTransformer)
Runner = Callable[..., list[Tensor]]
Size = tuple[int, int]


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


class _Plan(NamedTuple):
    """A model made ready: what is recorded, what it is measured with, what the file says about it."""

    graph: nn.Module
    model: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    channels: int
    patch: int
    grid: Size
    dynamic_size: bool
    facts: dict[str, str]


def export_onnx(
    model: MaskedAutoencoder | VisionTransformer,
    path: str | Path,
    *,
    what: str = "encoder",
    pool: str = "mean",
    dynamic_size: bool = False,
    mask_ratio: float = 0.75,
    spec: dict[str, Any] | None = None,
    classes: Sequence[str] | None = None,
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
            resampled inside the graph as `resample_positions` does (bicubic, cubic_coeff_a -0.75, half_pixel).
        mask_ratio: of an autoencoder, fixed in the file.
        spec: of the autoencoder that a classifier came from.
        classes: names of a classifier's outputs.

    Raises:
        MaekitError: E-ENV-IMPORT without the packages of ``maekit[export]``; E-CONFIG-EXPORT for what cannot be
            exported; E-CONFIG-POOL, E-CONFIG-MASK; E-CKPT-PARITY if the file gives other numbers than the model: by
            more than 1e-4, relative to max(1, largest absolute value of the output); E-ENV-OUT, E-ENV-DISK. After any
            of them no new file is on the disk.
    """
    _require_onnx()
    plan = _plan(model, what, pool, dynamic_size, mask_ratio, spec, classes)
    return _export(plan, Path(path), _save_onnx, _onnx_runner)


def export_pt2(
    model: MaskedAutoencoder | VisionTransformer,
    path: str | Path,
    *,
    what: str = "encoder",
    pool: str = "mean",
    dynamic_size: bool = False,
    mask_ratio: float = 0.75,
    spec: dict[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Exported:
    """Write a pt2 file (``torch.export.save``) of any batch size, proved after reading it again.

    ``torch.export.load(path).module()(images)`` runs it with torch alone; inputs, outputs, arguments, proof and errors
    are those of `export_onnx`, but outputs come without names, in that order. Always one file.

    Raises:
        MaekitError: as `export_onnx`, without E-ENV-IMPORT.
    """
    plan = _plan(model, what, pool, dynamic_size, mask_ratio, spec, classes)
    return _export(plan, Path(path), _save_pt2, _pt2_runner)


class _Features(nn.Module):
    """An encoder and its pooling, or a classifier as it is (`pool` None)."""

    def __init__(self, encoder: VisionTransformer, pool: str | None) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool

    def forward(self, images: Tensor) -> Tensor:
        if self.pool is None:
            return self.encoder(images)
        return pool_tokens(self.encoder, self.encoder.forward_features(images), self.pool)


class _AnySize(nn.Module):
    """The same with positions resampled to the images' grid; timm's own code runs, on other positions."""

    def __init__(self, inner: _Features, patch: int, grid: Size) -> None:
        super().__init__()
        self.inner, self.patch, self.grid = inner, patch, grid

    def forward(self, images: Tensor) -> Tensor:
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        table = self.inner.encoder.pos_embed
        assert table is not None
        return functional_call(self.inner, {"encoder.pos_embed": resample_positions(table, self.grid, grid)}, (images,))


class _Autoencoder(nn.Module):
    """A whole autoencoder with noise as an input; gives a plain tuple."""

    def __init__(self, model: MaskedAutoencoder, mask_ratio: float) -> None:
        super().__init__()
        self.model, self.mask_ratio = model, mask_ratio

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(images, self.mask_ratio, noise=noise))


def _require_onnx() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MaekitError(
            "E-ENV-IMPORT",
            "ONNX export",
            found=f"no package {error.name}" if error.name else error,
            expected="onnx, onnxscript and onnxruntime",
            hint="pip install 'maekit[export]'",
        ) from error
    assert onnx and onnxruntime


def _plan(
    model: MaskedAutoencoder | VisionTransformer,
    what: str,
    pool: str,
    dynamic_size: bool,
    mask_ratio: float,
    spec: dict[str, Any] | None,
    classes: Sequence[str] | None,
) -> _Plan:
    _check(model, what, dynamic_size, spec, classes)
    model = _ready(model)
    inputs, outputs = ("images",), ("features",)
    if isinstance(model, VisionTransformer):
        what, outputs, encoder, graph = "classifier", ("logits",), model, _Features(model, None)
        facts = {"pool": "mean" if model.global_pool == "avg" else "cls", "classes": list(classes or [])}
    elif what == "encoder":
        check_pool(model.encoder, pool, also=("tokens",))
        encoder, graph, facts = model.encoder, _Features(model.encoder, pool), {"pool": pool}
    else:
        keep = len_keep(model.num_patches, mask_ratio)  # refuses what cannot be
        inputs, outputs = ("images", "noise"), ("loss", "pred", "mask", "ids_restore", "latent")
        encoder, graph = model.encoder, _Autoencoder(model, mask_ratio)
        noise = f"float32 (batch, patches), uniform in 0..1: in each row the {keep} lowest stay"
        facts = {"mask_ratio": mask_ratio, "noise": noise}
    spec = model.spec if isinstance(model, MaskedAutoencoder) else spec
    assert spec is not None and encoder.patch_embed.grid_size is not None
    grid, patch = (
        (encoder.patch_embed.grid_size[0], encoder.patch_embed.grid_size[1]),
        encoder.patch_embed.patch_size[0],
    )
    encoder.patch_embed.strict_img_size = not dynamic_size
    return _Plan(
        graph=_AnySize(graph, patch, grid) if dynamic_size and isinstance(graph, _Features) else graph,
        model=graph,
        inputs=inputs,
        outputs=outputs,
        channels=encoder.in_chans,
        patch=patch,
        grid=grid,
        dynamic_size=dynamic_size,
        facts=_facts(spec, what=what, patch=patch, **facts),
    )


def _check(
    model: MaskedAutoencoder | VisionTransformer,
    what: str,
    dynamic_size: bool,
    spec: dict[str, Any] | None,
    classes: Sequence[str] | None,
) -> None:
    is_classifier = isinstance(model, VisionTransformer)
    hint: str | None = None
    if what not in ("encoder", "autoencoder"):
        found, expected = what, "encoder | autoencoder"
    elif what == "autoencoder" and is_classifier:
        found, expected = "a fine-tuned classifier as autoencoder", "a masked autoencoder, with its decoder"
    elif what == "autoencoder" and dynamic_size:
        found = "an autoencoder of any image size"
        expected = "one size: masking, noise and the decoder's positions are those of its patches"
        hint = "the encoder with any size, or the autoencoder with its own"
    elif is_classifier and (spec is None or model.num_classes < 1):
        found, expected = "a VisionTransformer without spec or head", "what load_classifier returns: model and spec"
    elif is_classifier and classes and len(classes) != model.num_classes:
        found, expected = f"{len(classes)} classes", f"{model.num_classes}, one for each output"
    else:
        return
    raise MaekitError("E-CONFIG-EXPORT", "export", found=found, expected=expected, hint=hint)


def _ready(model: Model) -> Model:
    """Return a copy in eval mode, float32 on the CPU; tensors that are so already are shared, not copied."""
    tensors = (*model.parameters(), *model.buffers())
    shared: dict[int, Any] = {id(t): t for t in tensors if t.device.type == "cpu" and t.dtype == torch.float32}
    ready = copy.deepcopy(model, shared).to("cpu", torch.float32).eval()
    encoder = ready if isinstance(ready, VisionTransformer) else ready.encoder
    encoder.set_grad_checkpointing(False)  # timm checkpoints in eval mode, too, and that cannot be recorded
    return ready


def _facts(spec: dict[str, Any], **more: Any) -> dict[str, str]:
    """Return what the file says about itself; text as it is, everything else as JSON."""
    facts = {
        "version": __version__,
        "images": "float32 (batch, channels, height, width); value / 255 (uint8), then (value - mean) / std",
        "mean": list(spec["mean"]),
        "std": list(spec["std"]),
        "spec": spec,
        **more,
    }
    return {f"maekit.{name}": v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()}


def _record(plan: _Plan) -> ExportedProgram:
    """Record the graph with torch.export, its batch (and image size) left open."""
    batch = Dim("batch", min=1)
    images: dict[int, Any] = {0: batch}
    if plan.dynamic_size:
        # torch.export takes a length of one for a constant, so the record starts at two patches each way.
        images |= {axis: plan.patch * Dim(name, min=2) for axis, name in ((2, "rows"), (3, "columns"))}
    shapes: dict[str, Any] = {"images": images, "noise": {0: batch}}
    example = _example(plan, _sizes(plan)[-1], 2)
    with torch.no_grad():
        program = torch.export.export(
            plan.graph, example, dynamic_shapes=tuple(shapes[name] for name in plan.inputs), strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    return program


def _sizes(plan: _Plan) -> list[Size]:
    """Return image sizes to try: the model's own; if open, one with fewer patches too, and last a larger one."""
    grids = [plan.grid]
    if plan.dynamic_size:  # sides of the last differ from each other and from the own ones: nothing can be confused
        larger = max(plan.grid) + 1
        grids += [(max(2, plan.grid[0] // 2), max(2, plan.grid[1] // 2)), (larger, larger + 1)]
    return [(rows * plan.patch, columns * plan.patch) for rows, columns in grids]


def _example(plan: _Plan, size: Size, batch: int) -> tuple[Tensor, ...]:
    """Draw inputs: images as if normalised, noise with many ties, which only a stable sort keeps in order."""
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, plan.channels, *size, generator=generator)
    if "noise" not in plan.inputs:
        return (images,)
    num_patches = plan.grid[0] * plan.grid[1]
    return images, torch.randint(0, num_patches, (batch, num_patches), generator=generator) / num_patches


def _save_pt2(program: ExportedProgram, plan: _Plan, file: Path) -> None:
    torch.export.save(program, file, extra_files={FACTS: json.dumps(plan.facts)})


def _save_onnx(program: ExportedProgram, plan: _Plan, file: Path) -> None:
    import onnx_ir as ir

    translated = torch.onnx.export(
        program,
        dynamo=True,
        input_names=plan.inputs,
        output_names=plan.outputs,
        opset_version=OPSET,
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        verbose=False,  # True would print
    )
    assert translated is not None
    model = translated.model
    ports = [port for side in _ports(plan, program) for port in side.values()]
    for value, port in zip([*model.graph.inputs, *model.graph.outputs], ports, strict=True):
        value.shape = ir.Shape(port.shape)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # traces of the export
    model.metadata_props.clear()
    model.metadata_props.update(plan.facts)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    translated.save(file, external_data=weights > LARGEST_IN_ONE_FILE)


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Translate the sort of `random_masking`: (B, N) along its second axis.

    ONNX defines TopK to give equal values in the order of their places, which is a stable sort; torch has no
    translation of ``aten.sort.stable`` of its own.
    """
    from onnxscript import opset18

    assert dim == 1 and not descending
    count = opset18.Shape(values, start=1, end=2)
    return opset18.TopK(values, count, axis=1, largest=0, sorted=1)


def _ports(plan: _Plan, program: ExportedProgram) -> tuple[dict[str, _Port], dict[str, _Port]]:
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
        {name: port(value) for name, value in zip(plan.inputs, inputs, strict=True)},
        {name: port(value) for name, value in zip(plan.outputs, outputs, strict=True)},
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
        given = module(*inputs)
        return list(given) if isinstance(given, tuple | list) else [given]

    return run


def _prove(plan: _Plan, run: Runner) -> dict[str, float]:
    """Run file and model on the same inputs: batches of 2 (as recorded), 1 and 3, every size of `_sizes`.

    At the model's own size the model itself is asked, at others its graph in torch.
    """
    sizes = _sizes(plan)
    worst = dict.fromkeys(plan.outputs, 0.0)
    for size, batch in [(size, 2) for size in sizes] + [(sizes[0], 1), (sizes[-1], 3)]:
        inputs = _example(plan, size, batch)
        with torch.no_grad():
            expected = (plan.model if size == sizes[0] else plan.graph)(*inputs)
            found = run(*inputs)
        for name, one, other in zip(plan.outputs, _listed(expected), found, strict=True):
            worst[name] = max(worst[name], _difference(one, other))
    return worst


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference as `Exported.differences` defines it; infinite where there is none to tell."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if not expected.is_floating_point():
        return float((expected.long() - found.long()).abs().max())
    worst = float((expected - found).abs().max()) / max(1.0, float(expected.abs().max()))
    return worst if math.isfinite(worst) else math.inf


def _export(
    plan: _Plan,
    path: Path,
    save: Callable[[ExportedProgram, _Plan, Path], None],
    open_: Callable[[Path], Runner],
) -> Exported:
    """Record, save into a hidden folder beside the place, prove, then move; whatever fails, the folder goes."""
    for place in (path, _weights_of(path)):
        if os.path.lexists(place):
            raise MaekitError("E-ENV-OUT", f"{place}", found="it exists", expected="a new name: nothing is replaced")
    program = _record(plan)
    with _hidden_folder(path) as folder:
        file = folder / path.name  # under its final name: an ONNX file names the file of its weights
        save(program, plan, file)
        differences = _prove(plan, open_(file))
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
                with part.open("rb+") as opened:
                    os.fsync(opened.fileno())
                part.rename(path.with_name(part.name))
    inputs, outputs = ({name: str(port) for name, port in side.items()} for side in _ports(plan, program))
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
