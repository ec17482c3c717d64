"""Heads are those of the official fine-tuning and linear probe (method 3.5, 3.6)."""

import pytest
import timm
import torch
from torch import nn

from maekit.errors import MaekitError
from maekit.model.heads import LinearHead, classifier, freeze_below

from .conftest import Build


def test_trap_12_mean_pooling_puts_a_new_norm_in_the_place_of_the_final_one(build: Build) -> None:
    head = classifier(build(), 7, pool="mean", drop_path=0.1, pretrained=True)
    assert isinstance(head.norm, nn.Identity)
    assert isinstance(head.fc_norm, nn.LayerNorm)
    assert head.fc_norm.eps == 1e-6
    assert bool((head.fc_norm.weight == 1).all())
    assert not head.fc_norm.bias.any()


def test_mean_pooling_is_of_patch_tokens_without_the_prefix(build: Build, kind: str) -> None:
    model = build(kind)
    head = classifier(model, 7, pool="mean", drop_path=0.0, pretrained=True).eval()
    images = torch.randn(2, model.encoder.in_chans, *model.img_size)
    with torch.no_grad():
        tokens = head.forward_features(images)  # not normalised: the norm is after the pool
        pooled = head.fc_norm(tokens[:, head.num_prefix_tokens :].mean(1))
        torch.testing.assert_close(head.forward_head(tokens, pre_logits=True), pooled)
        assert head(images).shape == (2, 7)


def test_class_token_pooling_keeps_the_encoders_own_norm(build: Build) -> None:
    model = build().eval()
    assert isinstance(model.encoder.norm, nn.LayerNorm)
    nn.init.uniform_(model.encoder.norm.weight)
    head = classifier(model, 7, pool="cls", drop_path=0.0, pretrained=True).eval()
    assert isinstance(head.fc_norm, nn.Identity)
    assert isinstance(head.norm, nn.LayerNorm)
    assert torch.equal(head.norm.weight, model.encoder.norm.weight)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        head.forward_head(head.forward_features(images), pre_logits=True), model.features(images, "cls")
    )


def test_pretrained_weights_are_taken_over_and_only_head_and_norm_are_new(build: Build, kind: str) -> None:
    model = build(kind)
    with torch.no_grad():  # told apart from any start
        for parameter in model.encoder.parameters():
            parameter.add_(0.5)
    theirs = model.encoder.state_dict()
    ours = classifier(model, 7, pool="mean", drop_path=0.0, pretrained=True).state_dict()
    new = {name for name in ours if name not in theirs}
    assert new == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(theirs) - set(ours) == {"norm.weight", "norm.bias"}
    for name in ours.keys() & theirs.keys():
        assert torch.equal(ours[name], theirs[name]), name


def test_from_scratch_shares_nothing_with_the_pretrained_but_the_positions(build: Build, kind: str) -> None:
    model = build(kind)
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if name != "pos_embed":
                parameter.add_(0.5)
    ours = classifier(model, 7, pool="mean", drop_path=0.0, pretrained=False).state_dict()
    theirs = model.encoder.state_dict()
    assert torch.equal(ours["pos_embed"], theirs["pos_embed"])
    for name in (ours.keys() & theirs.keys()) - {"pos_embed"}:
        assert not torch.equal(ours[name], theirs[name]), name


def test_the_pretrained_model_is_left_as_it_was(build: Build) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = classifier(model, 7, pool="mean", drop_path=0.3, pretrained=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.encoder.pos_embed is not None
    assert not model.encoder.pos_embed.requires_grad


def test_everything_trains_positions_too(build: Build, kind: str) -> None:
    # D6: lightly leaves class token and positions out
    head = classifier(build(kind), 7, pool="mean", drop_path=0.0, pretrained=True)
    assert all(parameter.requires_grad for parameter in head.parameters())
    images = torch.randn(2, head.in_chans, *(head.patch_embed.img_size or ()))
    assert isinstance(head.head, nn.Linear)
    nn.init.normal_(head.head.weight)
    head(images).square().sum().backward()
    assert head.pos_embed is not None
    assert head.pos_embed.grad is not None
    assert bool(head.pos_embed.grad.any())


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_head_starts_near_zero(build: Build, pretrained: bool) -> None:
    head = classifier(build(), 1000, pool="mean", drop_path=0.0, pretrained=pretrained).head
    assert isinstance(head, nn.Linear)
    assert float(head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert not head.bias.any()


def test_drop_path_rises_linearly_over_the_blocks(build: Build) -> None:
    # D5: lightly applies none
    head = classifier(build(depth=3), 7, pool="mean", drop_path=0.2, pretrained=True)
    for branch in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, branch), "drop_prob", 0.0) for block in head.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_it_is_a_plain_timm_model(build: Build) -> None:
    head = classifier(build(), 7, pool="mean", drop_path=0.0, pretrained=True)
    assert type(head) is timm.models.vision_transformer.VisionTransformer
    assert head.num_classes == 7


