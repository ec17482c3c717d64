"""What a user may rely on of the whole model."""

import json
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from maekit.errors import MaekitError
from maekit.model.encoder import encode
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.patches import patchify
from maekit.model.targets import target_of

from .conftest import TINY, Build


def images_for(model: MaskedAutoencoder, batch: int = 2) -> Tensor:
    size = (batch, model.encoder.in_chans, *model.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(5))


# --- the loss


def test_trap_5_normalised_pixels_use_the_unbiased_variance_and_eps_inside_the_root(build: Build) -> None:
    model = build("one channel").double()
    images, noise = images_for(model).double(), torch.rand(2, model.num_patches)
    out = model(images, noise=noise)
    flat = patchify(images, model.patch)
    values = flat.shape[-1]
    errors = []
    for image in range(2):
        for place in out.mask[image].nonzero().flatten():
            patch = flat[image, place]
            variance = sum((v - patch.mean()) ** 2 for v in patch) / (values - 1)
            want = (patch - patch.mean()) / math.sqrt(float(variance) + 1e-6)
            errors.append(((out.pred[image, place] - want) ** 2).mean())
    torch.testing.assert_close(out.loss, torch.stack(errors).mean())


def test_trap_10_the_loss_is_masked_error_over_number_of_masked_patches(build: Build) -> None:
    model = build(target="pixel").double()
    images = images_for(model).double()
    out = model(images)
    error = ((out.pred - patchify(images, model.patch)) ** 2).mean(-1)
    torch.testing.assert_close(out.loss, (error * out.mask).sum() / out.mask.sum())


@pytest.mark.parametrize("target", ["pixel", "norm_pixel"])
def test_visible_patches_never_enter_as_targets(build: Build, target: str) -> None:
    model = build(target=target)
    images, noise = images_for(model), torch.rand(2, model.num_patches)
    out = model(images, noise=noise)
    (grad,) = torch.autograd.grad(out.loss, out.pred)
    assert not grad[~out.mask].any()
    assert bool((grad[out.mask].abs().amax(-1) > 0).all())


def test_removed_pixels_never_reach_the_encoder_or_the_predictions(build: Build, kind: str) -> None:
    model = build(kind).eval()
    images = images_for(model).requires_grad_()
    out = model(images, 0.7)
    for value in (out.latent, out.pred):
        (grad,) = torch.autograd.grad(value.square().sum(), images, retain_graph=True)
        seen = patchify(grad, model.patch).abs().amax(-1) > 0
        assert torch.equal(seen, ~out.mask)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e4])
def test_constant_images_give_a_finite_loss_and_gradients(build: Build, value: float) -> None:
    model = build()
    loss = model.loss(torch.full((2, 3, 32, 32), value))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [None, 0.0])
