"""How many images a pass may have: what is kept is counted as torch keeps it, for every variant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.train import memory
from maekit.train.memory import Kept, Passes
from maekit.train.precision import autocast

CPU = torch.device("cpu")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "decoder_dim": 32,
         "decoder_depth": 2, "decoder_heads": 2}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "computed anew": {},
    "computed anew by two": {},
    "computed anew in the encoder": {},
    "drop path": {"drop_path": 0.2},
    "low pass": {"target": "low_pass"},
    "hog": {"target": "hog"},
    **{
        f"{name} {value}": {"variant": {name: value}}
        for name, value in (
            ("encoder_mask_token", True), ("decode_ratio", 0.5), ("decoder_kind", "cross"), ("mask_kind", "block"),
            ("mask_kind", "grid"), ("mask_kind", "centre"), ("mask_unit", 2), ("loss_on", "all"),
            ("add_noise", 0.1), ("positions", "learned"), ("class_tokens", 3),
        )
    },
}  # fmt: skip


def build(name: str) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", **SIZES, **VARIANTS[name]).train()
    if name.startswith("computed anew"):
        model.set_checkpointing(2 if "two" in name else 1, 0 if "encoder" in name else 1)
    return model


def passes(model: MaskedAutoencoder) -> Passes:
    return Passes(
        model, lambda images: model.loss(torch.randn(images, 3, 32, 32), torch.rand(images, 16)), 16, 3 * 32 * 32
    )


def really_kept(model: MaskedAutoencoder, images: int, precision: str) -> int:
    """Return the bytes that a real pass keeps beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision, CPU):
        loss = passes(model).loss(images)
    assert loss.isfinite()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in VARIANTS), *((name, "bf16") for name in ("the paper's", "computed anew"))],
)
def test_what_is_counted_without_contents_is_what_a_pass_keeps(name: str, precision: str) -> None:
    model = build(name)
    state = torch.random.get_rng_state()
    found = passes(model).kept(precision)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    four, two = (really_kept(model, images, precision) for images in (4, 2))
    assert found.per_image == pytest.approx((four - two) / 2, rel=0.02)
    trained = 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.fixed >= trained and passes(model).at_most(4) - trained > four  # so that small models are left alone


def test_less_is_kept_where_activations_are_computed_anew_or_half_as_wide() -> None:
    plain, anew = build("the paper's"), build("computed anew")
    whole = passes(plain).kept("fp32").per_image
    assert passes(anew).kept("fp32").per_image < whole / 2
    assert passes(plain).kept("bf16").per_image < 0.7 * whole


def test_images_fill_their_share_of_the_memory_and_are_never_none() -> None:
    assert Kept(fixed=1000, per_image=10).images(10_000) == 500
    assert Kept(fixed=1000, per_image=10).images(100) == 1


def test_a_container_has_what_it_is_allowed_shared_by_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = memory.memory_of(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "memory.max")
    assert memory.memory_of(CPU) >= whole > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.memory_of(CPU) == 250_000
