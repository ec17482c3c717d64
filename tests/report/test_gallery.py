"""What a gallery computes: attention by a second way, rollout by hand, colours, the worst by an oracle."""

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.patches import patchify
from maekit.report.gallery import BOX, blocks_of, framed, heat, spaced
from maekit.report.gallery_attention import attend, attention_part, attention_weights, roll_out
from maekit.report.gallery_failures import (
    failures_part,
    find_errors,
    in_common,
    properties,
    rank_correlation,
    visible_neighbours,
)
from maekit.report.gallery_features import features_part, pca_colours, without_place
from maekit.report.reconstruction import reconstruct_images

TINY: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_dim": 16,
    "decoder_depth": 1, "decoder_heads": 4, "target": "pixel",
}  # fmt: skip
KINDS = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_gap_224"]


def model_of(name: str = KINDS[0], **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(name, **{**TINY, **changes}).eval()


@pytest.mark.parametrize("name", [*KINDS, "vit_medium_patch16_reg4_gap_256"])
def test_weights_times_values_are_what_the_fused_attention_gives(name: str) -> None:
    attention: Any = model_of(name).encoder.blocks[1].attn
    tokens = torch.randn(2, 20, 24)
    said: list[Tensor] = []
    hook = attention.proj.register_forward_pre_hook(lambda _, inputs: said.append(inputs[0]))
    attention(tokens)
    hook.remove()
    weights = attention_weights(attention, tokens)
    values = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1))[:, :, 2].transpose(1, 2)
    torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), said[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, attention.num_heads, 20))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_collected_is_what_each_block_does_to_the_whole_image(name: str) -> None:
    model = model_of(name)
    images = torch.randn(2, 3, 32, 32)
    found = attend(model, images, [(1, 2)], [1, 2])
    prefix = model.encoder.num_prefix_tokens
    entering: list[Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, x: entering.append(x[0])) for block in model.encoder.blocks]  # type: ignore[union-attr]
    model.features(images)
    for hook in hooks:
        hook.remove()
    first, second = (
        attention_weights(block.attn, tokens)  # type: ignore[arg-type]
        for block, tokens in zip(model.encoder.blocks, entering, strict=True)
    )
    rows = [0, prefix + 6] if model.encoder.has_class_token else [prefix + 6]
    assert found.queries == ["class token", "patch 1,2"][2 - len(rows) :]
    torch.testing.assert_close(found.heads[1], first[:, :, rows].transpose(1, 2))
    torch.testing.assert_close(found.heads[2], second[:, :, rows].transpose(1, 2))
    both = [0.5 * each.mean(1) + 0.5 * torch.eye(each.shape[-1]) for each in (first, second)]
    torch.testing.assert_close(found.rollout, (both[1] @ both[0])[:, rows])
    assert found.distance.shape == found.prefix.shape == (2, 3)
    assert torch.all(found.prefix == 0) if prefix == 0 else torch.all(found.prefix > 0)
    assert not model.encoder.blocks[0].attn._forward_pre_hooks  # type: ignore[union-attr]


def test_rollout_of_two_blocks_by_hand() -> None:
    first = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]])  # two heads: mean [.5 .5], [1 0]
    second = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]])
    # [.75 .25; .5 .5], then [.5 .5; .25 .75] times it
    rolled = roll_out(roll_out(None, first), second)
    assert rolled.tolist() == [[[0.625, 0.375], [0.5625, 0.4375]]]


def test_a_patch_outside_the_grid_is_refused() -> None:
    with pytest.raises(MaekitError, match=r"E-CONFIG-PATCHES.*4,0 in a grid of 4 x 4"):
        attend(model_of(), torch.randn(1, 3, 32, 32), [(4, 0)])


def test_uniform_attention_reaches_as_far_as_patches_are_apart_on_average() -> None:
    model = model_of()
    for block in model.encoder.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)  # type: ignore[union-attr, arg-type]
    found = attend(model, torch.randn(1, 3, 32, 32), [])
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    torch.testing.assert_close(found.distance, torch.cdist(places, places).mean().expand(2, 3))
    torch.testing.assert_close(found.prefix, torch.full((2, 3), 1 / 17))


