"""Encoder, decoder and loss against the paper's arithmetic, and what may not depend on what.

Each stage is compared with `paper` given the model's own input to it, so a fault in one stage is not blamed on the
next. Where the method's arithmetic does not give the model's numbers, the known other ways are tried: a check names
the one that does.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maekit.conformance import paper
from maekit.conformance.adapter import NotShown
from maekit.conformance.check import Answer, Check, Subject

ENCODER = "official models_mae.py L147-170; paper section 3, MAE encoder"
DECODER = "official models_mae.py L172-196; paper section 3, MAE decoder"
LOSS = "official models_mae.py L198-213; paper section 3, Reconstruction target"
NEAR = 1e-9
"""Relative to the largest value; float64 rounding of two blocks is 1e-14, of twelve 1e-13."""
Ways = dict[str, tuple[Any, ...]]


class Match:
    """The way of computing that gives the model's numbers, or none, and how far the method's own is off."""

    def __init__(self, way: dict[str, Any] | None, off: float, why: str = "") -> None:
        self.way, self.off, self.why = way, off, why


def _ways(options: Ways) -> Iterator[dict[str, Any]]:
    """Yield every combination, the method's (the first of each) first."""
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def _match(options: Ways, compute: Callable[..., Tensor], found: Tensor) -> Match:
    first: float | None = None
    scale = float(found.detach().abs().max()) or 1.0
    for way in _ways(options):
        other = compute(**way)
        off = float((other - found.detach()).abs().max()) / scale if other.shape == found.shape else float("inf")
        first = off if first is None or off < first else first
        if off < NEAR:
            return Match(way, off)
    return Match(None, first or 0.0)


def _epsilons(subject: Subject) -> tuple[float, ...]:
    """Return the epsilons to try: those of the model's norms first (a check of its own judges them)."""
    own = {part.eps for part in subject.model.modules() if isinstance(part, nn.LayerNorm)}
    return tuple(dict.fromkeys([*sorted(own), 1e-6, 1e-5, 1e-12]))


@torch.no_grad()
def _encoder(subject: Subject) -> Match:
    options: Ways = {
        "norm": (True, False),
        "positions": ("before masking", "after masking", "never"),
        "eps": _epsilons(subject),
        "heads": tuple(subject.heads(decoder=False)),
    }
    return _match(
        options,
        lambda **way: paper.encode(subject.exact, subject.images(), subject.kept(), **way),
        subject.latent(),
    )


@torch.no_grad()
def _decoder(subject: Subject) -> Match:
    for name in ("decoder_embed.weight", "decoder_pos_embed", "mask_token", "decoder_pred.weight"):
        subject.tensor(name)
    width = subject.shape.decoder_width
    wrong = [name for name in ("mask_token", "decoder_pos_embed") if subject.tensors[name].shape[-1] != width]
    if wrong:
        found = ", ".join(f"{name} of width {subject.tensors[name].shape[-1]}" for name in wrong)
        return Match(None, float("inf"), f"another layout: {found} in a decoder of width {width}")
    options: Ways = {
        "class_token": (True, False),
        "norm": (True, False),
        "positions": (True, False),
        "eps": _epsilons(subject),
        "heads": tuple(subject.heads(decoder=True)),
    }
    return _match(
        options,
        lambda **way: paper.decode(subject.exact, subject.latent().detach(), subject.kept(), **way),
        subject.shot.pred,
    )


@torch.no_grad()
def _loss(subject: Subject) -> Match:
    options: Ways = {
        "over": ("masked", "all", "visible"),
        "target": ("normalised", "plain pixels"),
        "variance": ("unbiased", "biased"),
        "eps": ("1e-6 inside the root", "1e-6 outside the root", "1e-5 inside the root", "1e-12 inside the root",
                "0 inside the root"),
        "order": ("channel fastest", "channel slowest"),
    }  # fmt: skip
    shot = subject.shot
    return _match(options, lambda **way: paper.loss(subject.images(), shot.pred, shot.mask, **way), shot.loss)


