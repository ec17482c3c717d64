"""Changes of shape, each asked for by name: image size, patch size, channels, the class token.

None of them is exact for what the weights were trained on; each returns weights whose rows and notes say what was done
and, where it can be measured, what it lost. They are a start for fine-tuning at another size, not a free lunch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.interchange.architecture import ANY_WIDTH, NO_CLASS_TOKEN
from maekit.interchange.files import Tensors
from maekit.interchange.names import Row
from maekit.interchange.reading import Reading, expected_tensors
from maekit.model.encoder import create_encoder, geometry
from maekit.model.patches import patchify, resample_positions, unpatchify

PROJECTION = "encoder.patch_embed.proj.weight"
LARGEST_PATCH = 128
"""The matrix that resizes a patch has the fourth power of its side."""
PREDICTION = ("decoder.pred.weight", "decoder.pred.bias")


def to_size(reading: Reading, size: tuple[int, int]) -> Reading:
    """Return weights for images of another size: positions of encoder and decoder resampled, bicubic, in 2-D.

    As official util/pos_embed.py does for the encoder (interpolate_pos_embed); rows of the prefix are kept.

    Args:
        reading: stays as it is.
        size: H, W in pixels, multiples of the patch side.

    Raises:
        MaekitError: E-CONFIG-SIZE.
    """
    patch = _patch(reading)
    if any(side < patch or side % patch for side in size):
        raise MaekitError(
            "E-CONFIG-SIZE",
            "setting img_size",
            found=f"{size[0]} x {size[1]} pixels",
            expected=f"multiples of the patch side {patch}",
        )
    old, new = _grid(reading), (size[0] // patch, size[1] // patch)
    if old == new:
        return reading
    changed = {
        name: resample_positions(table, old, new)
        for name, table in reading.whole().items()
        if name.endswith("pos_embed")
    }
    how = f"bicubic positions, {old[0]} x {old[1]} to {new[0]} x {new[1]} places"
    return _changed(reading, changed, {"img_size": list(size)}, how)


def to_patch(reading: Reading, patch: int) -> Reading:
    """Return weights for patches of another side at the same grid, so images grow or shrink with it.

    The projection is resampled so that a resized patch gives the same token (FlexiViT, arXiv 2212.08013, section 3.4):
    the pseudo-inverse of the bicubic resize, exact when patches grow, a least-squares fit when they shrink, whose
    relative residual is noted. The decoder predicts its patch resized by the same bicubic map.

    Raises:
        MaekitError: E-CONFIG-PATCH.
    """
    old = _patch(reading)
    if not 1 <= patch <= LARGEST_PATCH:
        raise MaekitError("E-CONFIG-PATCH", "setting patch_size", found=patch, expected=f"1 to {LARGEST_PATCH} pixels")
    if patch == old:
        return reading
    tensors = reading.whole()
    weight = tensors[PROJECTION]
    fitted = resample_patch_embed(weight.double(), [patch, patch], antialias=True).float()
    resize = _resize_matrix(old, patch)
    back = torch.einsum("dcn,no->dco", fitted.double().flatten(2), resize)
    residual = float((back - weight.double().flatten(2)).norm() / weight.double().norm())
    changed = {PROJECTION: fitted}
    for name in PREDICTION:
        if name in tensors:
            changed[name] = _resized_prediction(tensors[name], old, patch, reading.spec["in_chans"])
    size = [side // old * patch for side in reading.spec["img_size"]]
    how = f"patches of {old} to {patch} pixels by pseudo-inverse (FlexiViT); relative residual {residual:.2g}"
    return _changed(reading, changed, {"img_size": size, "patch_size": patch}, how)


def to_channels(reading: Reading, channels: int) -> Reading:
    """Return weights for another number of channels: repeated in turn and scaled, so that copies change nothing.

    New channel j has the kernel of old channel j mod C, divided by the number of its copies: an image whose channels
    are copied gives the tokens it gave. One channel alone has the sum of all kernels, which is what the same values in
    each of them gave. Predictions, mean and deviation follow: channel j of old channel j mod C, one alone their mean.
    timm multiplies by C / channels instead, which is the same where that divides.

    Raises:
        MaekitError: E-CONFIG-CHANNELS for 1 < channels < C, where which channels to keep must be said.
    """
    old = reading.spec["in_chans"]
    if channels < 1 or 1 < channels < old:
        raise MaekitError(
            "E-CONFIG-CHANNELS",
            "setting channels",
            found=f"{channels} of {old}",
            expected=f"1, or more than {old}",
            hint="--channel-matrix FILE, which says what each new channel is made of",
        )
    if channels == old:
        return reading
    if channels == 1:
        return _with_matrix(reading, torch.ones(1, old, dtype=torch.float64), f"{old} to 1 channels: kernels summed")
    copies = F.one_hot(torch.arange(channels) % old, old).double()
    how = f"{old} to {channels} channels: kernels repeated, each divided by the number of its copies"
    return _with_matrix(reading, copies / copies.sum(0), how)


def with_channel_matrix(reading: Reading, matrix: Sequence[Sequence[float]]) -> Reading:
    """Return weights whose channels are mixtures of the old ones.

    Args:
        reading: stays as it is.
        matrix: one row for each new channel, one weight in it for each old one: kernel j = sum of row j times kernels.

    Raises:
        MaekitError: E-CONFIG-CHANNELS for rows of another length, or of zeros.
    """
    old = reading.spec["in_chans"]
    rows = torch.tensor([list(row) if len(row) == old else [0.0] * old for row in matrix], dtype=torch.float64)
    if rows.ndim != 2 or not bool(rows.isfinite().all()) or not bool(rows.abs().sum(1).gt(0).all()):
        raise MaekitError(
            "E-CONFIG-CHANNELS",
            "setting channel_matrix",
            found=f"rows of {sorted({len(row) for row in matrix})} numbers",
            expected=f"rows of {old} finite numbers, one for each old channel, not all zero",
        )
    return _with_matrix(reading, rows, f"{old} to {len(rows)} channels by the given matrix")


def add_class_token(reading: Reading) -> Reading:
    """Return an encoder with a class token of zeros, at a position of zeros; attention sees one token more.

    Raises:
        MaekitError: E-CONFIG-CLASS-TOKEN if it has one, or is no plain ViT otherwise.
    """
    tensors = reading.whole()
    if "encoder.cls_token" in tensors:
        raise _class_token("a class token", "an encoder without one")
    width = tensors["encoder.pos_embed"].shape[2]
    changed = {"encoder.cls_token": torch.zeros(1, 1, width)} | {
        name: torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
        for name, table in tensors.items()
        if name.endswith("pos_embed")
    }
    return _other_name(reading, changed, ANY_WIDTH, "a class token of zeros added")


def drop_class_token(reading: Reading) -> Reading:
    """Return an encoder without class token and its position; attention sees one token less.

    Raises:
        MaekitError: E-CONFIG-CLASS-TOKEN if it has none, if a head is on it, or if it is no plain ViT otherwise.
    """
    tensors = reading.whole()
    if "encoder.cls_token" not in tensors:
        raise _class_token("no class token", "an encoder with one")
    if reading.pool == "cls":
        raise _class_token("a classifier whose head is on the class token", "one on the mean of patch tokens")
    changed: dict[str, Tensor | None] = {"encoder.cls_token": None} | {
        name: table[:, 1:] for name, table in tensors.items() if name.endswith("pos_embed")
    }
    return _other_name(reading, changed, NO_CLASS_TOKEN, "the class token dropped")


def _class_token(found: str, expected: str) -> MaekitError:
    return MaekitError("E-CONFIG-CLASS-TOKEN", "setting class_token", found=found, expected=expected)


def _other_name(reading: Reading, changed: dict[str, Any], name: str, how: str) -> Reading:
    """Change the architecture's name, and refuse one that then holds other tensors: registers, layer scale."""
    known = geometry(reading.spec["name"])
    tensors = reading.whole()
    depth = 1 + max(int(one.split(".")[2]) for one in tensors if one.startswith("encoder.blocks."))
    spec = {"name": name, "depth": depth, "patch_size": _patch(reading)}
    spec["embed_dim"] = reading.spec["embed_dim"] or known.width
    spec["num_heads"] = reading.spec["num_heads"] or known.heads
    result = _changed(reading, changed, spec, how)
    expected = expected_tensors(result.spec, result.kind, result.pool, result.num_classes())
    same = {n: t.shape for n, t in expected.items()} == {n: t.shape for n, t in result.tensors.items()}
    if not same or _block_of(reading.spec["name"]) != _block_of(name):
        raise _class_token(f"{reading.spec['name']}, with more than a plain ViT has", "a plain ViT")
    return result