def test_components_are_those_of_the_covariance_and_their_sign_is_decided() -> None:
    tokens = torch.randn(3, 16, 6) * torch.tensor([5.0, 3.0, 2.0, 0.3, 0.2, 0.1])
    colours, share = pca_colours(tokens)
    assert torch.equal(colours, pca_colours(tokens.clone())[0])
    torch.testing.assert_close(colours, pca_colours(tokens + 7)[0], atol=1e-4, rtol=0)
    values = torch.linalg.eigvalsh(torch.cov(tokens.flatten(0, 1).double().T)).flip(0)
    torch.testing.assert_close(share.double(), values[:3] / values.sum(), atol=1e-6, rtol=1e-5)
    for component in range(3):  # each is nearly one axis, and grows along it
        assert abs(rank_correlation(colours[..., component].flatten(), tokens[..., component].flatten())) > 0.9
    assert colours.min() == 0 and colours.max() == 1


def test_without_place_images_that_are_alike_are_grey_and_one_that_is_not_stands_out() -> None:
    images = torch.rand(1, 3, 32, 32).repeat(4, 1, 1, 1)
    tokens = model_of().features(images, "tokens")[:, 1:].detach()
    assert torch.allclose(without_place(tokens), torch.zeros(()), atol=1e-6)
    tokens[2, 5] += 1
    assert without_place(tokens).norm(dim=2).flatten().argmax() == 2 * 16 + 5


def test_tokens_that_are_all_alike_are_grey() -> None:
    colours, share = pca_colours(torch.ones(2, 4, 5))
    assert torch.all(colours == 0.5) and torch.all(share == 0)
    assert pca_colours(torch.randn(2, 4, 2))[0].shape == (2, 4, 3)


def rigged() -> MaskedAutoencoder:
    """Return a model that says 0 everywhere: its loss is the mean square of the normalised patch."""
    model = model_of(mean=[0.5] * 3, std=[0.25] * 3)
    torch.nn.init.zeros_(model.decoder.pred.weight)
    torch.nn.init.zeros_(model.decoder.pred.bias)
    return model


def test_the_worst_images_and_patches_of_a_model_that_says_nothing_are_the_brightest() -> None:
    model, images = rigged(), torch.rand(12, 3, 32, 32)
    errors = find_errors(model, images, 0.5, seed=3, batch=5)
    expected = patchify((images - 0.5) / 0.25, 8).square().mean(-1)
    torch.testing.assert_close(errors.loss[errors.mask], expected[errors.mask])
    assert torch.isnan(errors.loss[~errors.mask]).all() and errors.mask.sum(1).tolist() == [8] * 12
    means = [float(expected[i][errors.mask[i]].mean()) for i in range(12)]
    assert errors.worst_images(4) == sorted(range(12), key=lambda i: -means[i])[:4]
    every = [(float(expected[i, j]), i, j) for i in range(12) for j in range(16) if errors.mask[i, j]]
    ordered = [(i, j) for _, i, j in sorted(every, reverse=True)]
    assert errors.worst_patches(5, per_image=16) == ordered[:5]
    once = errors.worst_patches(12, per_image=1)
    assert len({i for i, _ in once}) == 12
    assert len(errors.worst_patches(500, per_image=16)) == 96
    # the masks are those of the pictures
    assert abs(reconstruct_images(model, images, 0.5, 3).loss - float(errors.loss.nanmean())) < 1e-5


def test_what_failures_have_in_common_is_found() -> None:
    images = 0.5 + torch.rand(16, 1, 1, 1) * 0.5 * torch.ones(16, 3, 32, 32)
    errors = find_errors(rigged(), images, 0.75)
    rows = {str(row[0]): row for row in in_common(errors).rows}
    assert rows["brightness"][1] == "+1.00"
    assert float(str(rows["brightness"][2])) < float(str(rows["brightness"][3]))
    assert rows["contrast (deviation)"][1] == "+0.00"


