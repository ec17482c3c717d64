"""In what a model departs from the paper's default row: masks, what is scored, tokens, positions, decoder.

One frozen record holds every such choice, so that what fits together is decided in one place: a combination works or
is refused here, with the reason. `PAPER` is the default row of arXiv 2111.06377; a model of it says nothing of this in
its ``spec``, so its files are those of before.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from maekit.errors import MaekitError

MaskKind = Literal["random", "block", "grid", "centre", "given", "none"]
LossOn = Literal["masked", "all", "visible"]
Positions = Literal["sincos", "learned"]
DecoderKind = Literal["self", "cross"]
CHOICES = {"mask_kind": MaskKind, "loss_on": LossOn, "positions": Positions, "decoder_kind": DecoderKind}


@dataclass(frozen=True)
class Variant:
    """Departures from the paper's default row.

    Attributes:
        mask_kind: "random" | "block" (rectangles, as BEiT draws them, arXiv 2106.08254) | "grid" (a regular pattern) |
            "centre" (one rectangle, in the manner of context encoders, arXiv 1604.07379) | "given" (by the caller) |
            "none": nothing is removed (denoising).
        mask_unit: side, in patches, of the squares that are removed or kept whole (long_seq_mae; Pixio's 4).
        loss_on: patches whose error counts: "masked" | "all" (paper section 3, footnote) | "visible".
        add_noise: deviation of the Gaussian noise on what the encoder sees, in units of normalised pixels.
        encoder_mask_token: the encoder runs on all places, removed ones filled with a mask token of its own; the
            decoder has none then (paper table 1c).
        class_tokens: 0 | 1 | n; None: as many as the encoder's name has. From the second on they are timm's register
            tokens; the first is the one that is pooled.
        positions: "sincos", fixed | "learned", from N(0, .02).
        decoder_kind: "self": attends to all places | "cross": mask tokens attend to the visible latent and not to one
            another (CrossMAE, arXiv 2401.14391, without its mixing of the encoder's blocks).
        decode_ratio: share of all patches that the decoder predicts in training; None: all that are removed.
    """

    mask_kind: MaskKind = "random"
    mask_unit: int = 1
    loss_on: LossOn = "masked"
    add_noise: float = 0.0
    encoder_mask_token: bool = False
    class_tokens: int | None = None
    positions: Positions = "sincos"
    decoder_kind: DecoderKind = "self"
    decode_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, kind in CHOICES.items():
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise MaekitError(
                    f"E-CONFIG-{name.split('_', maxsplit=1)[0].upper()}", f"setting {name}", found=getattr(self, name),
                    expected=" | ".join(known),
                )  # fmt: skip
        _number("mask_unit", self.mask_unit, int, 1, 1024)
        _number("add_noise", self.add_noise, (int, float), 0, 1e6)
        _number("encoder_mask_token", self.encoder_mask_token, bool, 0, 1)
        if self.class_tokens is not None:
            _number("class_tokens", self.class_tokens, int, 0, 1024)
        if self.decode_ratio is not None:
            _number("decode_ratio", self.decode_ratio, float, 1e-9, 1)
        for wrong, found, expected, hint in self._contradictions():
            if wrong:
                raise MaekitError("E-CONFIG-VARIANT", found, expected=expected, hint=hint)

    def _contradictions(self) -> list[tuple[bool, str, str, str]]:
        none, masked = self.mask_kind == "none", self.loss_on == "masked"
        return [
            (
                none and self.loss_on != "all",
                f"mask_kind none with loss_on {self.loss_on}",
                "loss_on all: where nothing is removed, every patch is seen",
                "--loss-on all",
            ),
            (
                none and self.add_noise == 0,
                "mask_kind none with add_noise 0",
                "something to undo: a model that is shown what it shall predict learns to copy",
                "--add-noise 0.5",
            ),
            (
                none and self.encoder_mask_token,
                "encoder_mask_token with mask_kind none",
                "patches that are removed, for the mask token to stand for",
                "leave encoder_mask_token out",
            ),
            (
                none and self.mask_unit != 1,
                f"mask_unit {self.mask_unit} with mask_kind none",
                "mask_unit 1: nothing is removed",
                "--mask-unit 1",
            ),
            (
                self.full_length and self.decoder_kind == "cross",
                f"decoder_kind cross with {'mask_kind none' if none else 'encoder_mask_token'}",
                "decoder_kind self: mask tokens that ask the visible latent are the decoder's",
                "--decoder-kind self",
            ),
            (
                self.decode_ratio is not None and (not masked or self.full_length),
                "decode_ratio "
                + (f"with loss_on {self.loss_on}" if not masked else "for an encoder that runs on all places"),
                "loss_on masked and mask tokens in the decoder: a part of the removed patches is decoded",
                "leave decode_ratio out",
            ),
        ]

    @property
    def full_length(self) -> bool:
        """Whether the encoder's output has a token for every place, in image order."""
        return self.encoder_mask_token or self.mask_kind == "none"

    def departures(self) -> dict[str, Any]:
        """Return what is not as in `PAPER`, JSON-able."""
        return {name: value for name, value in asdict(self).items() if value != getattr(PAPER, name)}

    @classmethod
    def of(cls, values: "Mapping[str, Any] | Variant | None") -> "Variant":
        """Return the variant that a ``spec`` names.

        Raises:
            MaekitError: E-CONFIG-VARIANT for a name that is none, E-CONFIG-* for values that cannot be.
        """
        if isinstance(values, Variant):
            return values
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values or {} if name not in known]
        if unknown:
            raise MaekitError("E-CONFIG-VARIANT", "variant", found=unknown[0], expected=", ".join(known))
        return cls(**(values or {}))


def _number(name: str, value: Any, kind: Any, low: float, high: float) -> None:
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind) or not low <= value <= high:
        number = "whole number" if kind is int else "number"
        expected = "true or false" if kind is bool else f"a {number} from {low:g} to {high:g}"
        raise MaekitError(f"E-CONFIG-{name.split('_')[0].upper()}", f"setting {name}", found=value, expected=expected)


PAPER = Variant()
"""The default row."""
