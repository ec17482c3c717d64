"""Make one bad step of a training again, and say where its numbers cease to be finite.

The training loop leaves weights and numbers of the images in ``RUN/replay/step-K.safetensors`` (`maekit.train.guard`).
With the settings in RUN/config.yaml they make the step again: the same images, crops, masks and random draws, the
passes of all processes one after another in this one, without torch.compile. Nothing is trained, nothing in RUN is
changed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from maekit.config import load_yaml, resolve
from maekit.errors import MaekitError, clean
from maekit.seeds import seed_all
from maekit.settings import FORMAT, Finetune, Pretrain, Probe, Replay, Settings, Tokenizer
from maekit.tasks import Result, finetune, pretrain, tokenizer, trained_probe
from maekit.tasks.features import labelled_splits
from maekit.tasks.goals import goal_of, splits_of
from maekit.tasks.run_folder import Resolved, Run, typed
from maekit.tasks.training import Training, unlabelled
from maekit.train.device import World, resolve_device
from maekit.train.guard import HEADER
from maekit.train.precision import autocast

SETTINGS: dict[str, type[Settings]] = {
    "pretrain": Pretrain,
    "finetune": Finetune,
    "probe": Probe,
    "tokenizer": Tokenizer,
}
NEAR = 1e-3
"""Share by which the loss of a spike may differ on another machine, or with passes of other processes."""


@dataclass
class Findings:
    """What a step shows.

    Attributes:
        images: of each image that holds a number that is not finite: its id and how many.
        largest: absolute pixel of all, normalised.
        module: first whose output is not finite, and whether its input was.
        loss: of the step.
        norm: of the gradient.
        gradients: parameters whose gradient is not finite.
        weights: parameters and buffers that are not finite before the step.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    largest: float = 0.0
    module: dict[str, Any] | None = None
    loss: float = 0.0
    norm: float = 0.0
    gradients: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)


