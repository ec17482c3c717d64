"""Golden numbers: what the method gives for a small input, frozen in tests/golden.

Integers, orders and masks are compared exactly; real numbers, computed in float64, within RTOL of their tensor's norm,
because processors add up in different orders. No input or weight comes from a random generator, so the model's numbers
do not hang on torch's version. The data's do, on purpose: a release that draws otherwise cuts other crops and
masks, and a run that is resumed under it is another run.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maekit.data import augment
from maekit.data.augment import PretrainView, resized_crop
from maekit.data.loader import Loader
from maekit.data.source import DatasetSource
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.masking import len_keep, random_masking
from maekit.model.patches import patchify, sincos_2d
from maekit.model.targets import PIXELS
from maekit.seeds import mix

GOLDEN = Path(__file__).parent / "golden"
RENEW = os.environ.get("MAEKIT_GOLDEN") == "renew"
"""Set by `make golden`."""
RTOL = 1e-9
"""Of the norm of the tensor that a number belongs to. Measured between one and two threads, and float64 is good for
1e-16 an operation: 1e-12 would do. A changed epsilon, order or scale moves far more."""

Numbers = dict[str, Any]


# ------------------------------------------------------------------------------------- input without a generator


def spread(count: int, start: int = 0) -> Tensor:
    """Return numbers within -.5 to .5 that repeat nowhere: a counter times 2^32 / golden ratio, modulo 2^32. Exact."""
    counter = torch.arange(start, start + count)
    return (counter * 2654435761 % 2**32).double() / 2**32 - 0.5


@torch.no_grad()
def fill(model: MaskedAutoencoder) -> None:
    """Give every parameter numbers of its own, the norms around 1; the position tables stay as they are built."""
    start = 1
    for name, value in sorted(model.named_parameters()):
        if name.endswith("pos_embed"):
            continue
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.copy_(around + 0.5 * spread(value.numel(), start).view_as(value))
        start += value.numel()


def model_and_input(target: str) -> tuple[MaskedAutoencoder, Tensor, Tensor]:
    """Return a model of 3 x 4 patches of 4 pixels, two images and their noise, all float64."""
    model = create_model(
        "vit_tiny_patch16_224",
        img_size=(12, 16),
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_dim=8,
        decoder_depth=1,
        decoder_heads=2,
        target=target,
    ).double()
    fill(model)
    images = (torch.arange(2 * 3 * 12 * 16) ** 2 % 257).double().view(2, 3, 12, 16) / 128 - 1
    return model, images, noise(2, 12)


def noise(rows: int, patches: int) -> Tensor:
    return (torch.arange(rows * patches) * 7919 % 10007).double().view(rows, patches) / 10007


# ---------------------------------------------------------------------------------------------- what is frozen


def digest(values: Tensor) -> str:
    """Return the SHA-256 of integers as little-endian int64."""
    return hashlib.sha256(values.long().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def some(values: Tensor, count: int = 3) -> Numbers:
    """Return a tensor's norm and a few of its numbers, evenly spaced."""
    flat = values.detach().double().flatten()
    places = torch.linspace(0, len(flat) - 1, min(count, len(flat))).long()
    return {"norm": flat.norm().item(), "values": flat[places].tolist()}


def orders() -> Numbers:
    """Return the order inside patches, how many patches stay, and which."""
    counted = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    large = torch.arange(2 * 3 * 224 * 224).view(2, 3, 224, 224)
    frozen: Numbers = {
        "patches of 2 x 4 x 6, patch 2": patchify(counted, 2)[0].tolist(),
        "patches of 224 px, patch 16: sha256": digest(patchify(large, 16)),
        "patches of 224 px, patch 14: sha256": digest(patchify(large, 14)),
        "kept": {
            f"{count} patches, {ratio}": len_keep(count, ratio)
            for count in (49, 100, 196, 256, 400, 784)
            for ratio in (0.4, 0.5, 0.6, 0.75, 0.8, 0.9, 0.95)
        },
    }
    ties = (noise(2, 12) * 3).floor()
    for name, drawn, keep in (("12 patches", noise(2, 12), 3), ("12 patches, equal noise", ties, 3)):
        found = random_masking(drawn, keep)
        frozen[name] = {
            "ids_shuffle": found.ids_shuffle.tolist(),
            "ids_keep": found.ids_keep.tolist(),
            "ids_restore": found.ids_restore.tolist(),
            "mask": found.mask.long().tolist(),
        }
    found = random_masking(noise(50, 196), 49)
    frozen["50 rows of 196 patches"] = {
        f"{part}: sha256": digest(getattr(found, part)) for part in ("ids_shuffle", "ids_keep", "ids_restore", "mask")
    }
    return frozen


def passes(target: str) -> Numbers:
    """Return what a pass forward and backward gives at ratio .75, and features without a mask."""
    model, images, drawn = model_and_input(target)
    out = model(images, 0.75, noise=drawn)
    out.loss.backward()
    frozen: Numbers = {
        "mask": out.mask.long().tolist(),
        "loss": some(out.loss),
        "latent": some(out.latent, 6),
        "pred": some(out.pred, 6),
    }
    frozen |= {f"features, {pool}": some(model.features(images, pool), 6) for pool in ("tokens", "cls", "mean")}
    gradients = {name: value.grad for name, value in sorted(model.named_parameters()) if value.grad is not None}
    return frozen | {"gradients": {name: some(value) for name, value in gradients.items()}}


