"""Which patches are removed (paper section 3, "Masking"; official models_mae.py, random_masking)."""

import math

import torch
from torch import Tensor

from maekit.conformance import paper
from maekit.conformance.adapter import NotShown
from maekit.conformance.check import Answer, Check, Subject

SOURCE = "paper section 3, Masking; official models_mae.py L125-148"
RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)


def _counts(subject: Subject) -> dict[float, int]:
    """Return how many patches stay at each ratio."""
    images, found = subject.images(1, dtype=torch.float32), {}
    with torch.no_grad():
        for ratio in RATIOS:
            noise = subject.noise(1, dtype=torch.float32)
            found[ratio] = int((~subject.run(subject.model, images, noise, ratio).mask[0]).sum())
    return found


def _dusty(num: int, ratio: float) -> bool:
    return int(num * (1 - ratio)) != paper.num_keep(num, ratio)


def count(subject: Subject) -> Answer:
    """Count the patches that stay, at ratios where float dust plays no part."""
    num, found = subject.shape.num_patches, subject.once(_counts)
    wrong = {r: k for r, k in found.items() if k != paper.num_keep(num, r) and not _dusty(num, r)}
    if not wrong:
        return Answer(True, f"{found[0.75]} of {num} at .75, and {len(found) - 1} other ratios", "int(N (1 - r))")
    ratio, kept = next(iter(wrong.items()))
    return Answer(False, f"{kept} of {num} stay at {ratio}", f"{paper.num_keep(num, ratio)}: int(N (1 - r))")


def dust(subject: Subject) -> Answer:
    """Count them where ``N * (1 - r)`` is a whole number that floats miss."""
    num, found = subject.shape.num_patches, subject.once(_counts)
    dusty = {ratio: kept for ratio, kept in found.items() if _dusty(num, ratio)}
    if not dusty:
        raise NotShown(f"a grid of {num} patches has no such ratio among {', '.join(map(str, RATIOS))}")
    wrong = {ratio: kept for ratio, kept in dusty.items() if kept != paper.num_keep(num, ratio)}
    ratio, kept = next(iter((wrong or dusty).items()))
    return Answer(not wrong, f"{kept} of {num} stay at {ratio}", f"{paper.num_keep(num, ratio)}")


