"""Changes of shape against what they promise: oracles that share no code with them, and whole models run."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.interchange.names import Row
from maekit.interchange.reading import Reading
from maekit.interchange.reshape import (
    add_class_token,
    drop_class_token,
    to_channels,
    to_patch,
    to_size,
    with_channel_matrix,
)
from maekit.interchange.weights import (
    as_classifier,
    as_model,
    load_classifier,
    load_model,
    read_weights,
    save_encoder,
    save_model,
    save_reading,
)
from maekit.model.heads import classifier
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.patches import resample_positions
from maekit.tasks.convert import convert

KINDS = ("mae", "encoder", "classifier")
GRID = (2, 3)
PROJECTION = "encoder.patch_embed.proj.weight"


def small(**changes: Any) -> MaskedAutoencoder:
    """Return a model all of whose weights are random: zeros hide mistakes."""
    settings = {
        "name": "vit_base_patch16_224", "img_size": (16, 24), "patch_size": 8, "embed_dim": 24, "depth": 2,
        "num_heads": 3, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }  # fmt: skip
    model = create_model(**{**settings, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Reading]:
    """Return a function that gives weights of a kind as they are read from a file."""

    def make(kind: str = "mae", pool: str = "mean", **changes: Any) -> Reading:
        model, path = small(**changes), tmp_path / "source.safetensors"
        (save_encoder if kind == "encoder" else save_model)(model, path)
        reading = read_weights(path)
        if kind != "classifier":
            return reading
        head = classifier(model, 3, pool=pool, drop_path=0.0, pretrained=True)
        torch.nn.init.normal_(head.get_classifier().weight)  # type: ignore[union-attr]
        state = {name: value.detach().clone() for name, value in head.state_dict().items()}
        save_reading(reading._replace(kind=kind, tensors=state, pool=pool, classes=["a", "b", "c"]), path)
        return read_weights(path)

    return make


def images(count: int = 2, channels: int = 3, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def tokens(reading: Reading, pixels: Tensor) -> Tensor:
    """Return what a reading's encoder gives for whole images, all tokens."""
    if reading.kind == "classifier":
        return as_classifier(reading).model.forward_features(pixels)
    return as_model(reading).features(pixels, "tokens")


@torch.no_grad()
def embedded(reading: Reading, pixels: Tensor) -> Tensor:
    """Return tokens right after the projection (B, N, D), by a plain convolution."""
    weights = reading.whole()
    bias = weights[PROJECTION.replace("weight", "bias")]
    side = weights[PROJECTION].shape[2]
    return F.conv2d(pixels, weights[PROJECTION], bias, stride=side).flatten(2).transpose(1, 2)


