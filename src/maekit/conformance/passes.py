"""Checks of a training pass: who is masked, what is seen and computed, how the loss is formed (paper section 3).

Everything is compared with the arithmetic written out here, as the paper tells it, not with this package's own.

B batch, C channels, P patch side, N patches, K kept patches, M masked ones, D token width.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from maekit.conformance.check import Check, Finding, NotShown, Pass, Subject

RATIOS = tuple(percent / 100 for percent in range(5, 100, 5))
FORWARD = "official models_mae.py, forward_encoder"
LOSS = "official models_mae.py, forward_loss"
ROUNDING = "float32 sums of another order differ by 1e-6"


def exact_keep(num_patches: int, ratio: float) -> int:
    """Return the whole patches in N * (1 - ratio), the ratio taken as the per cent it was written as."""
    return num_patches * (100 - round(ratio * 100)) // 100


def len_keep(subject: Subject) -> Finding:
    """Count what stays at every 5 per cent."""
    ratios = [r for r in RATIOS if 0 < exact_keep(subject.num_patches, r) < subject.num_patches]
    if not hasattr(subject.adapter, "masks"):
        ratios = [0.75]
    wrong = []
    for ratio in ratios:
        mask = subject.out.mask if len(ratios) == 1 else subject.masks(1, ratio)
        kept, expected = int((~mask[0]).sum()), exact_keep(subject.num_patches, ratio)
        if kept != expected:
            wrong.append(f"{kept} of {subject.num_patches} at {ratio:g}, not {expected}")
    kept = int((~subject.out.mask[0]).sum())
    found = f"{wrong[0]}; {len(wrong)} of {len(ratios)} ratios" if wrong else f"{kept} at 0.75; right at {len(ratios)} ratios"
    return Finding(not wrong, found, "whole patches in N (1 - ratio)")


def mask_follows_noise(subject: Subject) -> Finding:
    """Rank the noise: what is low must stay, in every row by itself; True is removed."""
    out = subject.out
    kept = int((~out.mask[0]).sum())
    ranks = out.noise.argsort(dim=1).argsort(dim=1)
    right = (out.mask == (ranks >= kept)).all(1)
    if bool((out.mask == (ranks < out.mask.sum(1)[0])).all()):
        return Finding(False, "the highest stay, or True means kept", "the lowest of each row stay; True is removed")
    found = f"true of {int(right.sum())} of {len(right)} images"
    return Finding(bool(right.all()), found, "the lowest of each row stay; True is removed")


def order_of_latent(subject: Subject) -> Finding:
    """Look whether ids_keep names each kept patch once."""
    out = subject.out
    expected = [set((~row).nonzero().flatten().tolist()) for row in out.mask]
    found = [sorted(row.tolist()) for row in out.ids_keep]
    right = sum(sorted(one) == other for one, other in zip(expected, found, strict=True))
    return Finding(right == len(found), f"true of {right} of {len(found)} images", "ids_keep is what the mask keeps")


def masks_uniform(subject: Subject) -> Finding:
    """Chi-square of how often each place is removed, as a standard normal (Wilson and Hilferty)."""
    masks = subject.masks(2000)
    count, places = masks.shape
    share = masks.double().mean()
    counts = masks.double().sum(0)
    # given the number removed from each row the counts are hypergeometric: N - 1 degrees of freedom
    statistic = float(((counts - count * share) ** 2).sum() / (count * share * (1 - share)) * (places - 1) / places)
    freedom = places - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return Finding(abs(z) <= 5, f"z = {z:+.1f} over {count} masks", "|z| <= 5")


def masks_independent(subject: Subject) -> Finding:
    """Count equal masks, and how much neighbours in a batch overlap."""
    masks = subject.masks(2000)
    count, places = masks.shape
    kept = int((~masks[0]).sum())
    ties = count - len(torch.unique(masks, dim=0))
    by_chance = count * (count - 1) / 2 / math.comb(places, kept)
    overlap = float((~masks[1:] & ~masks[:-1]).double().sum(1).mean())
    expected = kept * kept / places
    spread = math.sqrt(expected * (places - kept) ** 2 / (places * max(1, places - 1)) / (count - 1))
    z = (overlap - expected) / max(spread, 1e-9)
    right = ties <= by_chance + 6 * math.sqrt(by_chance) and abs(z) <= 6
    return Finding(right, f"{ties} of {count} masks repeat; overlap z = {z:+.1f}", "none repeats; |z| <= 6")


def tokens_encoded(subject: Subject) -> Finding:
    """Count the tokens that leave the encoder."""
    found, kept = subject.out.latent.shape[1], int((~subject.out.mask[0]).sum())
    return Finding(found == kept + 1, f"{found} tokens", f"{kept + 1}: kept patches and the class token")


def _nearly(one: Tensor, other: Tensor, tolerance: float) -> tuple[bool, float]:
    off = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
    return off <= tolerance, off


def visible_only(subject: Subject) -> Finding:
    """Change every removed pixel: neither latent nor prediction may move."""
    out = subject.out
    side, patch = subject.side, subject.patch
    removed = out.mask.reshape(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    other = subject.forward(torch.where(removed, subject.images(9), out.images), out.noise)
    off = max(_nearly(other.latent, out.latent, 0)[1], _nearly(other.pred, out.pred, 0)[1])
    return Finding(off <= 1e-5, f"moved by {off:.0e}", "not moved by removed pixels")


def positions_before_masking(subject: Subject) -> Finding:
    """Give the kept patches another order of noise: each must keep the latent of its place."""
    out = subject.out
    kept = out.ids_keep.shape[1]
    noise = out.noise.clone()
    low = noise.argsort(dim=1)[:, :kept]
    noise.scatter_(1, low, noise.gather(1, low).flip(1))  # same patches, opposite order
    other = subject.forward(out.images, noise)
    if not bool((other.mask == out.mask).all()) or torch.equal(other.ids_keep, out.ids_keep):
        raise NotShown("the order of the noise does not change the order of the tokens")
    prefix = out.latent.shape[1] - kept
    one, two = (_by_place(run.latent[:, prefix:], run.ids_keep) for run in (out, other))
    right, off = _nearly(two, one, 1e-3)
    return Finding(right, f"latent of a place moves by {off:.0e}", "a position for each place, whatever its order")


def _by_place(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids.argsort(dim=1)[:, :, None].expand_as(tokens))


def _normalised(tokens: Tensor) -> str | None:
    """Say how tokens (..., D) differ from what a fresh layer norm gives: mean 0 and variance 1 over D."""
    mean = float(tokens.mean(-1).abs().max())
    variance = float((tokens.var(-1, unbiased=False) - 1).abs().max())
    return None if mean < 1e-3 and variance < 0.02 else f"mean {mean:.2f}, variance 1 {variance:+.2f}"


def encoder_norm(subject: Subject) -> Finding:
    """Look whether the latent is normalised token by token (the norm of a fresh model is 1 and 0)."""
    wrong = _normalised(subject.out.latent.detach())
    return Finding(wrong is None, wrong or "mean 0, variance 1", "mean 0, variance 1 of every token")


def decoder_norm(subject: Subject) -> Finding:
    """Look at what enters the last projection."""
    wrong = _normalised(_inputs(subject, "decoder_pred.weight")[0])
    return Finding(wrong is None, wrong or "mean 0, variance 1", "mean 0, variance 1 of every token")


def _inputs(subject: Subject, name: str) -> list[Tensor]:
    """Return what the module that holds a tensor is given in a pass."""
    seen: list[Tensor] = []
    handle = subject.owner(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        subject.forward(subject.images(), subject.noise())
    finally:
        handle.remove()
    if not seen:
        raise NotShown(f"no module is called with the weight {name}")
    return seen


def class_token_decoded(subject: Subject) -> Finding:
    """Replace the class token on its way into the decoder: predictions must move."""
    out, kept = subject.out, subject.out.ids_keep.shape[1]
    expected = "it enters the decoder and moves the predictions"
    entering = _inputs(subject, "decoder_embed.weight")[0].shape[1]
    if entering == kept:
        return Finding(False, f"{entering} tokens enter: no class token", expected)

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0].clone()
        tokens[:, 0] = 3 * torch.randn(tokens.shape[2], generator=torch.Generator().manual_seed(5))
        return (tokens, *args[1:])

    handle = subject.owner("decoder_embed.weight").register_forward_pre_hook(replace)
    try:
        other = subject.forward(out.images, out.noise)
    finally:
        handle.remove()
    off = _nearly(other.pred, out.pred, 0)[1]
    return Finding(off > 1e-4, f"predictions move by {off:.0e}", expected)


def predictions_differ(subject: Subject) -> Finding:
    """Look how far predictions of one image's removed patches lie apart."""
    spreads = []
    for pred, mask in zip(subject.out.pred.detach(), subject.out.mask, strict=True):
        removed = pred[mask]
        spreads.append(float((removed[1:] - removed[0]).abs().amax(1).min() / removed.abs().max().clamp_min(1e-12)))
    return Finding(min(spreads) > 1e-3, f"spread {min(spreads):.1e}", "more than 1e-3 of the largest")


