"""Patch PCA: scikit-learn's numbers, whatever parts the patches come in, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from maekit.data.image import read_image
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.model.patches import patchify
from maekit.model.pca import Fitted, PatchPCA, fit_pca


@pytest.fixture(scope="module")
def patches() -> torch.Tensor:
    """3,200 patches of 7 x 7 pixels of clothes, normalised, (n, 49)."""
    source = open_source("builtin:fashion", "train")
    images = torch.stack([read_image(bytes(source.read(i)), channels=1) for i in range(200)])  # type: ignore[arg-type]
    return patchify((images.float() / 255 - 0.286) / 0.353, 7).flatten(0, 1)


def fitted(patches: torch.Tensor, components: int = 12, parts: int = 500) -> Fitted:
    return fit_pca(patches.split(parts), components, patch=7, channels=1)


def test_components_coefficients_and_shares_are_those_of_scikit_learn(patches: torch.Tensor) -> None:
    found = fitted(patches)
    theirs = PCA(12, svd_solver="full").fit(patches.double().numpy())
    for mine, oracle in (
        (found.pca.mean, theirs.mean_),
        (found.pca.components, theirs.components_),
        (found.pca.variance, theirs.explained_variance_),
        (found.ratio[:12], theirs.explained_variance_ratio_),
    ):
        torch.testing.assert_close(mine.double(), torch.from_numpy(np.asarray(oracle)), rtol=1e-5, atol=1e-6)
    coefs = theirs.transform(patches.double().numpy())
    torch.testing.assert_close(found.pca.encode(patches).double(), torch.from_numpy(coefs), rtol=1e-4, atol=1e-5)
    back = torch.from_numpy(theirs.inverse_transform(coefs))
    torch.testing.assert_close(found.pca.decode(found.pca.encode(patches)).double(), back, rtol=1e-4, atol=1e-5)
    assert found.patches == len(patches) and float(found.ratio.sum()) == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3200))
def test_the_parts_change_nothing(patches: torch.Tensor, size: int) -> None:
    whole, parted = fitted(patches[:400], 5, 400), fitted(patches[:400], 5, min(size, 400))
    torch.testing.assert_close(parted.pca.components, whole.pca.components)
    torch.testing.assert_close(parted.pca.variance, whole.pca.variance)


def test_a_mean_far_from_zero_loses_no_digits(patches: torch.Tensor) -> None:
    near, far = fitted(patches.double()), fitted(patches.double() + 1e6)
    torch.testing.assert_close(far.pca.variance, near.pca.variance, rtol=1e-4, atol=0)


def test_all_components_give_the_patch_back_and_fewer_are_the_nearest_of_their_number(patches: torch.Tensor) -> None:
    pca = fit_pca([patches], 49, patch=7, channels=1).pca
    torch.testing.assert_close(pca.decode(pca.encode(patches)), patches, rtol=1e-4, atol=1e-4)
    for kept in (1, 5, 20):
        part = fitted(patches, kept)
        error = (part.pca.decode(part.pca.encode(patches)) - patches).square().sum(1).mean()
        left_out = float(part.ratio[kept:].sum() / part.ratio[:kept].sum() * part.pca.variance.double().sum())
        assert float(error) == pytest.approx(left_out, rel=1e-3)


def test_coefficients_are_float32_inside_autocast_and_keep_leading_dimensions(patches: torch.Tensor) -> None:
    pca = fitted(patches).pca
    with torch.autocast("cpu", torch.bfloat16):
        coefs = pca.encode(patches[:32].view(2, 16, 49))
    assert coefs.dtype == torch.float32 and coefs.shape == (2, 16, 12)
    torch.testing.assert_close(coefs.flatten(0, 1), pca.encode(patches[:32]))


def test_the_spec_builds_the_same_shapes(patches: torch.Tensor) -> None:
    pca = fitted(patches).pca
    again = PatchPCA(**pca.spec)
    again.load_state_dict(pca.state_dict())
    assert torch.equal(again.encode(patches), pca.encode(patches))


@pytest.mark.parametrize(
    ("rows", "components", "code", "told"),
    [
        (100, 50, "E-CONFIG-PCA", "50 of 49 values"),
        (100, 0, "E-CONFIG-PCA", "0 of 49 values"),
        (12, 12, "E-CONFIG-PCA", "12 from 12 patches"),
        (5, 20, "E-CONFIG-PCA", "20 from 5 patches"),
    ],
)
def test_more_components_than_values_or_patches_are_refused(
    patches: torch.Tensor, rows: int, components: int, code: str, told: str
) -> None:
    with pytest.raises(MaekitError, match=told) as caught:
        fitted(patches[:rows], components)
    assert caught.value.code == code


def test_grey_pictures_as_three_channels_allow_a_third_of_the_components(patches: torch.Tensor) -> None:
    rows = patches.repeat_interleave(3, dim=1)  # channel fastest
    assert fit_pca([rows], 49, patch=7, channels=3).pca.components.shape == (49, 147)
    with pytest.raises(MaekitError, match=r"differ in 49 directions.*--components 49") as caught:
        fit_pca([rows], 50, patch=7, channels=3)
    assert caught.value.code == "E-DATA-PCA"
    with pytest.raises(MaekitError, match="all the same"):
        fit_pca([torch.zeros(100, 147)], 1, patch=7, channels=3)
