"""What a check is: plain data and a function that looks at a subject and says what it found.

Nothing here knows the method; the checks are in `weights`, `passes` and `recipe`.

B batch, C channels, P patch side, N patches, K kept patches, D token width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from maekit.conformance.adapter import Adapter, Recipe
from maekit.errors import clean

Status = Literal["ok", "deviates", "not shown", "crashed"]


class NotShown(Exception):
    """The subject has no such part, so that nothing can be said; the text is the reason."""


class Finding(NamedTuple):
    """What a check saw: whether it is as it should be, in words what was found and what was expected."""

    ok: bool
    found: str
    expected: str


@dataclass(frozen=True)
class Check:
    """One fact of the method.

    Attributes:
        name: one word with hyphens, as in the table.
        title: one line.
        source: where the paper or the official code says so.
        rows: labels in docs/conformance.md: "D1", "3.1", "trap 4.5".
        consequence: what it costs when it deviates.
        run: looks.
        tolerance: how far off still counts as equal.
        why: the reason for this tolerance.
        trained: also holds for trained weights, not only for fresh ones.
    """

    name: str
    title: str
    source: str
    rows: tuple[str, ...]
    consequence: str
    run: "Callable[[Subject], Finding]"
    tolerance: str = "none"
    why: str = "a count, a flag or a copy: nothing is computed that could round"
    trained: bool = False


class Row(NamedTuple):
    """A check as it came out."""

    check: Check
    status: Status
    found: str
    expected: str


class Pass(NamedTuple):
    """One training pass: what it was given and what came out, the mask as bool with True = removed."""

    images: Tensor
    noise: Tensor
    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_keep: Tensor
    latent: Tensor


class Subject:
    """One implementation under audit; models and passes are made once and shared by the checks.

    Args:
        adapter: how it is asked.
        batch: images of a pass.
    """

    def __init__(self, adapter: Adapter, batch: int = 2) -> None:
        self.adapter, self.batch = adapter, batch

    @cached_property
    def model(self) -> nn.Module:
        """The audited model, in train mode as in pre-training."""
        torch.manual_seed(0)
        return self.adapter.build(0).train()

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Live tensors under official names."""
        return self.adapter.tensors(self.model)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, detached.

        Raises:
            NotShown: if the model has none of that name.
        """
        if name not in self.tensors:
            raise NotShown(f"the adapter names no {name}")
        return self.tensors[name].detach()

    def owner(self, name: str) -> nn.Module:
        """Return the module that holds a tensor.

        Raises:
            NotShown: if none does, as for a projection that was put together from several.
        """
        wanted = self.tensors.get(name)
        for module in self.model.modules():
            if any(own is wanted for own in module.parameters(recurse=False)):
                return module
        raise NotShown(f"no module holds {name} as one parameter")

    @property
    def optional(self) -> Recipe:
        """The adapter's optional methods."""
        return _Optional(self.adapter)  # pyright: ignore[reportReturnType]

    def depth(self, prefix: str = "blocks") -> int:
        """Return the number of blocks, "blocks" of the encoder or "decoder_blocks"."""
        numbers = {int(name.split(".")[1]) for name in self.tensors if name.startswith(f"{prefix}.")}
        return len(numbers)

    @property
    def width(self) -> int:
        """D."""
        return self.tensor("patch_embed.proj.weight").shape[0]

    @property
    def channels(self) -> int:
        """C."""
        return self.tensor("patch_embed.proj.weight").shape[1]

    @property
    def patch(self) -> int:
        """P."""
        return self.tensor("patch_embed.proj.weight").shape[2]

    @property
    def side(self) -> int:
        """Rows, and columns, of the grid."""
        rows = self.tensor("pos_embed").shape[1]
        side = math.isqrt(rows)
        if rows not in (side * side, side * side + 1):
            raise NotShown(f"{rows} positions are no square grid with at most a class token")
        return side

    @property
    def num_patches(self) -> int:
        """N."""
        return self.side * self.side

    def images(self, seed: int = 0) -> Tensor:
        """Return images (B, C, H, W) whose patches differ in mean and contrast, and whose channels differ too."""
        generator = torch.Generator().manual_seed(seed)
        side, patch, channels = self.side, self.patch, self.channels

        def coarse(low: float, high: float) -> Tensor:
            values = torch.rand(self.batch, channels, side, side, generator=generator) * (high - low) + low
            return values.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

        size = (self.batch, channels, side * patch, side * patch)
        return torch.randn(size, generator=generator) * coarse(0.2, 1.5) + coarse(-1.5, 1.5)

    def noise(self, seed: int = 1) -> Tensor:
        """Return noise (B, N)."""
        return torch.rand(self.batch, self.num_patches, generator=torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float = 0.75) -> Pass:
        """Run a training pass, always from the same state of torch's generators."""
        torch.manual_seed(2)
        out = self.adapter.forward(self.model, images, noise, mask_ratio)
        mask = out["mask"].bool()
        if "ids_keep" in out:
            ids_keep = out["ids_keep"]
        else:
            ids_keep = out["ids_restore"].argsort(dim=1)[:, : int((~mask).sum(1)[0])]
        return Pass(images, noise, out["loss"], out["pred"], mask, ids_keep, out["latent"])

    @cached_property
    def out(self) -> Pass:
        """The pass that most checks look at: 75 % removed."""
        return self.forward(self.images(), self.noise())

    def masks(self, number: int, mask_ratio: float = 0.75) -> Tensor:
        """Return masks (M, N) as training draws them: `number` by the adapter's ``masks``, else 32 from passes."""
        torch.manual_seed(3)
        if hasattr(self.adapter, "masks"):
            return self.optional.masks(self.model, number, mask_ratio).bool()
        rows: list[Tensor] = []
        with torch.no_grad():
            while sum(map(len, rows)) < 32:
                images = self.images().repeat(4, 1, 1, 1)
                noise = torch.rand(len(images), self.num_patches)
                rows.append(self.adapter.forward(self.model, images, noise, mask_ratio)["mask"].bool())
        return torch.cat(rows)

    @cached_property
    def published(self) -> Mapping[str, nn.Module]:
        """The paper's models on the meta device."""
        return self.optional.published()


class _Optional:
    """Hands out the methods that an adapter has, and says which one it lacks."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.adapter, name, None)
        if method is None:
            raise NotShown(f"the adapter has no {name}()")
        return method


def audit(adapter: Adapter, checks: Sequence[Check], batch: int = 2) -> list[Row]:
    """Put an implementation to the checks; a check that fails to run is told as such, never as ok.

    The global generators of torch are left as they were.
    """
    subject = Subject(adapter, batch)
    with torch.random.fork_rng(devices=[]):
        return [_run(check, subject) for check in checks]


def _run(check: Check, subject: Subject) -> Row:
    try:
        ok, found, expected = check.run(subject)
        return Row(check, "ok" if ok else "deviates", found, expected)
    except NotShown as reason:
        return Row(check, "not shown", str(reason), "")
    except Exception as error:  # whatever a foreign model does is a finding, not an end
        return Row(check, "crashed", clean(f"{type(error).__name__}: {error}", 160), "a check that runs")