# ------------------------------------------------------------------------------------------ how the loss is formed


class Formula(NamedTuple):
    """One way in circulation to form the loss."""

    target: str  # "unbiased" | "biased" | "plain"
    order: str  # "channel fastest" | "channel slowest"
    patches: str  # "masked" | "all" | "visible"
    reduction: str  # "mean" | "sum over values"


OFFICIAL = Formula("unbiased", "channel fastest", "masked", "mean")


def cut(images: Tensor, patch: int, order: str) -> Tensor:
    """Cut patches (B, N, P*P*C) by loops, row by row of the grid."""
    flat = []
    for top in range(0, images.shape[2], patch):
        for left in range(0, images.shape[3], patch):
            square = images[:, :, top : top + patch, left : left + patch]
            flat.append((square.permute(0, 2, 3, 1) if order == "channel fastest" else square).flatten(1))
    return torch.stack(flat, 1)


def formulas() -> Iterator[Formula]:
    """List the official formula first, then every other."""
    targets, orders = ("unbiased", "biased", "plain"), ("channel fastest", "channel slowest")
    for target in targets:
        for order in orders:
            for patches in ("masked", "all", "visible"):
                for reduction in ("mean", "sum over values"):
                    yield Formula(target, order, patches, reduction)


def loss_by(formula: Formula, out: Pass, patch: int, eps: float = 1e-6, inside: bool = True) -> float:
    """Compute the loss of a pass by a formula, in float64."""
    target = cut(out.images, patch, formula.order).double()
    if formula.target != "plain":
        variance = target.var(-1, unbiased=formula.target == "unbiased", keepdim=True)
        scale = (variance + eps).sqrt() if inside else variance.sqrt() + eps
        target = (target - target.mean(-1, keepdim=True)) / scale
    error = (out.pred.detach().double() - target).square()
    per_patch = error.mean(-1) if formula.reduction == "mean" else error.sum(-1)
    weights = {"masked": out.mask, "all": torch.ones_like(out.mask), "visible": ~out.mask}[formula.patches].double()
    return float((per_patch * weights).sum() / weights.sum())