def numbers_of_the_model() -> Numbers:
    grids = ((3, 4), (14, 14), (16, 16))
    return {
        "orders": orders(),
        "positions": {f"{rows} x {columns}": some(sincos_2d(64, (rows, columns), 1), 8) for rows, columns in grids},
        **{target: passes(target) for target in PIXELS},
    }


def samples(seed: int, steps: tuple[int, ...]) -> Iterator[tuple[str, Numbers]]:
    """Yield crop box, mirror and noise of the images of some steps, as the loader hands them out."""
    ramp = torch.arange(80, dtype=torch.uint8).expand(3, 60, 80)
    source = DatasetSource([ramp] * 20)
    boxes: list[list[int]] = []

    def cut(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
        boxes.append([*box])
        return resized_crop(image, box, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "resized_crop", cut)  # to see the box that the view cuts out
        loader = Loader(source, PretrainView((16, 16)), batch_size=8, micro_batch=8, mean=(0.5,) * 3, std=(0.5,) * 3,
                        seed=seed, num_noise=6)  # fmt: skip
        for step, parts in zip(steps, (loader.steps(step, step + 1) for step in steps), strict=True):
            batch = next(next(parts))
            for index, image, drawn in zip(batch["ids"].tolist(), batch["images"], batch["noise"], strict=True):
                yield (
                    f"step {step}, image {index}",
                    {
                        "top, left, height, width": boxes.pop(0),
                        "mirrored": bool(image[0, 0, 0] > image[0, 0, -1]),
                        "noise * 2^24": (drawn.double() * 2**24).long().tolist(),
                    },
                )


def numbers_of_the_data() -> Numbers:
    """Return seeds, orders and samples: integers, so exact."""
    source = DatasetSource([torch.zeros(3, 4, 4, dtype=torch.uint8)] * 20)
    view = PretrainView((4, 4))

    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(source, view, batch_size=8, micro_batch=8, mean=(0.5,) * 3, std=(0.5,) * 3, seed=seed)
        return loader.order(epoch).tolist()

    keys = ((0,), (0, 0), (0, 1), (1, 0), (7, 3, 12), (2**63, -1))
    return {
        "mix": {", ".join(map(str, key)): mix(*key) for key in keys},
        "order of 20 images": {f"seed {seed}, epoch {e}": order(seed, e) for seed, e in ((0, 0), (0, 1), (1, 0))},
        "seed 0": dict(samples(0, (0, 3))),
        "seed 1": dict(samples(1, (0,))),
    }


# ------------------------------------------------------------------------------------------------- comparison


def moved(before: Any, now: Any, place: str = "", scale: float = 0.0) -> list[str]:
    """Return a line for each number that is another."""
    if isinstance(before, dict) and isinstance(now, dict):
        scale = before.get("norm", scale)
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in (
                moved(before[key], now[key], f"{place} / {key}", scale)
                if key in before and key in now
                else [f"{place} / {key}: {'new' if key in now else 'gone'}"]
            )
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for i, (one, other) in pairs for line in moved(one, other, f"{place}[{i}]", scale)]
    if isinstance(before, float) and isinstance(now, float):
        same = abs(now - before) <= RTOL * scale
        off = f" (off by {abs(now - before) / scale:.1e} of the norm, allowed {RTOL:.0e})" if scale else ""
    else:
        same, off = before == now and type(before) is type(now), ""
    return [] if same else [f"{place}: {before} -> {now}{off}"]


def written(numbers: Numbers) -> str:
    """Return JSON with every list of numbers on one line."""
    text = json.dumps(numbers, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


FROZEN: dict[str, Callable[[], Numbers]] = {"model": numbers_of_the_model, "data": numbers_of_the_data}


@pytest.mark.parametrize("name", FROZEN)
def test_no_golden_number_moves_unnoticed(name: str) -> None:
    file, now = GOLDEN / f"{name}.json", json.loads(json.dumps(FROZEN[name]()))
    if RENEW:
        file.write_text(written(now), encoding="utf-8")
    lines = moved(json.loads(file.read_text(encoding="utf-8")), now, file.name)
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    last = "A change that moves one of them says why it must. If it does: make golden"
    assert not lines, "\n".join(["", *lines[:20], *more, last])


def test_the_golden_test_names_each_number_that_moved_and_lets_rounding_pass() -> None:
    before = {"loss": {"norm": 2.0, "values": [2.0]}, "mask": [[0, 1]], "old": 1, "sha256": "ab"}
    now = {"loss": {"norm": 2.0 + 1e-10, "values": [2.0 + 1e-6]}, "mask": [[1, 1]], "new": 1, "sha256": "cd"}
    assert moved(before, now, "x.json") == [
        "x.json / loss / values[0]: 2.0 -> 2.000001 (off by 5.0e-07 of the norm, allowed 1e-09)",
        "x.json / mask[0][0]: 0 -> 1",
        "x.json / old: gone",
        "x.json / sha256: ab -> cd",
        "x.json / new: new",
    ]
    assert moved(before, {**before, "loss": {"norm": float("nan"), "values": [2.0]}}, "x.json")


def test_golden_input_repeats_nowhere() -> None:
    assert len(spread(100_000).unique()) == 100_000
    for rows, patches in ((2, 12), (50, 196)):
        assert len(noise(rows, patches).unique()) == rows * patches