def _block_of(name: str) -> list[str]:
    """Return what a named architecture's block is made of: activation, norms and their epsilon show in no shape."""
    with torch.device("meta"):
        encoder = create_encoder(name, img_size=(224, 224), patch_size=16, embed_dim=64, num_heads=2, depth=1)
    return [f"{type(part).__name__} {getattr(part, 'eps', '')}" for part in encoder.blocks.modules()]


def _with_matrix(reading: Reading, matrix: Tensor, how: str) -> Reading:
    """Mix input channels by a matrix; predictions and statistics follow.

    A token of new channels y is that of old ones x = matrix' y, so what was predicted of x is predicted of the y of
    least norm that gives it: the pseudo-inverse. Mean and deviation are those of a mixture in shares of a sum of 1.
    """
    tensors, spec = reading.whole(), reading.spec
    weight = tensors[PROJECTION]
    changed = {PROJECTION: torch.einsum("nc,dchw->dnhw", matrix, weight.double()).float()}
    shares, back = matrix.abs() / matrix.abs().sum(1, keepdim=True), torch.linalg.pinv(matrix.T)
    for name in PREDICTION:
        if name in tensors:
            rows = tensors[name].double()
            cells = rows.view(-1, spec["in_chans"], *rows.shape[1:])
            changed[name] = torch.einsum("nc,pc...->pn...", back, cells).flatten(0, 1).float()
    statistics = {key: (shares @ torch.tensor(spec[key], dtype=torch.float64)).tolist() for key in ("mean", "std")}
    return _changed(reading, changed, {"in_chans": len(matrix), **statistics}, how)