def _whole(match: Match, what: str) -> Answer:
    if match.way is None:
        return Answer(False, match.why or f"none of the known ways; up to {match.off:.1g} off", f"{what}, within 1e-9")
    return Answer(True, f"a known way, {match.off:.0e} off", f"{what}, within 1e-9")


def _aspect(match: Match, what: str, name: str, wanted: Any, words: dict[Any, str]) -> Answer:
    if match.way is None:
        raise NotShown(f"the {what} is computed in none of the known ways")
    found = match.way[name]
    return Answer(found == wanted, words.get(found, str(found)), words.get(wanted, str(wanted)))


def encoder(subject: Subject) -> Answer:
    """Compare the latent with the paper's."""
    return _whole(subject.once(_encoder), "patches, positions, masking, class token, blocks, norm")


def positions_before_masking(subject: Subject) -> Answer:
    """Ask when positions are added."""
    if not bool(subject.tensor("pos_embed").any()):
        raise NotShown("the positions are all zero")
    return _aspect(subject.once(_encoder), "latent", "positions", "before masking",
                   {"never": "no positions", "after masking": "after masking: by rank, not by place"})  # fmt: skip


def encoder_norm(subject: Subject) -> Answer:
    """Ask whether the decoder is given normalised tokens."""
    return _aspect(subject.once(_encoder), "latent", "norm", True, {True: "final norm", False: "no final norm"})


def decoder(subject: Subject) -> Answer:
    """Compare the prediction with the paper's, from the model's own latent."""
    return _whole(subject.once(_decoder), "projection, mask tokens, places, positions, blocks, norm, prediction")


def class_token_in_decoder(subject: Subject) -> Answer:
    """Ask whether the class token takes part in the decoder: does any prediction depend on it?"""
    if not subject.shape.prefix:
        raise NotShown("the model has no class token")
    latent, shot = subject.latent(), subject.shot
    words = {True: "goes through the decoder", False: "dropped before the decoder"}
    if latent.requires_grad and shot.pred.requires_grad:
        gradient = torch.autograd.grad(shot.pred.square().sum(), latent, retain_graph=True, allow_unused=True)[0]
        if gradient is not None:
            enters = bool(gradient[:, : subject.shape.prefix].any())
            return Answer(enters, words[enters], words[True])
    return _aspect(subject.once(_decoder), "prediction", "class_token", True, words)


def decoder_norm(subject: Subject) -> Answer:
    """Ask whether the prediction is made from normalised tokens."""
    return _aspect(
        subject.once(_decoder), "prediction", "norm", True, {True: "norm, then prediction", False: "no norm"}
    )


def decoder_positions(subject: Subject) -> Answer:
    """Ask whether positions are added in the decoder."""
    if not bool(subject.tensor("decoder_pos_embed").any()):
        raise NotShown("the decoder's positions are all zero")
    return _aspect(
        subject.once(_decoder), "prediction", "positions", True, {True: "added to all tokens", False: "not added"}
    )


def predictions_differ(subject: Subject) -> Answer:
    """Measure how far the predictions of an image's removed patches lie apart."""
    if subject.trained:
        subject.tensor("mask_token")  # a file without decoder has no predictions of its own
    pred, mask = subject.shot.pred.detach(), subject.shot.mask
    removed = [row[chosen] for row, chosen in zip(pred, mask, strict=True)]
    scale = max(float(row.abs().max()) for row in removed) or 1.0
    spread = min(float((row - row[:1]).abs().max()) for row in removed) / scale
    return Answer(spread > 1e-4, f"spread {spread:.3g} of the largest value", "above 1e-4")