def test_many_small_patches_of_which_hardly_one_stays_give_finite_numbers(
    dtype: torch.dtype, value: float | None
) -> None:
    """F39: 784 tokens, one of them visible, also under autocast, also all black."""
    model = create_model(
        "vit_tiny_patch16_224", img_size=112, patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_dim=16,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    images = torch.randn(2, 3, 112, 112) if value is None else torch.full((2, 3, 112, 112), value)
    for ratio in (1e-6, 0.75, 0.9987):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(images, mask_ratio=ratio)
        model.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for ratio in (0.0, 0.9999, 1.0):
        with pytest.raises(MaekitError, match="E-CONFIG-MASK"):
            model.loss(images, mask_ratio=ratio)


def test_an_image_of_one_patch_is_refused() -> None:
    """F39: nothing could be removed and something kept."""
    model = create_model(
        "vit_tiny_patch16_224", img_size=16, embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1,
        decoder_heads=2,
    )  # fmt: skip
    with pytest.raises(MaekitError, match="E-CONFIG-MASK"):
        model.loss(torch.randn(1, 3, 16, 16))


def test_normalised_pixels_do_not_see_brightness_or_contrast(build: Build) -> None:
    patches = torch.randn(2, 3, 48, dtype=torch.float64)
    torch.testing.assert_close(
        target_of(patches * 7 + 3, "norm_pixel"), target_of(patches, "norm_pixel"), rtol=0, atol=1e-5
    )


def test_trap_8_the_class_token_goes_through_the_decoder(build: Build) -> None:
    # D11: stable-pretraining drops it, so official weights cannot be used
    model = build().eval()
    keep = torch.tensor([[0, 3, 5, 9]])
    latent = torch.randn(1, 5, 24)
    changed = latent.clone()
    changed[:, 0] += 1
    one, other = (model.decoder.predict(model.decoder(value, keep)) for value in (latent, changed))
    assert one.shape == (1, 16, 192)
    assert float((one - other).detach().abs().amax(-1).min()) > 1e-4


def test_trap_8_removed_places_hold_mask_token_and_position_only(build: Build) -> None:
    model = build()
    seen: list[Tensor] = []
    handle = model.decoder.blocks.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    keep = torch.tensor([[9, 0, 3]])
    latent = torch.randn(1, 4, 24)
    model.decoder(latent, keep)
    handle.remove()
    tokens = (seen[0] - model.decoder.pos_embed)[0]
    projected = model.decoder.embed(latent)[0]
    torch.testing.assert_close(tokens[0], projected[0])
    for place in range(16):
        want = projected[1 + [9, 0, 3].index(place)] if place in (9, 0, 3) else model.decoder.mask_token[0, 0]
        torch.testing.assert_close(tokens[1 + place], want)


def test_every_prediction_is_in_image_order(build: Build) -> None:
    model = build().eval()
    images, noise = images_for(model), torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    out = model(images, noise=noise)
    again = model(images, mask=out.mask)  # the kept patches go in in another order: nothing may depend on it
    torch.testing.assert_close(again.pred, out.pred, rtol=1e-4, atol=1e-5)


def test_it_learns_one_batch_by_heart(build: Build) -> None:
    model = build(target="pixel")
    images, noise = images_for(model, 1) * 0.5, torch.rand(1, 16, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = float(model.loss(images, noise).detach())
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(images, noise).backward()
        optimizer.step()
    assert float(model.loss(images, noise).detach()) < 0.05 * first


# --- features


def test_defect_10_features_are_timms_own_and_never_masked(build: Build, kind: str) -> None:
    model = build(kind).eval()
    images = images_for(model)
    with torch.no_grad():
        tokens = model.features(images, "tokens")
        torch.testing.assert_close(tokens, model.encoder.forward_features(images))
        assert torch.equal(model.features(images, "tokens"), tokens)
        prefix = model.encoder.num_prefix_tokens
        assert tokens.shape == (2, prefix + model.num_patches, 24)
        torch.testing.assert_close(model.features(images, "mean"), tokens[:, prefix:].mean(1))
        if model.encoder.has_class_token:
            torch.testing.assert_close(model.features(images, "cls"), tokens[:, 0])


def test_the_sparse_encoder_on_all_patches_is_timms_encoder(build: Build, kind: str) -> None:
    model = build(kind).double().eval()
    images = images_for(model).double()
    everything = torch.arange(model.num_patches).expand(2, -1)
    found = encode(model.encoder, patchify(images, model.patch), everything)
    torch.testing.assert_close(found, model.encoder.forward_features(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind_of", "pool"), [("plain", "avg"), ("no class token", "cls"), ("registers, no class token", "cls")]
)
def test_a_pool_that_is_not_there_is_refused(build: Build, kind_of: str, pool: str) -> None:
    model = build(kind_of)
    with pytest.raises(MaekitError) as caught:
        model.features(images_for(model), pool)
    assert caught.value.code == "E-CONFIG-POOL"


def test_images_of_another_shape_are_refused(build: Build) -> None:
    model = build()
    for shape in ((2, 3, 32, 40), (2, 1, 32, 32), (3, 32, 32), (2, 3, 64, 64)):
        for use in (model, model.loss, model.features):
            with pytest.raises(MaekitError, match="32, 32"):
                use(torch.zeros(shape))


# --- building


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "vit_base_r50_s16_224",
        "vit_small_r26_s32_224",
        "vit_relpos_base_patch16_224",
        "deit_base_distilled_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "swin_tiny_patch4_window7_224",
        "beit_base_patch16_224",
        "vit_small_patch16_rope_224",
        "cait_xxs24_224",
        "vitamin_small_224",
        "vit_base_patch16_223",
        "",
        "../vit",
        "hf_hub:someone/something",
    ],
)
def test_all_but_plain_vision_transformers_are_refused_by_name(name: str) -> None:
    with pytest.raises(MaekitError) as caught:
        create_model(name)
    assert caught.value.code == "E-CONFIG-MODEL"
    assert not name or name in str(caught.value)


def test_a_typo_is_answered_with_the_name_that_was_meant() -> None:
    with pytest.raises(MaekitError, match="did you mean 'vit_base_patch16_224'"):
        create_model("vit_bse_patch16_224")


def test_the_encoder_is_a_plain_timm_model_that_timm_rebuilds(build: Build, kind: str) -> None:
    model = build(kind)
    assert type(model.encoder) is timm.models.vision_transformer.VisionTransformer
    assert isinstance(model.encoder.head, nn.Identity)
    spec = model.spec
    wanted: dict[str, Any] = {key: spec[key] for key in ("patch_size", "embed_dim", "depth", "num_heads") if spec[key]}
    wanted |= {"img_size": tuple(spec["img_size"]), "in_chans": spec["in_chans"], "num_classes": 0, "fc_norm": False}
    if not model.encoder.has_class_token:
        wanted["global_pool"] = ""
    again = timm.create_model(spec["name"], **wanted)
    again.load_state_dict(model.encoder.state_dict())


def test_the_spec_is_json_and_builds_the_same_model(build: Build, kind: str) -> None:
    model = build(kind, target="pixel", drop_path=0.1)
    again = create_model(**json.loads(json.dumps(model.spec)))
    assert again.spec == model.spec
    assert (again.mean, again.std, again.grid, again.patch) == (model.mean, model.std, model.grid, model.patch)
    again.load_state_dict(model.state_dict())


def test_channels_bring_their_statistics(build: Build) -> None:
    assert build().mean == (0.485, 0.456, 0.406)
    assert build("five channels").std == (0.5,) * 5
    assert build(mean=(0.1, 0.2, 0.3), std=(1, 1, 1)).spec["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"img_size": 33},
        {"img_size": (32, 36)},
        {"img_size": 0},
        {"img_size": -8},
        {"img_size": 4},
        {"patch_size": 0},
        {"in_chans": 0},
        {"embed_dim": 25},
        {"embed_dim": 0},
        {"num_heads": 5},
        {"num_heads": 0},
        {"depth": 0},
        {"depth": -1},
        {"drop_path": 1.5},
        {"drop_path": -0.1},
        {"decoder_dim": 18},
        {"decoder_heads": 3},
        {"decoder_heads": 0},
        {"decoder_depth": 0},
        {"target": "pixels"},
        {"mean": (0.5,)},
        {"std": (0.5, 0.5, 0.0)},
        {"std": (0.5, float("nan"), 0.5)},
    ],
    ids=str,
)
def test_sizes_that_cannot_work_are_refused_with_the_setting_named(wrong: dict[str, Any]) -> None:
    base = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, **TINY}
    with pytest.raises(MaekitError) as caught:
        create_model(**{**base, **wrong})
    assert caught.value.code.startswith("E-CONFIG-")
    named = {"in_chans": "channels"}.get(next(iter(wrong)), next(iter(wrong)))
    assert named in str(caught.value)