def _resize_matrix(old: int, new: int) -> Tensor:
    """Return the bicubic, antialiased resize of one channel's patch as a matrix (new * new, old * old), float64."""
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    return F.interpolate(basis, size=(new, new), mode="bicubic", antialias=True).flatten(1).T


def _resized_prediction(rows: Tensor, old: int, new: int, channels: int) -> Tensor:
    """Resize what the prediction layer draws: its rows (P*P*C, D), or its bias (P*P*C), seen as pictures."""
    flat = rows.double().view(old * old * channels, -1).T[:, None]  # (D, one patch, values)
    pictures = unpatchify(flat, old, (1, 1))
    larger = F.interpolate(pictures, size=(new, new), mode="bicubic", antialias=True)
    return patchify(larger, new)[:, 0].T.reshape(-1, *rows.shape[1:]).float()


def _changed(reading: Reading, changed: dict[str, Any], spec: dict[str, Any], how: str) -> Reading:
    """Return a reading with other tensors, some of them gone, a row for each, and a note."""
    tensors: Tensors = dict(reading.whole())
    rows = list(reading.rows)
    for name, value in changed.items():
        old = tensors.pop(name, None)
        if value is not None:
            tensors[name] = value.contiguous()
        if old is None:
            rows.append(Row("", _short(reading, name), "created", how))
            continue
        for at, row in enumerate(rows):
            if row.ours in (name, _short(reading, name)) and row.what != "left out":
                note = f"{row.note}; {how}" if row.what in ("reshaped", "created") else how
                rows[at] = row._replace(what="left out" if value is None else "reshaped", note=note)
    if reading.kind != "mae":
        tensors = {name.removeprefix("encoder."): value for name, value in tensors.items()}
    return reading._replace(tensors=tensors, spec={**reading.spec, **spec}, rows=rows, notes=[*reading.notes, how])


def _short(reading: Reading, name: str) -> str:
    return name if reading.kind == "mae" else name.removeprefix("encoder.")


def _patch(reading: Reading) -> int:
    return reading.spec["patch_size"] or geometry(reading.spec["name"]).patch


def _grid(reading: Reading) -> tuple[int, int]:
    patch = _patch(reading)
    return reading.spec["img_size"][0] // patch, reading.spec["img_size"][1] // patch