def removed_pixels_unseen(subject: Subject) -> Answer:
    """Change all removed pixels; no prediction may move."""
    side, (rows, columns), mask = subject.shape.patch, subject.shape.grid, subject.shot.mask
    hidden = mask.reshape(len(mask), 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)
    images = torch.where(hidden, -5.0, subject.images())
    with torch.no_grad():
        other = subject.run(subject.precise, images, subject.noise())
    if not torch.equal(other.mask, mask):
        raise NotShown("the mask cannot be repeated")
    moved = float((other.pred - subject.shot.pred.detach()).abs().max())
    return Answer(moved < 1e-12, f"predictions move by {moved:.2g}", "0")


def loss(subject: Subject) -> Answer:
    """Compare the loss with the paper's, from the model's own prediction."""
    return _whole(subject.once(_loss), "mean squared error over removed patches")


def patch_order(subject: Subject) -> Answer:
    """Ask in which order a patch's values are predicted."""
    return _aspect(subject.once(_loss), "loss", "order", "channel fastest", {})


def normalised(subject: Subject) -> Answer:
    """Ask whether the target is normalised patch by patch."""
    return _aspect(
        subject.once(_loss), "loss", "target", "normalised", {"normalised": "each patch by its own mean, variance"}
    )


def variance(subject: Subject) -> Answer:
    """Ask which variance normalises the target."""
    _only_normalised(subject)
    return _aspect(subject.once(_loss), "loss", "variance", "unbiased", {})


def variance_eps(subject: Subject) -> Answer:
    """Ask which epsilon stands where."""
    _only_normalised(subject)
    return _aspect(subject.once(_loss), "loss", "eps", "1e-6 inside the root", {})


def _only_normalised(subject: Subject) -> None:
    way = subject.once(_loss).way
    if way is not None and way["target"] != "normalised":
        raise NotShown("the target is not normalised")


def masked_only(subject: Subject) -> Answer:
    """Differentiate the loss by the prediction: zero at visible patches, not at removed ones."""
    shot = subject.shot
    if shot.loss.requires_grad and shot.pred.requires_grad:
        gradient = torch.autograd.grad(shot.loss, shot.pred, retain_graph=True, allow_unused=True)[0]
        if gradient is not None:
            moving = gradient.abs().sum(-1) > 0
            visible, removed = int((moving & ~shot.mask).sum()), int((moving & shot.mask).sum())
            right = not visible and removed == int(shot.mask.sum())
            found = f"{removed} of {int(shot.mask.sum())} removed, {visible} visible patches"
            return Answer(right, f"gradient at {found}", "at every removed and no visible patch")
    return _aspect(subject.once(_loss), "loss", "over", "masked", {})


def features(subject: Subject) -> Answer:
    """Compare features of whole images with the paper's encoder on all patches."""
    images, prefix = subject.images(1), subject.shape.prefix
    with torch.no_grad():
        found = subject.adapter.features(subject.precise, images)
    expected = prefix + subject.shape.num_patches
    if found.shape[1] != expected:
        return Answer(False, f"{found.shape[1]} tokens: features are of a masked image", f"{expected} tokens")
    all_ids = torch.arange(subject.shape.num_patches)[None]
    options: Ways = {"eps": _epsilons(subject), "heads": tuple(subject.heads(decoder=False))}
    with torch.no_grad():
        match = _match(options, lambda **way: paper.encode(subject.exact, images, all_ids, **way), found)
    words = f"{expected} tokens in image order, "
    off = f"{match.off:.0e} off" if match.way else f"up to {match.off:.1g} off"
    return Answer(match.way is not None, words + off,
                  f"{expected} tokens of the whole image")  # fmt: skip


def finite(subject: Subject) -> Answer:
    """Look for NaN and infinity."""
    wrong = [name for name, value in subject.tensors.items() if not bool(value.isfinite().all())]
    return Answer(not wrong, f"not finite: {', '.join(wrong[:3])}" if wrong else "all finite", "finite numbers")


