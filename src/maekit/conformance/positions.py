"""The two fixed position tables (official util/pos_embed.py; paper A.1)."""

import copy

import torch
from torch import Tensor

from maekit.conformance import paper
from maekit.conformance.adapter import NotShown
from maekit.conformance.check import Answer, Check, Subject

SOURCE = "paper A.1; official util/pos_embed.py L26-66"
NEAR = 1e-5
"""float32 holds values up to 1 with 6e-8; a table computed in float32 is off by up to 4e-6 at angles of 14 rad."""


def _table(subject: Subject, name: str) -> Tensor:
    return subject.tensor(name)[0].detach().double()


def _likeness(table: Tensor, grid: tuple[int, int]) -> str:
    """Say which known table this is."""
    dim = table.shape[1]
    if not bool(table.any()):
        return "all zero: no position information"
    if dim % 4:
        return "a width that is no multiple of 4"
    known = {
        "height first (the halves swapped)": paper.sincos(dim, grid, first="y"),
        "frequencies over D/4 - 1 (MoCo v3, big_vision), x first": paper.sincos(dim, grid, endpoint=True),
        "frequencies over D/4 - 1 (MoCo v3, big_vision), y first": paper.sincos(dim, grid, first="y", endpoint=True),
        "[cos | sin] for [sin | cos]": paper.sincos(dim, grid, flip=True),
    }
    for what, other in known.items():
        if other.shape == table.shape and float((other - table).abs().max()) < NEAR:
            return what
    expected = paper.sincos(dim, grid)
    off = f"up to {float((expected - table).abs().max()):.2g} off" if expected.shape == table.shape else "another shape"
    return f"no known sine-cosine table ({off}; deviation {float(table.std()):.2g})"


def _is_official(subject: Subject, name: str) -> Answer:
    """Compare the patches' rows; the prefix has its own check."""
    table = _table(subject, name)[subject.shape.prefix :]
    expected = paper.sincos(table.shape[1] // 4 * 4, subject.shape.grid)
    if expected.shape == table.shape and float((expected - table).abs().max()) <= NEAR:
        return Answer(True, "x first, base 10000, [sin | cos]", "x first, base 10000, [sin | cos]")
    return Answer(False, _likeness(table, subject.shape.grid), "x first, base 10000, [sin | cos]")


def encoder_table(subject: Subject) -> Answer:
    """Compare the encoder's table."""
    return _is_official(subject, "pos_embed")


def decoder_table(subject: Subject) -> Answer:
    """Compare the decoder's table."""
    return _is_official(subject, "decoder_pos_embed")


def class_row(subject: Subject) -> Answer:
    """Look at the row of the class token in both tables."""
    if not subject.shape.prefix:
        raise NotShown("the model has no class token")
    names = [name for name in ("pos_embed", "decoder_pos_embed") if name in subject.tensors]
    largest = {name: float(_table(subject, name)[: subject.shape.prefix].abs().max()) for name in names}
    for name in names:  # a table without a row for it
        if subject.tensors[name].shape[1] == subject.shape.num_patches:
            largest.pop(name)
    if not largest:
        raise NotShown("no table has a row for the class token")
    found = ", ".join(f"{name} {value:.2g}" for name, value in largest.items())
    return Answer(not any(largest.values()), f"largest value: {found}", "zeros")


def frozen(subject: Subject) -> Answer:
    """Look whether the tables are trained."""
    names = [name for name in ("pos_embed", "decoder_pos_embed") if name in subject.tensors]
    if not names:
        raise NotShown("the model has no position tables under the authors' names")
    trained = [name for name in names if subject.tensors[name].requires_grad]
    return Answer(not trained, f"trained: {', '.join(trained)}" if trained else "both fixed", "both fixed")


def resampled(subject: Subject) -> Answer:
    """Ask for the tables of a larger grid; each may be resampled over both axes or computed anew."""
    ask, side, prefix = subject.part("resized"), subject.shape.grid[0] + 2, subject.shape.prefix
    model = copy.deepcopy(subject.model)
    subject.tensor("decoder_pos_embed")
    old = {name: subject.adapter.tensors(model)[name] for name in ("pos_embed", "decoder_pos_embed")}
    with torch.no_grad():
        for table in old.values():  # a table of zeros would hide every way of resampling it
            if not bool(table[:, prefix:].any()):
                table[0, prefix:] = paper.sincos(table.shape[2], subject.shape.grid).to(table.dtype)
    wrong = []
    for (name, table), found in zip(old.items(), ask(model, side), strict=True):
        before, found = table.detach().double(), found.detach().double()
        anew = torch.cat([before[:, :prefix], paper.sincos(before.shape[2], (side, side))[None]], 1)
        known = (paper.positions_2d(before, prefix, side), anew)
        if found.shape != anew.shape or min(float((found - one).abs().max()) for one in known) > 1e-4:
            wrong.append(name)
    right = "bicubic over both axes, or computed anew"
    return Answer(not wrong, f"another geometry: {', '.join(wrong)}" if wrong else right, right)


EXACT = "largest difference 1e-5"
FLOAT = "the table is computed in float64 and kept in float32; some compute in float32"
CHECKS = (
    Check("positions-encoder", "the encoder's positions are the authors' sine-cosine table", SOURCE,
          ("D1", "D11", "3.1 positions", "3.1 sin-cos", "trap 4.6"), EXACT, FLOAT,
          "another convention than the authors' weights: loading them mixes x and y up; zeros: no places at all",
          encoder_table),
    Check("positions-decoder", "the decoder's positions are the authors' sine-cosine table", SOURCE,
          ("D1", "D2", "3.1 positions", "3.1 sin-cos", "trap 4.6"), EXACT, FLOAT,
          "zeros, frozen: all removed patches of an image get one and the same prediction, for ever", decoder_table),
    Check("positions-class", "the class token's row is zero", SOURCE, ("3.1 positions",), "exact", "set, not drawn",
          "not the published starting point", class_row),
    Check("positions-frozen", "both tables are fixed in pre-training", "official models_mae.py L37, L51",
          ("D11", "3.1 positions", "trap 4.7"), "exact", "a flag",
          "trained positions drift from the published ones and enter weight decay", frozen),
    Check("positions-resized", "positions are resampled in two dimensions", "official util/pos_embed.py L75-96",
          ("D21", "3.1 interpolation"), "largest difference 1e-4", "bicubic in float32",
          "at another image size the decoder sees patches in the wrong rows", resampled),
)  # fmt: skip
