"""Principal components of patches: few numbers that say most of a patch (arXiv 2111.06377 section 4.1, target "PCA").

The covariance is added up in float64 over parts of any size, so the number of patches is bounded by time alone. Signs
follow scikit-learn: the entry of largest magnitude of each component is positive.

K components, V = P*P*C values of a patch, normalised pixels in the layout of `maekit.model.patches.patchify`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maekit.errors import MaekitError

NOTHING = 1e-10
"""Variance, as a share of the first component's, below which a direction of float32 pixels is rounding alone."""


class PatchPCA(nn.Module):
    """Coefficients of patches and back; nothing in it is trained.

    Attributes:
        mean: (V,).
        components: (K, V), orthonormal rows, by falling variance.
        variance: (K,) of the coefficients (n - 1).
        spec: JSON-able arguments: ``PatchPCA(**pca.spec)`` has the same shapes.
    """

    mean: Tensor
    components: Tensor
    variance: Tensor

    def __init__(self, components: int, values: int, patch: int, channels: int) -> None:
        super().__init__()
        if values != patch * patch * channels or not 1 <= components <= values:
            raise MaekitError(
                "E-CONFIG-PCA",
                "components of patches",
                found=f"{components} of {values} values",
                expected=f"1 to {patch * patch * channels}: patches of {patch} x {patch} pixels, {channels} channels",
            )
        self.spec: dict[str, Any] = {
            "components": components, "values": values, "patch": patch, "channels": channels,
        }  # fmt: skip
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.eye(components, values))
        self.register_buffer("variance", torch.ones(components))

    def encode(self, patches: Tensor) -> Tensor:
        """Return coefficients (..., K) of patches (..., V), in float32 whatever runs around it."""
        with torch.autocast(patches.device.type, enabled=False):
            return (patches.float() - self.mean) @ self.components.T

    def decode(self, coefs: Tensor) -> Tensor:
        """Return the patches (..., V) that coefficients (..., K) stand for; what they leave out is the mean's."""
        with torch.autocast(coefs.device.type, enabled=False):
            return coefs.float() @ self.components + self.mean


class Fitted(NamedTuple):
    """A PCA and how much it explains.

    Attributes:
        ratio: (V,) share of the whole variance that each direction has, falling, also of those left out; float64.
        patches: how many it was fitted on.
    """

    pca: PatchPCA
    ratio: Tensor
    patches: int


class Moments:
    """Mean and scatter matrix of rows that come in parts, in float64.

    Parts are merged around their own means (Chan, Golub, LeVeque 1979), so a mean far from 0 loses no digits.
    """

    def __init__(self, values: int) -> None:
        self.count = 0
        self.mean = torch.zeros(values, dtype=torch.float64)
        self.scatter = torch.zeros(values, values, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take rows (n, V) in, n > 0."""
        rows = rows.double()
        mean = rows.mean(0)
        rows = rows - mean
        shift, total = mean - self.mean, self.count + len(rows)
        self.scatter.addmm_(rows.T, rows)
        self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total


def fit_pca(parts: Iterable[Tensor], components: int, *, patch: int, channels: int) -> Fitted:
    """Fit a PCA on patches that come in parts (n, V).

    Raises:
        MaekitError: E-CONFIG-PCA for more components than values or than patches, E-DATA-PCA for more than there are
            directions in which the patches differ (grey pictures of three equal channels).
    """
    pca = PatchPCA(components, patch * patch * channels, patch, channels)
    found = Moments(patch * patch * channels)
    for part in parts:
        found.add(part)
    if found.count <= components:
        raise MaekitError(
            "E-CONFIG-PCA",
            "components of patches",
            found=f"{components} from {found.count} patches",
            expected="more patches than components",
            hint="more --patches, or fewer --components",
        )
    variance, directions = torch.linalg.eigh(found.scatter / (found.count - 1))
    variance, directions = variance.flip(0).clamp_min(0), directions.T.flip(0)
    there = int((variance > NOTHING * variance[0]).sum())
    if there < components:
        raise MaekitError(
            "E-DATA-PCA",
            "components of patches",
            found=f"{components}, of patches that differ in {there} directions",
            expected=f"at most {there}",
            hint=f"--components {there}" if there else "other images: these are all the same",
        )
    largest = directions.abs().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    pca.mean.copy_(found.mean)
    pca.components.copy_(directions[:components])
    pca.variance.copy_(variance[:components])
    return Fitted(pca, variance / variance.sum(), found.count)