def test_a_class_token_that_is_not_there_is_refused(build: Build) -> None:
    for pool in ("cls", "max"):
        with pytest.raises(MaekitError) as caught:
            classifier(build("no class token"), 7, pool=pool, drop_path=0.0, pretrained=True)
        assert caught.value.code == "E-CONFIG-POOL"


def test_trap_11_the_linear_head_is_a_batch_norm_without_affine_part_and_a_linear_layer() -> None:
    head = LinearHead(64, 500)
    norm, linear = head.children()
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.affine, norm.eps) == (False, 1e-6)
    assert isinstance(linear, nn.Linear)
    assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert not linear.bias.any()
    assert len(list(head.parameters())) == 2
    features = torch.randn(32, 64) * 9 + 4
    want = torch.nn.functional.batch_norm(features, None, None, training=True, eps=1e-6) @ linear.weight.T
    torch.testing.assert_close(head(features), want, rtol=1e-4, atol=1e-5)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("blocks", [0, 0.5, 1, 2])
def test_only_the_last_blocks_head_and_norm_are_trained(build: Build, blocks: float, pool: str) -> None:
    head = classifier(build(), 7, pool=pool, drop_path=0.3).train()
    depth, norm = len(head.blocks), "fc_norm." if pool == "mean" else "norm."
    freeze_below(head, blocks)
    expected = {name for name, _ in head.named_parameters() if name.startswith(("head.", norm))}
    whole = tuple(f"blocks.{i}." for i in range(depth - int(blocks), depth))
    half = (f"blocks.{depth - 1}.norm2.", f"blocks.{depth - 1}.mlp.") if blocks == 0.5 else ()
    expected |= {name for name, _ in head.named_parameters() if name.startswith((*whole, *half)) and (whole or half)}
    assert trained(head) == expected
    for name, part in head.named_modules():
        if list(part.parameters()) and not list(part.children()):
            assert part.training == bool(trained(part)), name


def test_as_many_blocks_as_there_are_leave_only_the_embeddings_frozen(build: Build) -> None:
    head = classifier(build(), 7).train()
    everything = trained(head)
    freeze_below(head, len(head.blocks))
    assert {name.split(".")[0] for name in everything - trained(head)} == {"cls_token", "pos_embed", "patch_embed"}


def test_nothing_is_dropped_in_frozen_blocks_and_something_in_trained_ones(build: Build) -> None:
    head = classifier(build(), 7, drop_path=0.9).train()
    nn.init.normal_(head.get_classifier().weight)  # type: ignore[arg-type]
    images = torch.randn(4, head.patch_embed.proj.in_channels, *head.patch_embed.img_size)  # type: ignore[misc]
    freeze_below(head, 0)
    with torch.no_grad():
        assert torch.equal(head(images), head(images))
        assert torch.equal(head(images), head.eval()(images))
    freeze_below(head, 1)
    with torch.no_grad():
        assert len({float(head(images).sum()) for _ in range(8)}) > 1


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_frozen_part_keeps_no_activations_and_gets_no_gradients(build: Build, pool: str) -> None:
    """Oracle: what autograd packs away in a forward pass, in bytes, falls with each frozen part, to almost nothing."""
    kept: list[int] = []
    for blocks in ("all", 2, 1, 0.5, 0):
        head = classifier(build(), 7, pool=pool).train()
        if not isinstance(blocks, str):
            freeze_below(head, blocks)
        own = {p.untyped_storage().data_ptr() for p in head.parameters()}
        seen: dict[int, int] = {}

        def pack(value: torch.Tensor, own: set[int] = own, seen: dict[int, int] = seen) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return value

        images = torch.randn(2, head.patch_embed.proj.in_channels, *head.patch_embed.img_size)  # type: ignore[misc]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            head(images).sum().backward()
        kept.append(sum(seen.values()))
        assert {name for name, p in head.named_parameters() if p.grad is not None} == trained(head)
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 5 and kept[-1] < 0.1 * kept[0], kept


@pytest.mark.parametrize("blocks", [-1, 0.25, 1.5, 99, 1e12])
def test_blocks_that_a_model_has_not_are_refused(build: Build, blocks: float) -> None:
    with pytest.raises(MaekitError, match="tune_blocks") as caught:
        freeze_below(classifier(build(), 7), blocks)
    assert caught.value.code == "E-CONFIG-BLOCKS"