def test_properties_of_patches_by_hand() -> None:
    images = torch.full((1, 3, 32, 32), 0.5)
    images[0, :, :8, :8] = torch.tensor([0.0, 1.0]).repeat(4).expand(8, 8)  # stripes of one pixel
    images[0, :, 8:16, :8] = torch.tensor([0.0, 1.0]).repeat_interleave(4).expand(8, 8)  # one edge
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, 5] = False
    found = {name: values[0] for name, values in properties(images, mask, (4, 4), 8).items()}
    assert found["brightness"].allclose(torch.tensor(0.5))
    assert found["contrast (deviation)"][[0, 4, 1]].allclose(torch.tensor([0.5, 0.5, 0.0]))
    assert found["high-frequency energy"][0].allclose(torch.tensor(0.25))
    assert found["share of high frequencies"][0] == 1 and 0 < found["share of high frequencies"][4] < 0.5
    assert found["distance from the border"].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert found["visible neighbours"].nonzero().flatten().tolist() == [0, 1, 2, 4, 6, 8, 9, 10]
    seen = visible_neighbours(torch.zeros(1, 9, dtype=torch.bool), (3, 3))
    assert seen[0].tolist() == [3, 5, 3, 5, 8, 5, 3, 5, 3]


def test_rank_correlation_is_scipys() -> None:
    one, other = torch.randn(50).round(decimals=1), torch.randn(50)
    theirs: Any = spearmanr(one.numpy(), other.numpy())
    assert abs(rank_correlation(one, other) - theirs.statistic) < 1e-12
    assert rank_correlation(torch.ones(5), torch.randn(5)) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": {"mask_kind": "none", "loss_on": "all", "add_noise": 0.2}},
        {"variant": {"loss_on": "visible"}},
        {"variant": {"decoder_kind": "cross", "mask_kind": "block"}},
        {"target": "hog"},
        {"in_chans": 1},
        {"img_size": (16, 40)},
    ],
)
def test_every_kind_of_model_has_pictures(changes: dict[str, Any]) -> None:
    model = model_of(**changes)
    images, names = torch.rand(3, len(model.mean), *model.img_size), ["a", "b", "c"]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (model.mean, model.std))
    inputs = (images - mean) / std
    found = attend(model, inputs, [(0, 1)], [1, 2])
    parts = [
        failures_part(model, images, names, find_errors(model, images, 0.5), 2),
        features_part(model, images, inputs, [1, 2], names),
        attention_part(model, images, found, names),
    ]
    assert [len(part.pictures) for part in parts] == [2, 2, 4]
    assert all(image.size[0] > 100 for part in parts for image, _ in part.pictures.values())


def test_a_map_is_black_at_0_bright_at_the_top_and_grey_where_there_is_nothing() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0, torch.nan]])
    drawn = heat(values, (2, 2), 3)
    assert drawn.shape == (1, 3, 6, 6)
    cells = F.avg_pool2d(drawn, 3)[0].flatten(1).T
    assert cells[0].sum() < 0.05 and cells[2].min() > 0.6 and cells[3].allclose(torch.tensor(0.5))
    assert heat(values, (2, 2), 3, top=4.0)[0, :, 3:, :3].sum() < drawn[0, :, 3:, :3].sum()


def test_frames_and_blocks_stand_where_the_patch_is() -> None:
    picture = framed(torch.zeros(1, 16, 24), (1, 2), 8)
    assert picture.shape == (3, 16, 24)
    assert torch.equal(picture[:, 8:16, 16:24][:, 0, 0], BOX.flatten()) and picture[:, 10:14, 18:22].sum() == 0
    assert picture[:, :8].sum() == 0 and picture[:, :, :16].sum() == 0
    drawn = blocks_of(torch.arange(6.0)[None, :, None].expand(1, 6, 3), (2, 3), 2)
    assert drawn[0, 0, 2].tolist() == [3, 3, 4, 4, 5, 5]


def test_spaced_takes_both_ends() -> None:
    assert spaced(3, 6) == [0, 1, 2] and spaced(12, 6) == [0, 2, 4, 7, 9, 11] and spaced(100, 2) == [0, 99]
