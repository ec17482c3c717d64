"""Departures from the paper's default row: each against an oracle, any combination trains or is refused."""

import math
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.model.encoder import encode
from maekit.model.mae import MaskedAutoencoder, at_size, create_model
from maekit.model.patches import patchify
from maekit.model.pca import PatchPCA
from maekit.model.targets import HOG_BINS, Tokens, hog, low_pass
from maekit.model.tokenizer import VQTokenizer
from maekit.model.variant import PAPER, Variant

from .conftest import TINY, Build

SIZE, PATCH = (32, 32), 8
"""16 patches."""


def images_for(model: MaskedAutoencoder, batch: int = 2) -> Tensor:
    shape = (batch, model.encoder.in_chans, *model.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def noise_for(model: MaskedAutoencoder, batch: int = 2) -> Tensor:
    return torch.rand(batch, model.num_patches, generator=torch.Generator().manual_seed(6))


# --- any combination

VARIANTS = st.fixed_dictionaries(
    {},
    optional={
        "mask_kind": st.sampled_from(["random", "block", "grid", "centre", "given", "none"]),
        "mask_unit": st.sampled_from([1, 2, 3]),
        "loss_on": st.sampled_from(["masked", "all", "visible"]),
        "add_noise": st.sampled_from([0.0, 0.5]),
        "encoder_mask_token": st.booleans(),
        "class_tokens": st.sampled_from([None, 0, 1, 3]),
        "positions": st.sampled_from(["sincos", "learned"]),
        "decoder_kind": st.sampled_from(["self", "cross"]),
        "decode_ratio": st.sampled_from([None, 0.25, 0.9]),
    },
)
TARGETS = st.sampled_from(["norm_pixel", "pixel", "pca", "token", "low_pass", "hog"])


def spec_for(target: str) -> dict[str, Any] | None:
    if target == "pca":
        return PatchPCA(5, PATCH * PATCH * 3, PATCH, 3).spec
    return VQTokenizer(7, SIZE, PATCH, 3, width=8, blocks=1, code_width=4).spec if target == "token" else None


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(VARIANTS, TARGETS, st.sampled_from([0, 1]), st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_every_combination_trains_or_is_refused_in_one_line(
    variant: dict[str, Any], target: str, depth: int, checkpointing: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    changes = {"decoder_depth": depth, "img_size": SIZE, "patch_size": PATCH}
    try:
        model = create_model(**{**TINY, **changes}, target=target, target_spec=spec_for(target), variant=variant)
        images, noise = images_for(model), noise_for(model)
        model.loss(images, noise)
    except MaekitError as error:
        assert "\n" not in str(error) and error.code.startswith("E-CONFIG-")
        return
    model.train().set_checkpointing(*checkpointing)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        torch.manual_seed(1)
        loss = model.loss(images, noise)
        torch.manual_seed(1)
        torch.testing.assert_close(model(images, noise=noise).loss, loss)
        optimizer.zero_grad()
        loss.backward()
        # what has no gradient would stop training over several processes
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    again = create_model(**model.spec)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval().features(images), model.eval().features(images))


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"mask_kind": "diagonal"}, "random | block"),
        ({"mask_kind": "none"}, "--loss-on all"),
        ({"mask_kind": "none", "loss_on": "all"}, "--add-noise"),
        ({"mask_kind": "none", "loss_on": "all", "add_noise": 1.0, "encoder_mask_token": True}, "mask token"),
        ({"mask_kind": "none", "loss_on": "all", "add_noise": 1.0, "mask_unit": 2}, "--mask-unit 1"),
        ({"decoder_kind": "cross", "encoder_mask_token": True}, "--decoder-kind self"),
        ({"decode_ratio": 0.5, "loss_on": "all"}, "loss_on masked"),
        ({"decode_ratio": 0.5, "encoder_mask_token": True}, "all places"),
        ({"class_tokens": -1}, "class_tokens"),
        ({"mask_unit": True}, "mask_unit"),
        ({"mask_kind_of": "block"}, "mask_kind_of"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_a_way_out(variant: dict[str, Any], words: str) -> None:
    with pytest.raises(MaekitError) as caught:
        Variant.of(variant)
    assert words in str(caught.value)


def test_a_linear_head_without_all_places_is_refused(build: Build) -> None:
    with pytest.raises(MaekitError, match=r"E-CONFIG-DEPTH.*all places.*--encoder-mask-token"):
        build(decoder_depth=0)


def test_training_under_given_masks_without_any_is_refused(build: Build) -> None:
    model = build(variant={"mask_kind": "given"})
    images, noise = images_for(model), noise_for(model)
    with pytest.raises(MaekitError, match=r"E-CONFIG-MASK.*scores"):
        model.loss(images, noise)
    assert torch.equal(model(images, noise=noise).mask, build()(images, noise=noise).mask)  # a look: random ones


def test_the_default_row_says_nothing_of_itself(build: Build) -> None:
    assert "variant" not in build().spec and "variant" not in build(variant=Variant()).spec
    assert build(variant={"mask_unit": 2}).spec["variant"] == {"mask_unit": 2}
    assert PAPER.departures() == {}


# --- mask tokens in the encoder (table 1c)


def test_an_encoder_with_mask_tokens_is_the_whole_encoder_where_nothing_is_masked(build: Build, kind: str) -> None:
    model = build(kind, variant={"encoder_mask_token": True}).double()
    images = images_for(model).double()
    patches = patchify(images, model.patch)
    order = torch.stack([torch.randperm(model.num_patches) for _ in range(2)])
    shuffled = patches.gather(1, order[:, :, None].expand_as(patches))
    latent = encode(model.encoder, shuffled, order, model.mask_token)
    torch.testing.assert_close(latent, model.encoder.forward_features(images))


def test_masked_places_hold_the_encoders_mask_token(build: Build) -> None:
    model = build(variant={"encoder_mask_token": True}).double()
    images, noise = images_for(model).double(), noise_for(model)
    out, mask_token = model(images, noise=noise), model.mask_token
    assert mask_token is not None
    handle = model.encoder.patch_embed.register_forward_hook(
        lambda _module, _args, tokens: torch.where(out.mask[:, :, None], mask_token, tokens)
    )
    whole = model.encoder.forward_features(images)  # timm's own path, patches replaced after the embedding
    handle.remove()
    torch.testing.assert_close(out.latent, whole)
    assert not hasattr(model.decoder, "mask_token") and out.latent.shape[1] == 1 + model.num_patches


def test_a_linear_head_reads_the_latent_itself(build: Build) -> None:
    model = build(variant={"encoder_mask_token": True}, decoder_depth=0)
    out = model(images_for(model), noise=noise_for(model))
    want = F.linear(out.latent[:, 1:], model.decoder.pred.weight, model.decoder.pred.bias)
    torch.testing.assert_close(out.pred, want)
    assert [name for name, _ in model.decoder.named_parameters()] == ["pred.weight", "pred.bias"]


# --- the decoder


def test_decoding_all_that_is_removed_as_a_part_changes_nothing(build: Build) -> None:
    """Attention knows no order, so a shorter sequence of the same tokens gives the same loss."""
    whole, part = build().double(), build(variant={"decode_ratio": 0.75}).double()
    images, noise = images_for(whole).double(), noise_for(whole)
    torch.testing.assert_close(part.loss(images, noise), whole.loss(images, noise))


def test_a_part_is_decoded_beside_the_visible_patches_alone(build: Build) -> None:
    model = build(variant={"decode_ratio": 0.25}).double()
    images, noise = images_for(model).double(), noise_for(model)
    lengths: list[int] = []
    first = model.decoder.get_submodule("blocks.0.norm1")
    handle = first.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    model.loss(images, noise)
    handle.remove()
    assert lengths == [1 + 4 + 4]  # class token, a quarter visible, a quarter of all decoded


def test_decoded_patches_are_removed_ones_and_each_as_likely(build: Build) -> None:
    model = build(variant={"decode_ratio": 0.25})
    noise = torch.rand(4000, model.num_patches, generator=torch.Generator().manual_seed(1))
    masking, noise = model._masking(torch.zeros(4000, 3, 32, 32), 0.75, noise, None, None)
    ids = model._scored(masking, noise)
    assert masking.mask.gather(1, ids).all() and ids.shape == (4000, 4)
    counts = torch.bincount(ids.flatten(), minlength=16).double()
    assert float((counts / 1000 - 1).abs().max()) < 0.15  # 4000 * 4 / 16, about 5 deviations


def test_places_of_a_cross_attention_decoder_do_not_see_one_another(build: Build) -> None:
    model = build(variant={"decoder_kind": "cross"}).double()
    images, noise = images_for(model).double(), noise_for(model)
    out = model(images, noise=noise)
    keep = out.ids_restore.argsort(1)[:, :4]
    some = torch.tensor([[3, 9], [0, 15]])
    apart = model.decoder.predict(model.decoder(out.latent, keep, some))
    torch.testing.assert_close(apart, out.pred.gather(1, some[:, :, None].expand_as(apart)))


def test_cross_attention_is_that_of_torch(build: Build) -> None:
    block: Any = build(variant={"decoder_kind": "cross"}).double().decoder.blocks[0]
    dim, heads = TINY["decoder_dim"], TINY["decoder_heads"]
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([block.q.weight, block.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([block.q.bias, block.kv.bias]))
        theirs.out_proj.load_state_dict(block.proj.state_dict())
    tokens, memory = torch.randn(2, 3, dim).double(), torch.randn(2, 5, dim).double()
    middle = tokens + theirs(block.norm1(tokens), memory, memory)[0]
    torch.testing.assert_close(block(tokens, memory), middle + block.mlp(block.norm2(middle)))


def test_a_decode_ratio_above_what_is_removed_is_refused(build: Build) -> None:
    model = build(variant={"decode_ratio": 0.8})
    with pytest.raises(MaekitError, match=r"E-CONFIG-DECODER.*12 patches.*1 to 8"):
        model.loss(images_for(model), mask_ratio=0.5)


# --- what counts


@pytest.mark.parametrize(("loss_on", "weights"), [("all", 1.0), ("visible", None), ("masked", None)])
def test_the_loss_is_the_mean_over_the_patches_that_count(build: Build, loss_on: str, weights: float | None) -> None:
    model = build(target="pixel", variant={"loss_on": loss_on}).double()
    images = images_for(model).double()
    out = model(images, noise=noise_for(model))
    error = ((out.pred - patchify(images, model.patch)) ** 2).mean(-1)
    counts = torch.ones_like(error) if weights else (out.mask if loss_on == "masked" else ~out.mask).double()
    torch.testing.assert_close(out.loss, (error * counts).sum() / counts.sum())


def test_denoising_shows_noise_and_asks_for_the_clean_image(build: Build) -> None:
    variant = {"mask_kind": "none", "add_noise": 0.5, "loss_on": "all"}
    model = build(target="pixel", variant=variant)
    images = images_for(model)
    noisy = model.corrupt(images, torch.Generator().manual_seed(3))
    assert 0.45 < float((noisy - images).std()) < 0.55 and torch.equal(
        noisy, model.corrupt(images, torch.Generator().manual_seed(3))
    )
    out = model(images, seen=noisy)
    assert not out.mask.any() and out.latent.shape[1] == 1 + model.num_patches
    torch.testing.assert_close(out.latent, model.encoder.forward_features(noisy))
    torch.testing.assert_close(out.loss, ((out.pred - patchify(images, model.patch)) ** 2).mean())


# --- targets


def test_the_token_loss_is_cross_entropy_by_hand(build: Build) -> None:
    spec = VQTokenizer(7, SIZE, PATCH, 3, width=8, blocks=1, code_width=4).spec
    model = build(target="token", target_spec=spec)
    model.set_statistics((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    images, noise = images_for(model), noise_for(model)
    out = model(images, noise=noise)
    assert isinstance(model.objective, Tokens) and out.pred.shape == (2, 16, 7)
    pixels = images * torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1) + torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1)
    codes = model.objective.made.codes(pixels.clamp(0, 1))
    errors = []
    for image, place in out.mask.nonzero().tolist():
        logits = out.pred[image, place]
        errors.append(-math.log(math.exp(logits[codes[image, place]].item()) / logits.exp().sum().item()))
    assert out.loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_the_target_of_components_is_the_projection(build: Build) -> None:
    pca = PatchPCA(5, PATCH * PATCH * 3, PATCH, 3)
    model = build(target="pca", target_spec=pca.spec)
    rows = torch.linalg.qr(torch.randn(192, 5)).Q.T
    model.load_state_dict(
        {"objective.made.components": rows, "objective.made.mean": torch.full((192,), 0.1)}, strict=False
    )
    images = images_for(model)
    ids = torch.tensor([[2, 5], [0, 1]])
    patches = patchify(images, PATCH)
    found = model.objective(images, patches, ids)
    torch.testing.assert_close(found[1, 1], rows @ (patches[1, 1] - 0.1))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("objective."))


def test_low_pass_keeps_what_is_slow_and_takes_what_is_fast() -> None:
    x = torch.arange(224).double() / 224 * 2 * math.pi
    slow, fast = (10 * x).sin().expand(1, 1, 224, 224), (50 * x).sin().expand(1, 1, 224, 224)
    torch.testing.assert_close(low_pass(slow + fast), slow, rtol=0, atol=1e-5)
    diagonal = (30 * x[:, None] + 30 * x).sin()[None, None]  # 42 cycles along the diagonal
    assert float(low_pass(diagonal).abs().max()) < 1e-5


def test_an_edge_votes_for_its_own_orientation() -> None:
    images = torch.zeros(1, 2, 16, 16)
    images[:, 0, :, 4:] = 1.0  # brighter to the right: gradient of angle 0
    images[:, 1, 4:] = 1.0  # brighter downwards: 90 degrees
    found = hog(images, 8).unflatten(1, (2, HOG_BINS))
    want = torch.zeros(HOG_BINS)
    want[0] = 1
    torch.testing.assert_close(found[0, 0, :, 0, 0], want)
    torch.testing.assert_close(found[0, 1, :, 0, 0], want.roll(4))  # 90 of 180 degrees is in bin 4 of 0 to 8
    assert not found[0, 0, :, 0, 1].any()  # no edge, no vote


def test_histograms_of_a_patch_are_those_of_its_cells(build: Build) -> None:
    model = build(target="hog")
    images = images_for(model)
    ids = torch.tensor([[6], [1]])
    found = model.objective(images, patchify(images, PATCH), ids)
    cells = hog(images, PATCH // 2)
    patch = cells[0, :, 2:4, 4:6]  # row 1, column 2 of 4
    torch.testing.assert_close(found[0, 0], patch.permute(1, 2, 0).flatten())


@pytest.mark.parametrize(
    ("target", "spec", "words"),
    [
        ("pca", None, "--target-from"),
        ("token", None, "--target-from"),
        ("pixel", PatchPCA(5, 192, 8, 3).spec, "a target_spec"),
        ("pca", PatchPCA(5, 48, 4, 3).spec, "patches of 4 px"),
        ("token", VQTokenizer(7, (64, 64), 8, 3, width=8, blocks=1, code_width=4).spec, "8 x 8"),
        ("token", VQTokenizer(7, SIZE, 8, 1, width=8, blocks=1, code_width=4).spec, "channels"),
        ("pca", {"components": 500, "values": 192, "patch": 8, "channels": 3}, "500 of 192"),
    ],
)
def test_a_target_of_other_patches_is_refused(build: Build, target: str, spec: Any, words: str) -> None:
    with pytest.raises(MaekitError) as caught:
        build(target=target, target_spec=spec)
    assert words in str(caught.value)


# --- tokens and positions


@pytest.mark.parametrize("count", [0, 1, 4])
def test_class_tokens_are_as_many_as_asked_for_and_timm_reads_them(build: Build, count: int) -> None:
    model = build(variant={"class_tokens": count})
    assert model.encoder.num_prefix_tokens == count and model.encoder.has_class_token == (count > 0)
    theirs: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0,
        class_token=count > 0, reg_tokens=max(0, count - 1), global_pool="token" if count else "",
    )  # fmt: skip
    theirs.load_state_dict(model.encoder.state_dict())
    images = images_for(model)
    torch.testing.assert_close(theirs.eval().forward_features(images), model.eval().features(images, pool="tokens"))


def test_learned_positions_learn_and_are_resampled(build: Build) -> None:
    model = build(variant={"positions": "learned"})
    model.loss(images_for(model), noise_for(model)).backward()
    for table in (model.encoder.pos_embed, model.decoder.pos_embed):
        assert table is not None and table.grad is not None and 0.015 < float(table.detach().std()) < 0.025
    larger = at_size(model, 64)
    assert larger.decoder.pos_embed.shape[1] == 65
    torch.testing.assert_close(larger.decoder.pos_embed[:, :1], model.decoder.pos_embed[:, :1])


@pytest.mark.parametrize("variant", [{}, {"decoder_kind": "cross"}])
@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (5, 2), (0, 1), (1, 0)])
def test_checkpointing_changes_no_bit_of_a_gradient(
    build: Build, variant: dict[str, Any], blocks: tuple[int, int]
) -> None:
    def gradients(*checkpointing: int) -> dict[str, Tensor]:
        model = build(variant=variant, drop_path=0.5, depth=4, decoder_depth=3).train()
        model.set_checkpointing(*checkpointing)
        torch.manual_seed(2)
        model.loss(images_for(model), noise_for(model)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    one, other = gradients(0, 0), gradients(*blocks)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