@torch.no_grad()
def predicted(reading: Reading, grid: tuple[int, int] = GRID) -> Tensor:
    """Return the pictures (B, C, P, P) that the last layer draws for some tokens, by an own reading of its layout."""
    weights, channels = reading.whole(), reading.spec["in_chans"]
    some = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    values = F.linear(some, weights["decoder.pred.weight"], weights["decoder.pred.bias"])
    side = math.isqrt(values.shape[1] // channels)
    return values.view(5, side, side, channels).permute(0, 3, 1, 2)


def enlarged(pixels: Tensor, old: int, new: int) -> Tensor:
    """Return images in which each patch was resized by itself."""
    cells = F.unfold(pixels, old, stride=old)
    batch, _, count = cells.shape
    patches = cells.transpose(1, 2).reshape(batch * count, -1, old, old)
    patches = F.interpolate(patches, size=(new, new), mode="bicubic", antialias=True)
    size = (pixels.shape[2] // old * new, pixels.shape[3] // old * new)
    return F.fold(patches.reshape(batch, count, -1).transpose(1, 2), size, new, stride=new)


def refusal(change: Callable[..., Reading], *arguments: Any) -> MaekitError:
    with pytest.raises(MaekitError) as caught:
        change(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def assert_others_same(before: Reading, after: Reading, changed: set[str]) -> None:
    """Assert that exactly these tensors are other ones."""
    mine, theirs = before.whole(), after.whole()
    assert mine.keys() == theirs.keys()
    differ = {n for n, t in mine.items() if t.shape != theirs[n].shape or not torch.equal(t, theirs[n])}
    assert differ == changed & mine.keys()


def assert_rows_say(before: Reading, after: Reading, changed: set[str], words: str) -> None:
    """Assert that rows and notes say what was done, to these tensors and no others."""
    short = {n if before.kind == "mae" else n.removeprefix("encoder.") for n in changed & before.whole().keys()}
    said = {row.ours for row in after.rows if row.what == "reshaped"}
    assert said == short
    assert all(words in row.note for row in after.rows if row.what == "reshaped")
    assert words in after.notes[-1]
    assert len(after.rows) == len(before.rows)
    assert len(after.notes) == len(before.notes) + 1


# --- image size


def keys(x: float) -> float:
    """Return the cubic convolution kernel at a = -0.75 (Keys 1981)."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def cubic(old: int, new: int) -> np.ndarray:
    """Return the matrix of a cubic resize with half-pixel centres and repeated borders."""
    matrix = np.zeros((new, old))
    for at in range(new):
        centre = (at + 0.5) * old / new - 0.5
        for place in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[at, min(max(place, 0), old - 1)] += keys(centre - place)
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 40), (8, 16), (24, 24)], ids=str)
def test_another_image_size_resamples_both_tables_and_nothing_else(
    read: Callable[..., Reading], kind: str, size: tuple[int, int]
) -> None:
    before = read(kind)
    after = to_size(before, size)
    grid, tables = (size[0] // 8, size[1] // 8), {"encoder.pos_embed", "decoder.pos_embed"}
    for name in tables & before.whole().keys():
        old, new = before.whole()[name], after.whole()[name]
        assert torch.equal(new, resample_positions(old, GRID, grid))
        assert torch.equal(new[:, :1], old[:, :1])
        places = old[0, 1:].double().numpy().reshape(*GRID, -1)
        expected = np.einsum("ai,bj,ijd->abd", cubic(2, grid[0]), cubic(3, grid[1]), places)
        np.testing.assert_allclose(new[0, 1:].numpy().reshape(*grid, -1), expected, atol=1e-5)
    assert {n for n, t in after.whole().items() if t.shape != before.whole()[n].shape} == tables & before.whole().keys()
    assert all(torch.equal(t, after.whole()[n]) for n, t in before.whole().items() if n not in tables)
    assert tokens(after, images(size=size)).shape == (2, 1 + grid[0] * grid[1], 24)
    assert tokens(after, images(size=size)).isfinite().all()
    assert_rows_say(before, after, tables, f"2 x 3 to {grid[0]} x {grid[1]}")
    assert before.spec["img_size"] == [16, 24]


def test_the_same_size_changes_nothing_and_says_nothing(read: Callable[..., Reading]) -> None:
    before = read()
    for after in (to_size(before, (16, 24)), to_patch(before, 8), to_channels(before, 3)):
        assert_others_same(before, after, set())
        assert after.notes == before.notes


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_medium_patch16_reg4_gap_256"])
def test_another_image_size_keeps_registers_and_models_without_class_token(
    read: Callable[..., Reading], name: str
) -> None:
    after = to_size(read(name=name), (32, 32))
    assert tokens(after, images(size=(32, 32))).isfinite().all()


@pytest.mark.parametrize("size", [(20, 24), (0, 8), (4, 8), (16, 23), (-8, 8)], ids=str)
def test_a_size_that_holds_no_whole_patches_is_refused(read: Callable[..., Reading], size: tuple[int, int]) -> None:
    assert refusal(to_size, read(), size).code == "E-CONFIG-SIZE"


# --- patch size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", [9, 12, 16])
def test_larger_patches_give_the_same_tokens_for_resized_patches(
    read: Callable[..., Reading], kind: str, patch: int
) -> None:
    before = read(kind)
    after, pixels = to_patch(before, patch), images()
    larger = enlarged(pixels, 8, patch)
    assert after.spec["img_size"] == [2 * patch, 3 * patch] == list(larger.shape[2:])
    torch.testing.assert_close(embedded(after, larger), embedded(before, pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens(after, larger), tokens(before, pixels), rtol=1e-4, atol=1e-4)
    residual = float(re.findall(r"residual ([\d.e+-]+)$", after.notes[-1])[0])
    assert residual < 1e-5
    changed = {PROJECTION, "decoder.pred.weight", "decoder.pred.bias"}
    assert_rows_say(before, after, changed, "FlexiViT")
    rest = {n for n, t in before.whole().items() if torch.equal(t, after.whole()[n])}
    assert rest == before.whole().keys() - changed


@pytest.mark.parametrize("patch", [7, 4, 1])
def test_smaller_patches_are_the_best_fit_and_the_note_says_how_good_it_is(
    read: Callable[..., Reading], patch: int
) -> None:
    before = read()
    after = to_patch(before, patch)
    units = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    shrink = F.interpolate(units, size=(patch, patch), mode="bicubic", antialias=True).flatten(1)  # (old, new)
    wanted = before.whole()[PROJECTION].double().reshape(-1, 64).T
    best = torch.linalg.lstsq(shrink, wanted).solution
    found = after.whole()[PROJECTION].double().reshape(-1, patch * patch).T
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)
    left = float((shrink @ best - wanted).norm() / wanted.norm())
    assert float(re.findall(r"residual ([\d.e+-]+)$", after.notes[-1])[0]) == pytest.approx(left, rel=0.06)
    assert left > 0.1
    assert tokens(after, images(size=(2 * patch, 3 * patch))).isfinite().all()


@pytest.mark.parametrize("patch", [12, 6])
@pytest.mark.parametrize("channels", [3, 1])
def test_the_decoder_draws_its_picture_at_the_other_size(
    read: Callable[..., Reading], patch: int, channels: int
) -> None:
    before = read(in_chans=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    expected = F.interpolate(predicted(before).double(), size=(patch, patch), mode="bicubic", antialias=True)
    torch.testing.assert_close(predicted(to_patch(before, patch)).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_autoencoder_predicts_the_resized_picture(read: Callable[..., Reading]) -> None:
    before = read()
    after, pixels = to_patch(before, 12), images()
    noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        old = as_model(before)(pixels, 0.5, noise=noise)
        new = as_model(after)(enlarged(pixels, 8, 12), 0.5, noise=noise)
    assert torch.equal(old.mask, new.mask)
    pictures = old.pred.reshape(12, 8, 8, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(pictures, size=(12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(new.pred.reshape(12, 12, 12, 3).permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)


def test_a_way_there_and_back_is_a_best_fit_each_time_and_both_steps_are_noted(read: Callable[..., Reading]) -> None:
    before = read("encoder", patch_size=14, img_size=(28, 28))
    again = to_patch(to_patch(before, 16), 14)
    # an own fit of what grew
    shrink = F.interpolate(
        torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16), size=(14, 14), mode="bicubic", antialias=True
    ).flatten(1)
    wanted = to_patch(before, 16).whole()[PROJECTION].double().reshape(-1, 256).T
    best = torch.linalg.lstsq(shrink, wanted).solution
    found = again.whole()[PROJECTION].double().reshape(-1, 196).T
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)
    assert again.spec["img_size"] == [28, 28]
    assert len(again.notes) == len(before.notes) + 2
    row = next(row for row in again.rows if row.ours == "patch_embed.proj.weight")
    assert "14 to 16" in row.note and "16 to 14" in row.note


@pytest.mark.parametrize("patch", [0, -3, 10**6])
def test_a_patch_of_no_or_a_million_pixels_is_refused(read: Callable[..., Reading], patch: int) -> None:
    assert refusal(to_patch, read(), patch).code == "E-CONFIG-PATCH"


# --- channels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [4, 5, 6, 13])
def test_copied_channels_give_the_tokens_they_gave(read: Callable[..., Reading], kind: str, channels: int) -> None:
    before = read(kind)
    after, pixels = to_channels(before, channels), images()
    source = [at % 3 for at in range(channels)]
    torch.testing.assert_close(tokens(after, pixels[:, source]), tokens(before, pixels), rtol=1e-4, atol=1e-4)
    assert after.spec["in_chans"] == channels
    assert after.spec["mean"] == pytest.approx([before.spec["mean"][at] for at in source])
    assert after.spec["std"] == pytest.approx([before.spec["std"][at] for at in source])
    assert_rows_say(
        before, after, {PROJECTION, "decoder.pred.weight", "decoder.pred.bias"}, f"3 to {channels} channels"
    )
    if kind == "mae":
        torch.testing.assert_close(predicted(after), predicted(before)[:, source], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_channel_gives_the_tokens_of_a_grey_image(read: Callable[..., Reading], kind: str) -> None:
    before, grey = read(kind), images(channels=1)
    after = to_channels(before, 1)
    torch.testing.assert_close(tokens(after, grey), tokens(before, grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert after.spec["mean"] == pytest.approx([0.2])
    assert after.spec["std"] == pytest.approx([0.5])
    assert "summed" in after.notes[-1]
    if kind == "mae":
        torch.testing.assert_close(predicted(after), predicted(before).mean(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_three_channels_from_one_give_the_tokens_of_a_grey_image(read: Callable[..., Reading]) -> None:
    before, grey = read(in_chans=1, mean=(0.5,), std=(0.25,)), images(channels=1)
    after = to_channels(before, 3)
    torch.testing.assert_close(tokens(after, grey.expand(-1, 3, -1, -1)), tokens(before, grey), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predicted(after), predicted(before).expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 0, -1])
def test_fewer_channels_must_be_said_one_by_one(read: Callable[..., Reading], channels: int) -> None:
    error = refusal(to_channels, read(), channels)
    assert error.code == "E-CONFIG-CHANNELS"
    assert "--channel-matrix" in str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0]])
def test_a_permutation_permutes_channels_and_nothing_else(
    read: Callable[..., Reading], kind: str, order: list[int]
) -> None:
    before = read(kind)
    after = with_channel_matrix(before, torch.eye(3)[order].tolist())
    assert torch.equal(after.whole()[PROJECTION], before.whole()[PROJECTION][:, order])
    torch.testing.assert_close(tokens(after, images()[:, order]), tokens(before, images()), rtol=1e-4, atol=1e-5)
    assert after.spec["mean"] == [before.spec["mean"][at] for at in order]
    assert after.spec["std"] == [before.spec["std"][at] for at in order]
    if kind == "mae":
        assert torch.equal(predicted(after), predicted(before)[:, order])
        noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            old, new = (as_model(one)(pixels, 0.5, noise=noise) for one, pixels in (
                (before, images()), (after, images()[:, order])
            ))  # fmt: skip
        torch.testing.assert_close(
            new.pred.view(2, 6, 64, 3), old.pred.view(2, 6, 64, 3)[..., order], rtol=1e-4, atol=1e-4
        )


def test_a_mixture_mixes_kernels_and_predicts_what_looks_the_same_through_them(read: Callable[..., Reading]) -> None:
    before, matrix = read(), [[0.2, 0.3, 0.5], [2.0, 0.0, 2.0]]
    after = with_channel_matrix(before, matrix)
    kernels = before.whole()[PROJECTION]
    expected = torch.stack([sum(w * kernels[:, c] for c, w in enumerate(row)) for row in matrix], 1)  # type: ignore[misc]
    torch.testing.assert_close(after.whole()[PROJECTION], expected, rtol=1e-5, atol=1e-6)
    pictures = predicted(before)
    # a picture y of the new channels looks to the encoder like x = matrix' y; where x can be had exactly, it is
    mixed = torch.einsum("nc,bnhw->bchw", torch.tensor(matrix), predicted(after))
    within = torch.linalg.lstsq(torch.tensor(matrix).T, pictures.movedim(1, 0).flatten(1)).solution
    nearest = (torch.tensor(matrix).T @ within).view(3, *pictures[:, 0].shape).movedim(0, 1)
    torch.testing.assert_close(mixed, nearest, rtol=1e-4, atol=1e-5)
    assert after.spec["mean"] == pytest.approx([0.02 + 0.06 + 0.15, 0.2])
    assert tokens(after, images(channels=2)).isfinite().all()


@pytest.mark.parametrize(
    "matrix",
    [[], [[]], [[1.0, 2.0]], [[1.0, 0, 0], [1.0, 0]], [[0.0, 0, 0]], [[float("nan"), 0, 0]], [[float("inf"), 1, 1]]],
    ids=str,
)
def test_a_matrix_that_does_not_fit_is_refused(read: Callable[..., Reading], matrix: list[list[float]]) -> None:
    assert refusal(with_channel_matrix, read(), matrix).code == "E-CONFIG-CHANNELS"


def test_a_mirrored_channel_is_predicted_mirrored(read: Callable[..., Reading]) -> None:
    before = read()
    after = with_channel_matrix(before, [[-1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    torch.testing.assert_close(predicted(after)[:, 0], -predicted(before)[:, 0])
    torch.testing.assert_close(predicted(after)[:, 1:], predicted(before)[:, 1:])


# --- class token


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_token_added_and_dropped_again_leaves_every_bit_as_it_was(
    read: Callable[..., Reading], kind: str
) -> None:
    before = read(kind, name="vit_base_patch16_gap_224")
    added = add_class_token(before)
    assert not added.whole()["encoder.cls_token"].any()
    assert not added.whole()["encoder.pos_embed"][:, 0].any()
    assert tokens(added, images()).shape[1] == 7
    assert Row(
        "", "encoder.cls_token" if kind == "mae" else "cls_token", "created", "a class token of zeros added"
    ) in (added.rows)
    after = drop_class_token(added)
    assert_others_same(before, after, set())
    assert torch.equal(tokens(after, images()), tokens(before, images()))
    assert {key: value for key, value in after.spec.items() if value != before.spec[key]} == {}
    assert len(after.notes) == len(before.notes) + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_class_token_is_named_and_the_rest_stays(read: Callable[..., Reading], kind: str) -> None:
    before = read(kind)
    after = drop_class_token(before)
    gone = [row for row in after.rows if row.what == "left out"]
    assert [row.ours.removeprefix("encoder.") for row in gone] == ["cls_token"]
    for name, value in after.whole().items():
        old = before.whole()[name]
        assert torch.equal(value, old[:, 1:] if name.endswith("pos_embed") else old), name
    assert before.whole().keys() - after.whole().keys() == {"encoder.cls_token"}
    assert tokens(after, images()).shape == (2, 6, 24)


def test_without_class_token_patches_attend_to_each_other_alone(read: Callable[..., Reading]) -> None:
    before = read("encoder", depth=1)
    with torch.no_grad():
        model = as_model(drop_class_token(before)).encoder
        tensors = before.whole()
        places = embedded(before, images()) + tensors["encoder.pos_embed"][:, 1:]
        torch.testing.assert_close(model.norm(model.blocks(places)), model.forward_features(images()))


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (add_class_token, {}),
        (drop_class_token, {"name": "vit_base_patch16_gap_224"}),
        (drop_class_token, {"kind": "classifier", "pool": "cls"}),
        (drop_class_token, {"name": "vit_small_patch14_reg4_dinov2"}),
        (add_class_token, {"name": "vit_medium_patch16_reg4_gap_256"}),
    ],
    ids=["there already", "none there", "the head is on it", "registers", "registers, none there"],
)
def test_a_class_token_that_cannot_be_changed_is_refused(
    read: Callable[..., Reading], change: Callable[[Reading], Reading], settings: dict[str, Any]
) -> None:
    assert refusal(change, read(**settings)).code == "E-CONFIG-CLASS-TOKEN"


# --- by the command


@pytest.mark.parametrize("kind", KINDS)
def test_patch_and_image_size_together_end_at_the_size_that_was_asked_for(
    read: Callable[..., Reading], tmp_path: Path, kind: str
) -> None:
    before = read(kind)
    asked = {"patch_size": 4, "img_size": (20, 24)}
    result = convert(
        {"src": tmp_path / "source.safetensors", "dst": tmp_path / "m.safetensors", "to": "safetensors", **asked}
    )
    expected = to_size(to_patch(before, 4), (20, 24))
    again = read_weights(tmp_path / "m.safetensors")
    assert_others_same(expected, again, set())
    assert again.spec == expected.spec
    assert (again.spec["patch_size"], list(again.spec["img_size"])) == (4, [20, 24])
    assert result.metrics["notes"] == expected.notes
    for note in expected.notes:
        assert note in result.text
    load: Callable[[Path], Any] = load_classifier if kind == "classifier" else load_model
    load(tmp_path / "m.safetensors")


def test_every_change_at_once_is_proved_in_timm_and_listed(read: Callable[..., Reading], tmp_path: Path) -> None:
    read(img_size=(16, 16))
    result = convert(
        {
            "src": tmp_path / "source.safetensors", "dst": tmp_path / "timm", "to": "timm", "encoder_only": True,
            "class_token": "drop", "channels": 1, "patch_size": 10, "img_size": (30, 40),
        }
    )  # fmt: skip
    found: dict[str, Any] = result.metrics
    assert [note.split()[0] for note in found["notes"]] == ["the", "3", "patches", "bicubic"]
    what = {row["ours"]: row for row in found["read"]}
    assert what["encoder.cls_token"]["what"] == "left out"
    assert "channels" in what[PROJECTION]["note"] and "FlexiViT" in what[PROJECTION]["note"]
    assert "class token" in what["encoder.pos_embed"]["note"] and "bicubic" in what["encoder.pos_embed"]["note"]
    assert what["decoder.pred.weight"]["what"] == "left out"
    assert found["proof"]["difference"] < 1e-5
    again = load_model(tmp_path / "timm")
    assert (again.img_size, again.patch, again.spec["in_chans"]) == ((30, 40), 10, 1)


def test_a_matrix_file_is_read_and_a_bad_one_refused_with_nothing_written(
    read: Callable[..., Reading], tmp_path: Path
) -> None:
    before, matrix = read(), tmp_path / "matrix.json"
    asked = {"src": tmp_path / "source.safetensors", "to": "safetensors", "channel_matrix": matrix}
    matrix.write_text("[[0, 0, 1], [1, 0, 0]]")
    convert({**asked, "dst": tmp_path / "good.safetensors"})
    expected = with_channel_matrix(before, json.loads(matrix.read_text()))
    assert_others_same(expected, read_weights(tmp_path / "good.safetensors"), set())
    for text in ("", "{}", "[]", "[1, 2, 3]", '[["a"]]', "[[1, 2]]", "[[1, 2, NaN]]", "[" * 99_999, "[[null, 1, 1]]"):
        matrix.write_text(text)
        error = refusal(convert, {**asked, "dst": tmp_path / "bad.safetensors"})  # type: ignore[arg-type]
        assert error.code == "E-CONFIG-CHANNELS", text
        assert error.exit_code == 2
    assert not (tmp_path / "bad.safetensors").exists()