def replay(settings: Replay | dict[str, Any]) -> Result:
    """Make the step again.

    Returns:
        step, batch, kind, found (the loss in the file), loss, gradient_norm, reproduced, module, input_finite, images,
        largest_pixel, gradients, weights; exit code 1 if the number is bad again, 0 if it is not.

    Raises:
        MaekitError: E-USAGE-FILE, E-CKPT- for a file that is no replay file or not beside its run, E-DATA-CHANGED,
            E-ENV-DEVICE.
    """
    settings = typed(Replay, settings)
    if settings.file is None:
        raise MaekitError("E-USAGE-FILE", "no file named", hint="maekit replay RUN/replay/step-K.safetensors")
    facts, weights = _read(settings.file)
    here = World(0, 1, resolve_device(settings.device))
    ready = _training(settings, here)
    try:
        ready.model.load_state_dict(weights)
    except RuntimeError as error:
        raise MaekitError(
            "E-CKPT-MODEL", f"replay file {settings.file}", found="weights of another model",
            expected=f"those of the run in {settings.file.resolve().parent.parent}",
        ) from error  # fmt: skip
    found = _again(ready, facts, here)
    bad = found.gradients or found.module or not torch.tensor(found.loss).isfinite()
    if facts["kind"] == "spike":
        bad = abs(found.loss - facts["loss"]) <= NEAR * abs(facts["loss"])
    module = found.module or {}
    metrics: dict[str, Any] = {
        "step": facts["step"], "batch": facts["batch"], "kind": facts["kind"], "found": facts["loss"],
        "loss": found.loss, "gradient_norm": found.norm, "reproduced": bool(bad), "module": module.get("name"),
        "input_finite": module.get("input_finite"), "images": found.images, "largest_pixel": found.largest,
        "gradients": found.gradients, "weights": found.weights,
    }  # fmt: skip
    return Result(metrics, _told(facts, found, bool(bad), ready), exit_code=int(bool(bad)))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a replay file says and its weights.

    Raises:
        MaekitError: E-CKPT-MISSING, E-CKPT-FORMAT, E-CKPT-KEYS.
    """
    if not path.is_file():
        raise MaekitError(
            "E-CKPT-MISSING", f"replay file {path}", found="no file", hint="RUN/replay/step-K.safetensors"
        )
    try:
        with safetensors.safe_open(path, "pt") as opened:
            facts = json.loads((opened.metadata() or {})[HEADER])
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        wrong = facts["format"] > FORMAT or not all(type(facts[name]) is int for name in ("step", "batch", "world"))
        known = facts["kind"] in ("loss", "gradient", "spike") and isinstance(facts["loss"], float)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MaekitError(
            "E-CKPT-KEYS", f"replay file {path}", found=f"{type(error).__name__}: {error}",
            expected="a file that a training wrote", hint="RUN/replay/step-K.safetensors",
        ) from error  # fmt: skip
    if wrong or not known:
        raise MaekitError(
            "E-CKPT-FORMAT", f"replay file {path}", found="values of another maekit", hint="a newer maekit"
        )
    return facts, weights


def _training(settings: Replay, here: World) -> Training:
    """Build the training of the run that the file lies in."""
    assert settings.file is not None
    path = settings.file.resolve().parent.parent
    header = load_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
    verb = header.get("verb")
    if verb not in SETTINGS or "resolved" not in header:
        raise MaekitError(
            "E-CKPT-MISSING", f"run of {settings.file}", found=f"no config.yaml of a training in {path}",
            expected="the file where the training wrote it", hint="RUN/replay/step-K.safetensors",
        )  # fmt: skip
    chosen = resolve(SETTINGS[verb], file=path / "config.yaml")[0]
    moved = {"data": settings.data} if settings.data is not None else {}
    chosen = chosen.model_copy(
        update={
            **moved,
            "workers": 0,
            "data_changed": "stop",
            "verify_data": False,
            **({"compile": False} if hasattr(chosen, "compile") else {}),
        }
    )
    run = Run(path, Resolved.model_validate(header["resolved"]), None)
    if isinstance(chosen, Pretrain):
        return pretrain.training(chosen, unlabelled(chosen, None, chosen.channels), run, here)
    if isinstance(chosen, Tokenizer):
        return tokenizer.training(chosen, unlabelled(chosen, None, chosen.channels), run, here)[0]
    if isinstance(chosen, Probe):
        return trained_probe.training(chosen, *labelled_splits(chosen), run, here)
    assert isinstance(chosen, Finetune)
    parts = finetune.Parts.of(chosen, *splits_of(chosen))
    origin, statistics = finetune.start_of(chosen, parts.fit)
    return finetune.training(chosen, parts, goal_of(chosen, parts.fit), origin, statistics, run, here)


def _again(ready: Training, facts: dict[str, Any], here: World) -> Findings:
    """Make all passes of all processes, forward and backward, and look at every number."""
    model, loader, plan, found = ready.model, ready.loader, ready.plan, Findings()
    found.weights = [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    loader.micro_batch = facts["micro_batch"]
    loader.bad.file = None
    loader.world = facts["world"]
    scale = facts["scale"] if plan.settings.precision == "fp16" and here.device.type == "cuda" else 1.0
    with _watched(model, found):
        for rank in range(loader.world):
            loader.rank = rank
            whole, mine = loader.sizes(facts["batch"])
            for number, batch in enumerate(next(loader.steps(facts["batch"], facts["batch"] + 1))):
                _look(batch["images"], [loader.source.ids[int(i)] for i in batch["ids"]], found)
                seed_all(plan.seed, facts["step"] - 1, rank, number)
                with autocast(plan.settings.precision, here.device):
                    loss = ready.step(model, batch)["loss"] * (len(batch["ids"]) / whole if mine else 0.0)
                (loss * scale).backward()
                found.loss += float(loss.detach())
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    found.gradients = [name for name, value in gradients.items() if not bool(value.isfinite().all())]
    found.norm = float(nn.utils.get_total_norm(gradients.values()))
    return found


def _look(images: Tensor, names: list[str], found: Findings) -> None:
    finite = images.isfinite()
    found.largest = max(found.largest, float(images.where(finite, 0.0).abs().max()))
    counts = (~finite).flatten(1).sum(1).tolist()
    found.images += [{"id": name, "not_finite": n} for name, n in zip(names, counts, strict=True) if n]


@contextmanager
def _watched(model: nn.Module, found: Findings) -> Iterator[None]:
    """Note the first module without parts of its own whose output is not finite."""

    def watch(name: str) -> Any:
        def look(_: nn.Module, inputs: Any, output: Any) -> None:
            if found.module is None and not _finite(output):
                found.module = {"name": name, "input_finite": _finite(inputs)}

        return look

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name and not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        value = tuple(value.values())
    return all(map(_finite, value)) if isinstance(value, tuple | list) else True


def _told(facts: dict[str, Any], found: Findings, bad: bool, ready: Training) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(clean(name, 80) for name in names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")

    ids = [ready.loader.source.ids[int(i)] for i in facts["ids"] if i < len(ready.loader.source)]
    lines = [
        f"step {facts['step']}: {facts['kind']} bad in training, {'and again' if bad else 'but not here'}",
        f"  loss            {found.loss:.6g} (in training {facts['loss']:.6g})",
        f"  gradient norm   {found.norm:.6g} (in training {facts['norm']:.6g})",
        f"  learning rate   {facts['lr']:.3g}, {facts['precision']}, scale {facts['scale']:g}",
        f"  images          {len(ids)}: {some(ids)}; largest pixel {found.largest:.4g} (normalised)",
        f"  images with NaN or infinity      {some([one['id'] for one in found.images]) or 'none'}",
        f"  weights with NaN or infinity     {some(found.weights) or 'none'}",
    ]
    module = found.module
    where = (
        "none" if module is None else f"{module['name']}, from {'finite' if module['input_finite'] else 'such'} input"
    )
    lines += [
        f"  first module with such an output {where}",
        f"  gradients with NaN or infinity   {some(found.gradients) or 'none'}",
    ]
    return "\n".join(lines)
