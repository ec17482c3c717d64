"""Evaluation: the view, pixel by pixel, and the linear probe (official util/datasets.py, main_linprobe.py)."""

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor

from maekit.conformance.check import Answer, Check, Subject


def _pictures() -> list[Image.Image]:
    """Draw pictures of several shapes, smooth enough to be pictures and sharp enough to tell filters apart."""
    drawn = []
    for width, height in ((500, 375), (333, 500), (224, 224), (256, 300)):
        y, x = np.mgrid[0:height, 0:width]
        waves = [127 + 120 * np.sin(x / (3 + c) + y / 17) * np.cos(y / (5 + c)) for c in range(3)]
        edges = ((x // 23 + y // 31) % 2)[..., None] * 40.0
        drawn.append(Image.fromarray(np.clip(np.stack(waves, -1) + edges - 20, 0, 255).astype("uint8")))
    return drawn


def view(subject: Subject) -> Answer:
    """Compare with torchvision's Resize(256, bicubic) and CenterCrop(224) on Pillow images."""
    look, largest, mean = subject.part("eval_view"), 0.0, 0.0
    for picture in _pictures():
        expected = pil_to_tensor(CenterCrop(224)(Resize(256, InterpolationMode.BICUBIC)(picture))).double()
        found: Tensor = look(picture).double()
        if found.shape != expected.shape:
            return Answer(False, f"shape {tuple(found.shape)}", f"{tuple(expected.shape)}")
        off = (found - expected).abs()
        largest, mean = max(largest, float(off.max())), max(mean, float(off.mean()))
    return Answer(largest <= 1, f"up to {largest:.0f} of 255 off, {mean:.2g} on average", "at most 1 of 255 off")


def probe_head(subject: Subject) -> Answer:
    """Look at the head of linear probing."""
    parts = [part for part in subject.part("probe_head")(192, 10).modules() if not list(part.children())]
    norms = [part for part in parts if isinstance(part, nn.BatchNorm1d)]
    expected = "BatchNorm1d(affine=False, eps=1e-6), Linear N(0, .01)"
    if not norms:
        return Answer(False, "no batch norm", expected)
    layer = next(part for part in parts if isinstance(part, nn.Linear))
    std = float(layer.weight.detach().std())
    right = not norms[0].affine and norms[0].eps == 1e-6 and abs(std / 0.01 - 1) < 0.15
    found = f"BatchNorm1d(affine={norms[0].affine}, eps={norms[0].eps:g}), Linear of deviation {std:.2g}"
    return Answer(right, found, expected)


def probe_decay(subject: Subject) -> Answer:
    """Look at the optimizer of linear probing."""
    optimizer = subject.part("probe_optimizer")(subject.part("probe_head")(192, 10))
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    momentum = {group.get("momentum") for group in optimizer.param_groups}
    name = type(optimizer).__name__
    found = f"{name}, weight decay {sorted(decays)}, momentum {sorted(momentum)}"
    return Answer(
        name.upper() == "LARS" and decays == {0.0} and momentum == {0.9}, found, "LARS, no decay, momentum .9"
    )


def saved_names(subject: Subject) -> Answer:
    """Compare the names that saving writes with those of the files it exchanges."""
    written, published = subject.part("saved_names")(subject.model)
    other = sorted(written - published)
    found = f"{len(other)} of {len(written)} otherwise, the first {other[0]}" if other else f"all {len(written)}"
    found += f"; {len(published - written)} missing" if published - written else ""
    return Answer(written == published, found, "the published files' names")


CHECKS = (
    Check("eval-view", "evaluation resizes the shorter side to 256, bicubic, and crops 224",
          "official util/datasets.py L53-65", ("3.5 crop", "3.10 eval resize"), "1 of 255",
          "Pillow rounds twice (after rows, after columns), tensors once",
          "scores are not comparable: some tenths of a per cent", view),
    Check("probe-head", "batch norm without affine part stands before the linear layer",
          "official main_linprobe.py L218-222", ("3.6 head", "3.10 probe", "trap 4.11"), "15 % of the deviation",
          "a deviation of two thousand drawn values", "features of other scale than the learning rate is made for",
          probe_head),
    Check("probe-optimizer", "the probe is trained by LARS without weight decay", "official main_linprobe.py, lars.py",
          ("3.6 optimiser", "3.10 probe", "trap 4.11"), "exact", "constants", "not the paper's protocol", probe_decay),
    Check("saved-names", "saved weights have the names of the published files", "the libraries' own files",
          ("D23", "3.9 keys"), "exact", "a list",
          "the decoder of a saved model is silently drawn anew by readers of the published names", saved_names),
)  # fmt: skip
