"""A check is plain data and a function; a subject is what it looks at; an audit runs checks on a subject."""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maekit.conformance.adapter import Adapter, NotShown, Pass, read_pass
from maekit.conformance.paper import depth
from maekit.errors import clean

log = logging.getLogger("maekit")

OK, DEVIATES, NOT_SHOWN, CRASHED = "ok", "deviates", "not shown", "crashed"


class Answer(NamedTuple):
    """What a check saw."""

    ok: bool
    found: str
    expected: str


@dataclass(frozen=True)
class Check:
    """One question to an implementation.

    Attributes:
        name: for ``--only`` and docs/conformance.md.
        title: what is asked, one line.
        source: where the rule stands: paper section or official file.
        rows: the labels of docs/conformance.md that it answers: D1, 3.1 cost, trap 4.5.
        tolerance: how near is right.
        reason: why not nearer.
        consequence: what happens to those who deviate.
        look: gives an `Answer`, or raises `NotShown`.
        fresh: asks about freshly drawn weights; left out for trained ones.
    """

    name: str
    title: str
    source: str
    rows: tuple[str, ...]
    tolerance: str
    reason: str
    consequence: str
    look: "Callable[[Subject], Answer]"
    fresh: bool = False


@dataclass(frozen=True)
class Finding:
    """A check's outcome: status is ok, deviates, not shown or crashed."""

    check: Check
    status: str
    found: str
    expected: str = ""


class Shape(NamedTuple):
    """Geometry, read off the tensors; 0 for what is not there. `paper.macs` takes the first seven."""

    width: int
    depth: int
    decoder_width: int
    decoder_depth: int
    num_patches: int
    values: int
    prefix: int
    channels: int
    patch: int
    grid: tuple[int, int]


class Subject:
    """An implementation under audit: its model and passes, each made once."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter: Any = adapter
        self.trained = bool(getattr(adapter, "trained", False))
        self._once: dict[Callable[..., Any], Any] = {}

    def once(self, look: "Callable[[Subject], Any]") -> Any:
        """Return what a function says of this subject, asked once however many checks need it."""
        if look not in self._once:
            self._once[look] = look(self)
        return self._once[look]

    def part(self, method: str) -> Any:
        """Return an optional method of the adapter.

        Raises:
            NotShown: if it has none.
        """
        found = getattr(self.adapter, method, None)
        if found is None:
            raise NotShown(f"the adapter has no {method}")
        return found

    @cached_property
    def model(self) -> nn.Module:
        """The model of seed 0, in eval mode."""
        return self.adapter.build(0).eval()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors under the authors' names."""
        return dict(self.adapter.tensors(self.model))

    @cached_property
    def precise(self) -> nn.Module:
        """A copy in float64: rounding is then far below every deviation of interest."""
        return copy.deepcopy(self.model).double()

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The tensors of `precise`."""
        return {name: value.detach() for name, value in self.adapter.tensors(self.precise).items()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by the authors' name.

        Raises:
            NotShown: if the model has none of that name.
        """
        if self.tensors.get(name) is None:
            raise NotShown(f"the model has no {name}")
        return self.tensors[name]

    @cached_property
    def shape(self) -> Shape:
        """Its geometry."""
        width, channels, patch, _ = self.tensor("patch_embed.proj.weight").shape
        prefix = int("cls_token" in self.tensors)
        num = self.tensor("pos_embed").shape[1] - prefix
        grid = getattr(self.adapter, "grid", None) or (math.isqrt(num), math.isqrt(num))
        embed = self.tensors.get("decoder_embed.weight")
        deep, decoder_deep = (depth(self.tensors, name) for name in ("blocks", "decoder_blocks"))
        decoder = (0 if embed is None else embed.shape[0], decoder_deep)
        return Shape(width, deep, *decoder, num, patch * patch * channels, prefix, channels, patch, grid)

    def images(self, batch: int = 2, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw images whose patches range from nearly constant to strong contrast, so that every epsilon shows."""
        shape, generator = self.shape, torch.Generator().manual_seed(7)
        rows, columns = shape.grid
        size = (batch, shape.channels, rows * shape.patch, columns * shape.patch)
        contrast = 10.0 ** torch.empty(batch, 1, rows, columns).uniform_(-4, 0.3, generator=generator)
        contrast = contrast.repeat_interleave(shape.patch, 2).repeat_interleave(shape.patch, 3)
        return (torch.randn(size, generator=generator) * contrast + 0.3).to(dtype)

    def noise(self, batch: int = 2, seed: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw the noise of masks."""
        return torch.rand(batch, self.shape.num_patches, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def run(self, model: nn.Module, images: Tensor, noise: Tensor | None, mask_ratio: float = 0.75) -> Pass:
        """Run the model; with noise the generators are seeded too, for models that cannot be told."""
        if noise is not None:
            torch.manual_seed(int(noise.sum() * 1e6))
        return read_pass(self.adapter.forward(model, images, noise, mask_ratio))

    @cached_property
    def shot(self) -> Pass:
        """One pass in float64 over `images`, with gradients."""
        return self.run(self.precise, self.images(), self.noise())

    def kept(self) -> Tensor:
        """Return ids_keep of `shot`.

        Raises:
            NotShown: if the adapter tells neither ids_keep nor ids_restore.
        """
        if self.shot.ids_keep is None:
            raise NotShown("the adapter's forward gives no ids_keep or ids_restore")
        return self.shot.ids_keep

    def latent(self) -> Tensor:
        """Return the latent of `shot`, as the decoder was given it.

        Raises:
            NotShown: if the adapter does not tell it.
        """
        if self.shot.latent is None:
            raise NotShown("the adapter's forward gives no latent")
        return self.shot.latent

    def heads(self, *, decoder: bool) -> list[int]:
        """Return the numbers of heads to try: the adapter's, or every divisor, the usual ones first."""
        told = getattr(self.adapter, "heads", None)
        if told:
            return [told[int(decoder)]]
        width, usual = (self.shape.decoder_width, 16) if decoder else (self.shape.width, self.shape.width // 64)
        divisors = [n for n in range(1, width + 1) if width % n == 0 and width // n >= 4]
        return sorted(divisors, key=lambda n: abs(n - usual))


def audit(adapter: Adapter, checks: Iterable[Check]) -> list[Finding]:
    """Run checks on an implementation; what a check raises is a finding and ends nothing.

    torch's generator is left as it was.
    """
    subject = Subject(adapter)
    with torch.random.fork_rng(devices=[]):
        return [look(check, subject) for check in checks]


def look(check: Check, subject: Subject) -> Finding:
    """Run one check."""
    if check.fresh and subject.trained:
        return Finding(check, NOT_SHOWN, "the weights are trained; this is about fresh ones")
    log.debug("check %s", check.name)
    try:
        answer = check.look(subject)
    except NotShown as reason:
        return Finding(check, NOT_SHOWN, clean(reason, 300))
    except Exception as error:  # whatever a foreign model does is a finding about it
        log.debug("check %s", check.name, exc_info=True)
        return Finding(check, CRASHED, clean(f"{type(error).__name__}: {error}", 300))
    return Finding(check, OK if answer.ok else DEVIATES, answer.found, answer.expected)
