"""Attention of bfloat16 on a CPU against float64 and torch's own; what `auto` takes, and why."""

import contextlib
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maekit.errors import MaekitError
from maekit.model.mae import create_model
from maekit.train.precision import (
    LONGEST,
    attention,
    autocast,
    best_precision,
    kept_casts,
    own_attention,
    resolve_precision,
)

CPU = torch.device("cpu")


def parts(batch: int, heads: int, asks: int, seen: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(batch, n, heads, width, generator=generator).transpose(1, 2) for n in (asks, seen, seen))
    query, key, value = (part.bfloat16() for part in made)
    return query, key, value


def attended(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return what attention gives, and the gradients, as float64."""
    query, key, value = leaves = [part.detach().clone().requires_grad_() for part in inputs]
    out = F.scaled_dot_product_attention(query, key, value)
    (out.double() * torch.arange(out.shape[2]).double().sin()[:, None]).sum().backward()
    return [out.detach().double()] + [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


SHAPES = [
    (3, 2, 5, 5, 8),
    (2, 3, 50, 50, 64),
    (70, 4, 65, 65, 16),
    (2, 2, 9, 17, 8),
    (1, 1, 1, 1, 4),
    (2, 2, 7, LONGEST, 8),
    (2, 3, 500, 500, 8),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_are_as_exact_as_torchs(shape: tuple[int, ...], training: bool) -> None:
    """In training, too, where autocast is on, which would round what the operator multiplies."""
    inputs = parts(*shape)
    exact = attended(tuple(part.double() for part in inputs))
    theirs = attended(inputs)
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with autocast("bf16", CPU) if training else own_attention():
        ours = attended(inputs)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        error, usual = ((found - right).norm() / right.norm().clamp_min(1e-9) for found in (mine, other))
        assert error <= max(float(usual), 0.003), (error, usual)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own checker looks at it
def test_the_operator_keeps_torchs_rules() -> None:
    """Shapes and strides that torch.compile is told are those that come out; gradients are registered."""
    query, key, value = (part.detach().clone().requires_grad_() for part in parts(2, 2, 5, 7, 8))
    torch.library.opcheck(attention, (query, key, value))


@pytest.mark.parametrize(
    ("case", "ours"),
    [({}, True), ({"dtype": torch.float32}, False), ({"is_causal": True}, False), ({"dropout_p": 0.1}, False),
     ({"grad": False}, False), ({"scale": 0.5}, False), ({"seen": LONGEST + 1}, False)],
)  # fmt: skip
def test_only_what_it_is_made_for_goes_there(case: dict[str, Any], ours: bool) -> None:
    query, key, value = parts(2, 2, 5, case.pop("seen", 5), 8)
    learns, dtype = case.pop("grad", True), case.pop("dtype", torch.bfloat16)
    leaf = query.to(dtype).requires_grad_(learns)
    with own_attention():
        out = F.scaled_dot_product_attention(leaf, key.to(dtype), value.to(dtype), **case)
    assert ("maekit_attention" in str(out.grad_fn)) == ours


def test_a_step_in_bf16_keeps_no_more_than_with_torchs_attention() -> None:
    """Counted: what the forward pass leaves for the backward one."""
    model = create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2,
                         decoder_dim=32, decoder_depth=2, decoder_heads=2)  # fmt: skip
    images, noise = torch.randn(8, 3, 32, 32), torch.rand(8, 64)

    def kept(own: bool) -> tuple[int, float]:
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        context = autocast("bf16", CPU) if own else torch.autocast("cpu", torch.bfloat16)
        with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(images, noise)
        loss.backward()
        return sum(held.values()), loss.item()

    (own, loss), (theirs, other) = kept(True), kept(False)
    assert own <= theirs
    assert loss == pytest.approx(other, rel=1e-3)


def test_activations_that_are_computed_anew_in_bf16_change_no_gradient() -> None:
    model = create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
                         decoder_dim=32, decoder_depth=2, decoder_heads=2).train()  # fmt: skip
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)

    def gradients(anew: bool) -> list[Tensor]:
        model.set_checkpointing(int(anew), int(anew))
        model.zero_grad()
        with autocast("bf16", CPU, keep_casts=not anew):
            model.loss(images, noise).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    for plain, anew in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, anew)


@pytest.mark.parametrize("anew", [False, True])
def test_casts_that_are_kept_for_the_next_pass_change_no_gradient(anew: bool) -> None:
    model = create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
                         decoder_dim=32, decoder_depth=2, decoder_heads=2).train()  # fmt: skip
    model.set_checkpointing(int(anew), int(anew))
    images, noise = torch.randn(6, 3, 32, 32), torch.rand(6, 16)

    def gradients(context: Any) -> list[Tensor]:
        model.zero_grad()
        with context:
            for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
                with autocast("bf16", CPU):
                    model.loss(images[part], noise[part]).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    for plain, kept in zip(gradients(contextlib.nullcontext()), gradients(kept_casts(CPU)), strict=True):
        assert torch.equal(plain, kept)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_a_compiled_step_in_bf16_is_the_plain_one() -> None:
    """One graph, and the operator in it."""
    model = create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2,
                         decoder_dim=32, decoder_depth=1, decoder_heads=2).train()  # fmt: skip
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    compiled: Any = torch.compile(model.loss, dynamic=False, fullgraph=True)

    def found(loss: Any) -> list[Tensor]:
        model.zero_grad()
        with autocast("bf16", CPU):
            value = loss(images, noise)
            value.backward()
        return [value.detach(), *(part.grad.clone() for part in model.parameters() if part.grad is not None)]

    for one, other in zip(found(compiled), found(model.loss), strict=True):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-6


@pytest.mark.parametrize(
    ("does", "width", "expected", "words"),
    [({"avx512_bf16": True}, 768, "bf16", "AVX512-BF16"), ({"amx_bf16": True}, 96, "bf16", "AMX"),
     ({"amx_bf16": True}, 64, "fp32", "64 wide"), ({"avx2": True}, 768, "fp32", "neither")],
)  # fmt: skip
def test_auto_follows_the_machine_and_says_why(
    monkeypatch: pytest.MonkeyPatch, does: dict[str, bool], width: int, expected: str, words: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: does)
    chosen, why = best_precision(CPU, width)
    assert chosen == expected and words in why


def test_what_the_device_cannot_do_is_refused() -> None:
    with pytest.raises(MaekitError, match="E-ENV-PRECISION"):
        resolve_precision("fp16", CPU, 64)