def recognised(subject: Subject) -> Formula:
    """Return the formula that gives the subject's loss.

    Raises:
        NotShown: if none does; `loss_formula` says so.
    """
    out, patch = subject.out, subject.patch
    loss = float(out.loss)
    for formula in formulas():
        if math.isclose(loss_by(formula, out, patch), loss, rel_tol=2e-5):
            return formula
    raise NotShown("the loss is none of the known formulas (see loss-formula)")


def loss_formula(subject: Subject) -> Finding:
    """Look whether any formula gives the loss."""
    loss, expected = float(subject.out.loss), loss_by(OFFICIAL, subject.out, subject.patch)
    try:
        found = recognised(subject)
    except NotShown:
        return Finding(False, f"{loss:.6f}, by none of {len(list(formulas()))} known formulas", f"{expected:.6f}")
    words = ", ".join(part for part, official in zip(found, OFFICIAL, strict=True) if part != official)
    return Finding(True, f"{loss:.6f}" + (f" ({words})" if words else ""), "a known formula gives it")


def target_normalised(subject: Subject) -> Finding:
    """Look whether the target is normalised by default."""
    found = recognised(subject).target
    return Finding(found != "plain", "plain pixels" if found == "plain" else "normalised", "normalised by patch")


def variance_unbiased(subject: Subject) -> Finding:
    """Look which variance a target is normalised with."""
    found = recognised(subject).target
    if found == "plain":
        raise NotShown("the target is not normalised")
    return Finding(found == "unbiased", found, "unbiased")