def _drawn(subject: Subject) -> tuple[Tensor, Tensor]:
    """Return kept patches (S, 2, N) bool of S passes over two images, the model drawing its own masks."""
    torch.manual_seed(5)
    num = subject.shape.num_patches
    passes = max(100, min(400, 20_000 // num))
    images = subject.images(2, dtype=torch.float32)
    with torch.no_grad():
        kept = [~subject.run(subject.model, images, None).mask for _ in range(passes)]
    both = torch.stack(kept)
    return both[:, 0].double(), both[:, 1].double()


def uniform(subject: Subject) -> Answer:
    """Test by chi-square that every place is kept equally often; the first image of each pass counts."""
    first, _ = subject.once(_drawn)
    passes, num = first.shape
    share = float(first.mean())
    if not 0 < share < 1:
        raise NotShown("the model draws no masks of its own")
    spread = (first.sum(0) - passes * share).square().sum() / (passes * share * (1 - share)) * (num - 1) / num
    chance = float(torch.special.gammaincc(torch.tensor((num - 1) / 2).double(), spread / 2))
    found = f"chi-square {float(spread):.0f} for {num - 1} degrees, p {chance:.1g} ({passes} masks)"
    return Answer(chance > 1e-9, found, "p above 1e-9")


def independent(subject: Subject) -> Answer:
    """Compare the masks of two images of a batch, and those of a pass with the next one's."""
    first, second = subject.once(_drawn)
    num, kept = first.shape[1], float(first[0].sum())
    error = math.sqrt(kept**2 * (num - kept) ** 2 / (num**2 * max(1, num - 1)) / len(first))
    pairs = {"images of a batch": (first, second), "passes": (first[:-1], first[1:])}
    for what, (one, other) in pairs.items():
        shared, same = float((one * other).sum(1).mean()), int((one == other).all(1).sum())
        expected = float((one.mean(0) * other.mean(0)).sum())  # so that unequal places are not blamed here
        if same > len(one) // 20 or abs(shared - expected) > 6 * error:
            found = f"two {what} share {shared:.1f} kept patches; the same mask in {same} of {len(one)} pairs"
            return Answer(False, found, f"{expected:.1f} on average, as by chance")
    expected = kept**2 / num
    return Answer(True, f"two images share {float((first * second).sum(1).mean()):.1f} kept patches",
                  f"{expected:.1f} on average, as by chance")  # fmt: skip


def lowest_noise(subject: Subject) -> Answer:
    """Look whether the patches of lowest noise stay, and whether ids_restore is the inverse permutation."""
    noise, shot = subject.noise(), subject.shot
    order, keep = noise.argsort(1), int((~shot.mask[0]).sum())
    expected = torch.ones_like(noise, dtype=torch.bool).scatter(1, order[:, :keep], False)
    right = torch.equal(shot.mask, expected)
    if not right and not _follows_noise(subject):
        raise NotShown("the mask does not follow the noise handed in; only the model's own draws were looked at")
    if shot.ids_restore is not None and not torch.equal(shot.ids_restore, order.argsort(1)):
        return Answer(False, "ids_restore is not argsort(argsort(noise))", "argsort(argsort(noise))")
    return Answer(right, "the lowest stay, in order of noise" if right else "others", "the lowest stay")


@torch.no_grad()
def _follows_noise(subject: Subject) -> bool:
    """Say whether the noise alone decides the mask, whatever state torch's generators are in."""
    masks = []
    for seed in (21, 22):
        torch.manual_seed(seed)
        given = subject.adapter.forward(subject.precise, subject.images(), subject.noise(), 0.75)
        masks.append(given["mask"].bool())
    return torch.equal(*masks)


def class_token_apart(subject: Subject) -> Answer:
    """Count the encoder's tokens: class token besides K patches."""
    prefix = subject.shape.prefix
    expected = prefix + int((~subject.shot.mask[0]).sum())
    found = subject.latent().shape[1]
    return Answer(found == expected, f"{found} tokens", f"{expected}: {prefix} + kept patches")


COUNTED = "exact"
CHECKS = (
    Check("mask-count", "int(N (1 - r)) patches stay", SOURCE, ("3.2 len_keep", "3.10 len_keep"), COUNTED, "a count",
          "one patch more or fewer than the paper's at some ratios", count),
    Check("mask-count-dust", "no patch is lost to float dust", "arithmetic: 100 * (1 - .9) = 9.999...", ("trap 4.1",),
          COUNTED, "a count", "100 patches at .9 keep 9, 400 at .8 keep 79", dust),
    Check("mask-uniform", "every place is removed equally often", SOURCE, ("3.2 noise", "3.2 mask"),
          "chi-square p > 1e-9", "a true p is uniform: below 1e-9 once in 1e9 audits",
          "some places are learned less than others", uniform),
    Check("mask-independent", "each image, and each pass, draws its own mask", SOURCE, ("3.2 noise",),
          "6 standard errors of the overlap", "two random masks share K^2/N patches on average",
          "a batch with one mask is one sample of masks: noisier gradients", independent),
    Check("mask-noise", "patches of lowest noise stay; ids_restore undoes the shuffle", SOURCE,
          ("3.2 noise", "3.2 mask", "trap 4.2"), COUNTED, "an order",
          "masks cannot be compared with other implementations", lowest_noise),
    Check("mask-class-token", "the class token never counts as a patch", SOURCE, ("trap 4.3",), COUNTED, "a count",
          "one patch fewer is seen, or the class token is dropped", class_token_apart),
)  # fmt: skip
