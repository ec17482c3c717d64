"""Corruption errors: what a table of error rates by kind and severity comes to (Hendrycks and Dietterich, 1903.12261).

With E the top-1 error rate, c a kind, s a severity and R a reference (AlexNet in the paper):

    CE_c          = sum_s E(c, s) / sum_s R(c, s)
    relative CE_c = sum_s (E(c, s) - E_clean) / sum_s (R(c, s) - R_clean)
    mCE           = mean of CE_c over the 15 standard kinds

The four extra kinds were made to tune on and never enter a mean of the standard ones. All values are fractions; the
paper prints per cents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Errors = Mapping[tuple[str, int], float]
"""Top-1 error rate by (kind, severity)."""

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""Kinds in the order of the paper's table 1; "extra" are those of its appendix."""
STANDARD = tuple(kind for group, kinds in GROUPS.items() if group != "extra" for kind in kinds)
EXTRA = GROUPS["extra"]
KINDS = STANDARD + EXTRA
SEVERITIES = (1, 2, 3, 4, 5)

ALEXNET_CLEAN = 0.435
"""Top-1 error of AlexNet on ImageNet's validation images, as printed (1903.12261, table 1)."""
_ALEXNET = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
ALEXNET: Errors = {
    (kind, severity): error for kind, errors in _ALEXNET.items() for severity, error in enumerate(errors, 1)
}
"""Top-1 errors of AlexNet on ImageNet-C as published with it; their means over severity are the paper's (1903.12261,
table 1: 88.6 for Gaussian noise, ...). There are none for the extra kinds."""


@dataclass(frozen=True)
class Corruption:
    """What one kind, or a mean of several, comes to.

    Attributes:
        error: mean error rate over the severities.
        ce: over the reference's; None without a reference.
        relative: growth of the error over the reference's growth; None without clean errors.
    """

    error: float
    ce: float | None = None
    relative: float | None = None


def corruption_errors(
    errors: Errors,
    clean: float | None = None,
    reference: Errors | None = None,
    reference_clean: float | None = None,
) -> dict[str, Corruption]:
    """Return what each kind comes to, over the severities that `errors` holds of it.

    Args:
        errors: of the model.
        clean: its error rate on the images as they are.
        reference: of what it is measured against; a kind of which it lacks a severity has no CE.
        reference_clean: as `clean`; without both there is no relative error.
    """
    return {kind: _one(kind, errors, clean, reference or {}, reference_clean) for kind in _kinds(errors)}


def _kinds(errors: Errors) -> list[str]:
    """Return the kinds in the order of `KINDS`, unknown ones at the end."""
    found = dict.fromkeys(kind for kind, _ in errors)
    return [kind for kind in KINDS if kind in found] + [kind for kind in found if kind not in KINDS]


def _one(
    kind: str, errors: Errors, clean: float | None, reference: Errors, reference_clean: float | None
) -> Corruption:
    cells = [cell for cell in errors if cell[0] == kind]
    mine = sum(errors[cell] for cell in cells)
    if any(cell not in reference for cell in cells):
        return Corruption(mine / len(cells))
    theirs = sum(reference[cell] for cell in cells)
    relative = None
    if clean is not None and reference_clean is not None:
        relative = _ratio(mine - len(cells) * clean, theirs - len(cells) * reference_clean)
    return Corruption(mine / len(cells), _ratio(mine, theirs), relative)


def _ratio(mine: float, theirs: float) -> float | None:
    """Return a quotient, None over a reference that makes no errors (or none more than on clean images)."""
    return mine / theirs if theirs > 0 else None


def mean_corruption(found: Mapping[str, Corruption], kinds: Sequence[str] = STANDARD) -> Corruption | None:
    """Return the mean over `kinds`: its `ce` is the mCE, its `relative` the relative mCE.

    None unless every kind is there: a mean over some of them is no mCE. A mean of CEs is None if one of them is.
    """
    if not kinds or any(kind not in found for kind in kinds):
        return None
    chosen = [found[kind] for kind in kinds]
    error = sum(one.error for one in chosen) / len(chosen)
    return Corruption(error, _mean([one.ce for one in chosen]), _mean([one.relative for one in chosen]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