def patch_order(subject: Subject) -> Finding:
    """Look in which order the values of a patch stand."""
    found = recognised(subject).order
    return Finding(found == "channel fastest", found, "channel fastest")


def loss_masked_only(subject: Subject) -> Finding:
    """Look which patches enter the loss."""
    found = recognised(subject)
    words = f"{found.reduction} over {found.patches} patches"
    return Finding(found[2:] == OFFICIAL[2:], words, "mean over masked patches")


EPS = (1e-6, 0.0, 1e-5, 1e-8, 1e-12)


def target_eps(subject: Subject) -> Finding:
    """Look at eps on images of so little contrast that it decides."""
    formula = recognised(subject)
    if formula.target == "plain":
        raise NotShown("the target is not normalised")
    out = subject.forward(subject.images() * 1e-3, subject.noise())
    loss = float(out.loss)
    for inside in (True, False):
        for eps in EPS:
            if math.isclose(loss_by(formula, out, subject.patch, eps, inside), loss, rel_tol=1e-3):
                found = f"{eps:g} {'inside' if inside else 'beside'} the root"
                return Finding(inside and eps == 1e-6, found, "1e-06 inside the root")
    return Finding(False, "none of those known", "1e-06 inside the root")


def gradient_masked_only(subject: Subject) -> Finding:
    """Take the gradient of the loss at the predictions: zero at visible patches, not at removed ones."""
    out = subject.out
    try:
        (gradient,) = torch.autograd.grad(out.loss, out.pred, retain_graph=True)
    except RuntimeError as error:
        raise NotShown("the loss is not computed from the pred that is returned") from error
    visible, removed = float(gradient[~out.mask].abs().max()), float(gradient[out.mask].abs().max())
    return Finding(visible == 0 < removed, f"{visible:.0e} at visible, {removed:.0e} at removed", "0 at visible patches")


# ------------------------------------------------------------------------------------------------- features, compute


def features_unmasked(subject: Subject) -> Finding:
    """Take features twice in eval mode: every patch, the same numbers."""
    subject.model.eval()
    try:
        with torch.no_grad():
            torch.manual_seed(4)
            one = subject.adapter.features(subject.model, subject.images())
            two = subject.adapter.features(subject.model, subject.images())
    finally:
        subject.model.train()
    expected = f"{subject.num_patches + 1} tokens, the same twice"
    same = one.shape == two.shape and bool(torch.equal(one, two))
    return Finding(
        one.shape[1] == subject.num_patches + 1 and same,
        f"{one.shape[1]} tokens, " + ("the same" if same else "different") + " twice",
        expected,
    )