EXACT = "1e-9 of the largest value, in float64"
ROUNDING = "two orders of summation differ by 1e-14 in float64; every known deviation is above 1e-7"
CHECKS = (
    Check("finite", "all weights are finite", "reliability", (), "exact", "a fact", "every output is NaN", finite),
    Check("encoder", "the latent is the paper's", ENCODER, ("3.1 blocks", "3.2 encoder", "trap 4.8"), EXACT, ROUNDING,
          "the authors' weights give other features", encoder),
    Check("positions-before-masking", "a patch's position is that of its place", ENCODER, ("3.2 encoder",), EXACT,
          ROUNDING, "patches lose their places when others are removed", positions_before_masking),
    Check("encoder-norm", "the decoder is given normalised tokens", ENCODER, ("3.2 encoder",), EXACT, ROUNDING,
          "the authors' decoder weights do not fit", encoder_norm),
    Check("decoder", "the prediction is the paper's", DECODER, ("D11", "3.2 decoder", "trap 4.8"), EXACT, ROUNDING,
          "the authors' decoder cannot be loaded or gives other pictures", decoder),
    Check("class-token-in-decoder", "the class token goes through the decoder", DECODER,
          ("D11", "3.2 decoder", "3.10 class token in decoder", "trap 4.8"), "exact", "a dependence is there or not",
          "the class token learns nothing in pre-training: class-token features are untrained", class_token_in_decoder),
    Check("decoder-norm", "a norm stands before the prediction", DECODER, ("3.2 decoder",), EXACT, ROUNDING,
          "the authors' decoder weights do not fit", decoder_norm),
    Check("decoder-positions", "the decoder adds positions to all tokens", DECODER, ("D1", "3.2 decoder", "trap 4.8"),
          EXACT, ROUNDING, "mask tokens do not know which patch they stand for", decoder_positions),
    Check("predictions-differ", "removed patches of an image are predicted differently", DECODER, ("D1", "D2"),
          "spread above 1e-4 of the largest value", "a sound fresh model has 0.1 to 1; without positions below 1e-12",
          "one prediction for all removed patches of an image: places cannot be learned", predictions_differ),
    Check("removed-pixels-unseen", "removed pixels reach no prediction", ENCODER, ("3.2 encoder", "D20"), "1e-12",
          "the same sums; batched kernels may round otherwise", "the answer leaks: the task is solved by copying",
          removed_pixels_unseen),
    Check("loss", "the loss is the paper's", LOSS, ("3.3 loss", "trap 4.10"), EXACT, ROUNDING,
          "losses cannot be compared", loss),
    Check("patch-order", "inside a patch the channel runs fastest", "official models_mae.py L95-107",
          ("D11", "3.1 patchify", "3.10 patch order", "trap 4.4"), EXACT, ROUNDING,
          "the authors' prediction layer gives scrambled colours", patch_order),
    Check("target-normalised", "the target is each patch normalised", LOSS, ("D3", "D7", "3.3 target"), EXACT, ROUNDING,
          "0.5 % lower fine-tuning accuracy (ViT-L: 84.9 against 85.4)", normalised),
    Check("target-variance", "the target's variance is the unbiased one", LOSS,
          ("3.3 target", "3.10 variance", "trap 4.5"), EXACT, ROUNDING, "the loss is off by 1/(P*P*C)", variance),
    Check("target-eps", "1e-6 is added to the variance, inside the root", LOSS, ("3.3 target", "trap 4.5"), EXACT,
          ROUNDING, "flat patches (sky, borders) weigh otherwise", variance_eps),
    Check("loss-masked-only", "only removed patches are scored", LOSS, ("3.3 loss",), "exact", "zero or not",
          "about 0.5 % lower accuracy (paper, footnote on the loss on all pixels)", masked_only),
    Check("features-unmasked", "features are of the whole image, never masked", "official models_vit.py",
          ("D3", "D10"), EXACT, ROUNDING, "users get features of a random quarter of the image", features),
)  # fmt: skip