def test_a_patch_of_one_value_has_no_variance_to_normalise_with() -> None:
    with pytest.raises(MaekitError) as caught:
        create_model("vit_tiny_patch16_224", img_size=8, patch_size=1, in_chans=1, **TINY)
    assert caught.value.code == "E-CONFIG-TARGET"


def test_drop_path_rises_linearly_to_its_value(build: Build) -> None:
    # D8: solo-learn rebuilds its blocks and drops the setting
    model = build(depth=4, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert all(isinstance(block.drop_path1, nn.Identity) for block in model.decoder.blocks)
    assert all(isinstance(block.drop_path1, nn.Identity) for block in build().encoder.blocks)


# --- other ways to compute


@pytest.mark.parametrize("name", [pytest.param("forward", marks=pytest.mark.slow), "loss"])
def test_it_compiles_without_a_graph_break_and_stays_equal(build: Build, name: str) -> None:
    # D12: a .item() or an assert on a tensor would break the graph
    model = build(depth=1, decoder_depth=1)
    images, noise = images_for(model), torch.rand(2, 16)
    torch._dynamo.reset()
    counters.clear()

    def run(images: Tensor, noise: Tensor) -> Tensor:
        return model(images, noise=noise).loss if name == "forward" else model.loss(images, noise)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(images, noise)
    expected = run(images, noise)
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled, expected)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    for which, one, other in zip(
        names, torch.autograd.grad(compiled, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda text, which=which: f"{which}: {text}")
    torch._dynamo.reset()


def test_under_bfloat16_the_loss_is_finite_float32_and_near(build: Build) -> None:
    for target in ("pixel", "norm_pixel"):
        model = build(target=target)
        images, noise = images_for(model), torch.rand(2, 16)
        exact = model.loss(images, noise)
        with torch.autocast("cpu", torch.bfloat16):
            forward, loss = model(images, noise=noise).loss, model.loss(images, noise)
        for found in (forward, loss):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_images_in_half_precision_are_scored_in_float32(build: Build) -> None:
    model = build().bfloat16()
    out = model(images_for(model).bfloat16())
    assert out.loss.dtype == torch.float32
    assert torch.isfinite(out.loss)


def test_one_image_and_extreme_ratios_work(build: Build) -> None:
    model = build()
    for ratio, keep in ((1 / 16, 15), (15 / 16, 1)):
        out = model(images_for(model, 1), ratio)
        assert int((~out.mask).sum()) == keep
        assert torch.isfinite(out.loss)