def compute(subject: Subject) -> Finding:
    """Count multiply-adds of a forward pass; the encoder may project all patches or only those kept."""
    kept, places = int((~subject.out.mask[0]).sum()), subject.num_patches
    values = subject.patch**2 * subject.channels
    narrow = subject.tensor("decoder_embed.weight").shape[0]
    body = _block(subject.width, kept + 1) * subject.depth() + (kept + 1) * subject.width * narrow
    body += _block(narrow, places + 1) * subject.depth("decoder_blocks")
    most = body + places * values * subject.width + (places + 1) * narrow * values
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.forward(subject.images(), subject.noise())
    found = counter.get_total_flops() / 2 / subject.batch
    least = body + kept * values * subject.width + places * narrow * values
    expected = f"{least / 1e9:.4g} to {most / 1e9:.4g} GMAC"
    return Finding(least * 0.999 <= found <= most * 1.001, f"{found / 1e9:.4g} GMAC an image", expected)


def _block(dim: int, tokens: int) -> int:
    """Return multiply-adds of a Transformer block: 12 D^2 a token, and attention's 2 T D a token."""
    return tokens * 12 * dim * dim + 2 * tokens * tokens * dim


class _Waits(TorchDispatchMode):
    """Counts how often a value is fetched from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def no_waiting(subject: Subject) -> Finding:
    """Count fetches of values in a training pass."""
    with _Waits() as waits:
        torch.manual_seed(2)
        subject.adapter.forward(subject.model, subject.images(), subject.noise(), 0.75)
    return Finding(waits.count == 0, f"{waits.count} in a pass", "0")


CHECKS = (
    Check(
        "len-keep",
        "the whole patches in N (1 - ratio) are kept, without float dust",
        "official models_mae.py, random_masking; dust removed",
        ("3.2", "trap 4.1"),
        "a patch more or less than asked for: another mask ratio, and no parity with official masks",
        len_keep,
    ),
    Check(
        "mask-follows-noise",
        "in each image the patches of lowest noise stay; True means removed",
        "official models_mae.py, random_masking",
        ("3.2", "trap 4.2"),
        "masks cannot be compared with other implementations, or the loss is on the wrong patches",
        mask_follows_noise,
    ),
    Check(
        "ids-keep",
        "ids_keep names what the mask keeps, once each",
        "official models_mae.py, random_masking",
        ("3.2",),
        "tokens are put back in wrong places",
        order_of_latent,
    ),
    Check(
        "masks-uniform",
        "every place is removed equally often",
        "paper section 3, Masking: uniform, without replacement",
        ("3.2",),
        "some places are learned less; a centre bias",
        masks_uniform,
        "|z| <= 5",
        "a right sampler fails once in 2e6 draws, and the draw is seeded",
    ),
    Check(
        "masks-independent",
        "each image has a mask of its own",
        "official models_mae.py, random_masking: noise (N, L)",
        ("3.2",),
        "one mask for a batch: gradients of a step see the same places only",
        masks_independent,
        "|z| <= 6",
        "a right sampler fails once in 5e8 draws; equal masks are counted against chance",
    ),
    Check(
        "class-token-stays",
        "the class token is never masked and never counts",
        FORWARD,
        ("3.2", "trap 4.3"),
        "one patch too few is seen, or no class token is learned",
        tokens_encoded,
    ),
    Check(
        "visible-only",
        "removed pixels reach neither encoder nor prediction",
        "paper section 3, MAE encoder",
        ("3.2", "D20"),
        "the answer leaks: a low loss that teaches nothing",
        visible_only,
        "1e-5 of the largest value",
        ROUNDING,
    ),
    Check(
        "positions-before-masking",
        "a patch gets the position of its place before patches are dropped",
        FORWARD,
        ("3.2",),
        "positions tell the order of the noise and not the place",
        positions_before_masking,
        "1e-3 of the largest value",
        "attention over another order of tokens sums in another order: 1e-5 after 12 blocks",
    ),
    Check(
        "encoder-norm",
        "the encoder's output is normalised before it is projected",
        FORWARD,
        ("3.2",),
        "the decoder sees another scale; official weights give other predictions",
        encoder_norm,
        "1e-3 in the mean, .02 in the variance",
        "eps 1e-6 beside variances of 1e-3 and more",
    ),
    Check(
        "decoder-norm",
        "tokens are normalised before they are predicted from",
        "official models_mae.py, forward_decoder",
        ("3.2",),
        "official weights give other predictions",
        decoder_norm,
        "1e-3 in the mean, .02 in the variance",
        "eps 1e-6 beside variances of 1e-3 and more",
    ),
    Check(
        "class-token-decoded",
        "the class token goes through the decoder",
        "official models_mae.py, forward_decoder",
        ("3.2", "3.10", "D11", "trap 4.8"),
        "the class token gets no gradient from the loss but through attention; official decoders do not fit",
        class_token_decoded,
        "1e-4 of the largest prediction",
        "a token that is attended to moves predictions by 1e-2; rounding by 1e-6",
    ),
    Check(
        "predictions-differ",
        "predictions of one image's removed patches differ at the start",
        "paper section 3, MAE decoder: mask tokens with positions",
        ("D1", "D2", "D11"),
        "the decoder has no position information: it predicts one patch for all places",
        predictions_differ,
        "1e-3 of the largest prediction",
        "with positions of scale .7 the spread is .1 and more; without it is 0",
        trained=True,
    ),
    Check(
        "loss-formula",
        "the loss is the mean squared error between prediction and a known target",
        LOSS,
        ("3.3",),
        "the loss is something else: its value says nothing beside others'",
        loss_formula,
        "2e-5 of the loss",
        ROUNDING + "; biased and unbiased variance differ by 1e-3 and more",
    ),
    Check(
        "target-normalised",
        "the default target is each patch normalised by itself",
        "paper table 1(d) and section 4: the main results; official recipes' --norm_pix_loss",
        ("3.3", "D3", "D7"),
        "about half a point of fine-tuned accuracy (paper table 1(d))",
        target_normalised,
    ),
    Check(
        "variance-unbiased",
        "a patch is normalised with the unbiased variance",
        LOSS,
        ("3.3", "3.10", "trap 4.5"),
        "targets 1/(2n) too large: losses differ in the third digit",
        variance_unbiased,
    ),
    Check(
        "target-eps",
        "1e-6 is added to the variance, inside the root",
        LOSS,
        ("3.3", "trap 4.5"),
        "flat patches have other targets: noise in a sky is blown up, or lost",
        target_eps,
        "1e-3 of the loss",
        "the formulas compared differ by tens of per cent on these images",
    ),
    Check(
        "patch-order",
        "inside a patch the channel runs fastest, patches run row by row",
        "official models_mae.py, patchify",
        ("3.1", "3.10", "D11", "trap 4.4"),
        "official decoders predict permuted pixels",
        patch_order,
    ),
    Check(
        "loss-masked-only",
        "the loss is the mean over removed patches of the batch",
        "paper section 3, Reconstruction target; " + LOSS,
        ("3.3", "trap 4.10"),
        "on all patches about half a point of accuracy is lost (paper section 3, footnote)",
        loss_masked_only,
    ),
    Check(
        "gradient-masked-only",
        "the loss has no gradient at predictions of visible patches",
        "paper section 3, Reconstruction target",
        ("3.3",),
        "the decoder is trained to copy what it sees",
        gradient_masked_only,
    ),
    Check(
        "features-unmasked",
        "features are of all patches and do not change from call to call",
        "official models_vit.py, forward_features",
        ("D3", "D10"),
        "a quarter of the image, drawn at random, is called its features",
        features_unmasked,
    ),
    Check(
        "visible-only-compute",
        "the encoder computes with visible patches only",
        "paper section 3, MAE encoder",
        ("3.1",),
        "3 times the encoder's cost and more (paper table 1(c))",
        compute,
        "1e-3",
        "counted, not timed; the range leaves open whether removed patches are projected, the class token predicted",
    ),
    Check(
        "no-waiting",
        "a training pass fetches no value from the device",
        "-",
        ("D12", "D16"),
        "the host waits for the GPU in every step, and torch.compile breaks the graph",
        no_waiting,
    ),
)
"""In the order of the table."""
