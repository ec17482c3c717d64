"""What one pre-training step makes and copies: counted operation by operation, not timed, so that no machine is needed.

Multiplications are counted in test_flops.py. Here every operation below autograd is looked at: which tensors it made
(views make none), how many rows they have, and whether it only moved or cast what was there. The sizes are chosen so
that a number says what it is: 3 images of 77 patches (78 with the class token), of which 19 are kept (20) and 58
removed; 231 and 234, 57 and 60, and 174 are the same times 3.
"""

from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.model.pca import PatchPCA
from maekit.model.tokenizer import DalleEncoder, VQTokenizer
from maekit.train.precision import autocast

CPU = torch.device("cpu")
LONG = {77, 78, 231, 234}
"""Numbers of rows of a tensor that has all patches."""
ENCODER_WIDTHS = {52, 156, 208, 13}
"""Of tokens, of queries with keys and values, inside the MLP, of a head."""
MOVES = {"_to_copy", "clone", "copy_", "cat", "stack", "gather", "scatter", "scatter_add", "index_select", "embedding"}
DEPTH = 2
"""Blocks of the encoder, and of the decoder."""


class Done(NamedTuple):
    """One operation.

    Attributes:
        name: of the operation, less its overload.
        part: of the model in which it ran.
        given: shapes of its tensors.
        made: shapes of the tensors that it allocated.
        source: storage of its first tensor.
        kinds: types before and after, of what it made from its first tensor.
    """

    name: str
    part: str
    given: list[tuple[int, ...]]
    made: list[tuple[int, ...]]
    source: int
    kinds: tuple[torch.dtype, ...]


class Watch(TorchDispatchMode):
    """Notes every operation that runs while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.done = "encoder", []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note it."""
        out = func(*args, **(kwargs or {}))
        given = tensors(args)
        held = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = [tensor for tensor in tensors(out) if tensor.untyped_storage().data_ptr() not in held]
        if given:
            kinds = (given[0].dtype, *(tensor.dtype for tensor in made))
            name = func.name().split("::")[1].partition(".")[0]
            self.done.append(
                Done(name, self.part, shapes(given), shapes(made), given[0].untyped_storage().data_ptr(), kinds)
            )
        return out


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results."""
    if isinstance(values, Tensor):
        return [values]
    return [one for value in values for one in tensors(value)] if isinstance(values, list | tuple) else []


def shapes(some: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in some]


def build(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": (28, 44), "patch_size": 4, "in_chans": 2, "embed_dim": 52, "depth": DEPTH, "num_heads": 4,
        "decoder_dim": 28, "decoder_depth": DEPTH, "decoder_heads": 2,
    }  # fmt: skip
    return create_model("vit_tiny_patch16_224", **{**sizes, **changes}).train()


def watched(model: MaskedAutoencoder, precision: str = "fp32") -> list[Done]:
    """Run a step's passes; the parts follow one another, and what comes after the loss is "backward"."""
    watch, decoder = Watch(), model.decoder
    blocks: Any = decoder.blocks

    def enters(part: str) -> Any:
        return lambda *_: setattr(watch, "part", part)

    hooks = [
        model.encoder.norm.register_forward_hook(enters("placing")),
        *(block.norm1.register_forward_pre_hook(enters(f"block {i}")) for i, block in enumerate(blocks)),
        decoder.norm.register_forward_pre_hook(enters("prediction")),
        decoder.pred.register_forward_hook(enters("loss")),
    ]
    images, noise = torch.randn(3, 2, 28, 44), torch.rand(3, 77)
    with autocast(precision, CPU), watch:
        loss = model.loss(images, noise)
        watch.part = "backward"
        loss.backward()
    for hook in hooks:
        hook.remove()
    return watch.done


def is_long(shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor has a row for every patch, or a grid of them."""
    return bool(LONG & set(shape)) or (7, 11) in pairwise(shape)


def long_ones(done: list[Done], part: str) -> Counter[str]:
    """Count the operations in a part that made a tensor with a row for every patch."""
    return Counter(one.name for one in done if one.part == part and any(map(is_long, one.made)))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    """Run the test in both."""
    return request.param


@pytest.fixture(scope="module")
def step(precision: str) -> list[Done]:
    """Return the operations of a step of the paper's default row."""
    return watched(build(), precision)


# ------------------------------------------------------------------------------- tensors of full length


def test_the_encoder_makes_nothing_of_full_length_but_patches_and_their_order(step: list[Done]) -> None:
    # the one copy of the images as patches; the sorted noise and its order
    assert long_ones(step, "encoder") == {"clone": 1, "sort": 1}
    # also not on the way back, where the parts are known by their widths; images get no gradient (32 values a patch)
    back = [shape for one in step if one.part == "backward" for shape in one.made]
    assert not [shape for shape in back if is_long(shape) and shape[-1] in ENCODER_WIDTHS | {32}]


def test_patches_are_chosen_before_they_are_embedded(step: list[Done]) -> None:
    products = [one for one in step if one.part == "encoder" and one.name in ("addmm", "mm", "convolution")]
    assert products[0].name == "addmm" and products[0].given[1] == (57, 32)
    assert {one.given[1][0] for one in products[1:]} == {60} and len(products) == 1 + 4 * DEPTH


def test_the_decoder_is_of_full_length_as_often_as_it_has_to_be(step: list[Done]) -> None:
    # places filled, the class token put before, positions added
    assert long_ones(step, "placing") == {"scatter": 1, "cat": 1, "add": 1}
    whole = Counter(one for one in long_ones(step, "block 0").elements() if one not in MOVES)
    attention = next(name for name in whole if "attention" in name)
    assert whole == {"native_layer_norm": 2, "addmm": 4, attention: 1, "gelu": 1, "add": 2}


def test_the_last_block_makes_keys_and_values_of_all_and_the_rest_of_what_was_removed(step: list[Done]) -> None:
    last = [one for one in step if one.part == "block 1" and one.name not in MOVES]
    assert Counter(one.name for one in last if any(map(is_long, one.made))) == {"native_layer_norm": 1, "addmm": 1}
    assert [one.made[0] for one in last if one.name == "addmm"] == [
        (174, 28), (234, 56), (174, 28), (174, 112), (174, 28)
    ]  # fmt: skip


def test_prediction_target_and_loss_are_of_removed_patches_only(step: list[Done]) -> None:
    assert not long_ones(step, "prediction") and not long_ones(step, "loss")
    (head,) = [one for one in step if one.part == "prediction" and one.name == "addmm"]
    (statistics,) = [one for one in step if one.name == "var_mean"]
    assert head.made == [(174, 32)] and statistics.given == [(3, 58, 32)]


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_decoder_of_some_patches_is_nowhere_of_full_length(kind: str) -> None:
    model = build(variant={"decode_ratio": 0.25, "decoder_kind": kind})
    with Watch() as watch:
        model.loss(torch.randn(3, 2, 28, 44), torch.rand(3, 77))
    # beside the patches numbers of the noise, to sort and to choose by
    made = Counter(one.name for one in watch.done if any(map(is_long, one.made)))
    assert made == {"clone": 1, "sort": 1, "mul": 1, "remainder": 1}


# ------------------------------------------------------------------------------------------ what waits

GOALS: dict[str, dict[str, Any]] = {
    **{target: {"target": target} for target in ("pixel", "norm_pixel", "low_pass", "hog")},
    "pca": {"target": "pca", "target_spec": PatchPCA(4, 32, 4, 2).spec},
    "vq": {"target": "token", "target_spec": VQTokenizer(8, (28, 44), 4, 2).spec},
    "dalle": {"target": "token", "target_spec": DalleEncoder(8, 2, 8, 2, 1, (7, 11)).spec},
}  # fmt: skip
DRAWN: dict[str, dict[str, Any]] = {
    **{kind: {"mask_kind": kind} for kind in ("random", "block", "centre", "given")},
    "none": {"mask_kind": "none", "loss_on": "all", "add_noise": 0.3},
    "learned positions": {"positions": "learned"},
    "some": {"decode_ratio": 0.25},
}


@pytest.mark.parametrize("changes", GOALS.values(), ids=GOALS)
def test_no_target_fetches_a_number_or_hands_one_over(changes: dict[str, Any]) -> None:
    assert not waits(build(**changes))


@pytest.mark.parametrize("variant", DRAWN.values(), ids=DRAWN)
def test_no_mask_fetches_a_number_or_hands_one_over(variant: dict[str, Any]) -> None:
    assert not waits(build(variant=variant))


def waits(model: MaskedAutoencoder) -> list[str]:
    """Return the operations of a step for which a GPU would be waited: a number read, or a tensor made of some."""
    given = model.variant.mask_kind == "given"
    with Watch() as watch:
        model.loss(torch.randn(3, 2, 28, 44), torch.rand(3, 77), 0.75, torch.rand(3, 77) if given else None).backward()
    return [one.name for one in watch.done if one.name in ("_local_scalar_dense", "lift_fresh", "nonzero")]


# ------------------------------------------------------------------------------------------------ copies


def test_what_is_moved_and_not_computed(step: list[Done], precision: str) -> None:
    """Upper bounds for a step with DEPTH blocks in encoder and decoder; casts are counted below."""
    timms_blocks = 2 * DEPTH - 1  # all but the decoder's last
    bound = Counter(
        # images as patches; gradients of queries, keys and values of timm's blocks, stacked and then in the layer's
        # order (torch's way back through timm's reshape, permute and unbind); the kernel in the order of patches, and
        # its gradient in that of the kernel
        clone=1 + timms_blocks + 2,
        stack=timms_blocks,
        copy_=1,
        # prefix tokens together, before the visible ones and before all; back: latent of class token and patches;
        # in the last block keys with values, and its weight and bias of queries with the rest
        cat=3 + 1 + 3,
        # visible patches, removed patches; in the last block what is asked and what it is added to; back: placing
        gather=2 + 2 + 1,
        # placing, and back
        scatter=1 + 1,
        # back, of the two gathers of the last block
        scatter_add=2,
        # positions of visible patches
        embedding=1,
    )
    found = Counter(one.name for one in step if one.name in MOVES and one.name != "_to_copy")
    assert not found - bound, found - bound


@pytest.mark.parametrize("channels", [1, 2])
def test_the_gradient_of_the_patch_kernel_lies_as_the_kernel_does(channels: int) -> None:
    """DistributedDataParallel copies others, and warns."""
    model = build(in_chans=channels)
    model.loss(torch.randn(3, channels, 28, 44), torch.rand(3, 77)).backward()
    kernel: Any = model.encoder.patch_embed.proj.weight
    assert kernel.grad.stride() == kernel.stride()


def test_fp32_casts_nothing() -> None:
    assert not [one for one in watched(build()) if one.name == "_to_copy"]


def test_bf16_casts_weights_once_and_activations_where_products_begin_and_norms_end() -> None:
    model = build()
    done = [one for one in watched(model, "bf16") if one.name == "_to_copy"]
    maps = [part for part in model.modules() if isinstance(part, nn.Linear)]
    weights = {parameter.untyped_storage().data_ptr() for part in maps for parameter in part.parameters()}
    weights.add(model.encoder.patch_embed.proj.bias.untyped_storage().data_ptr())  # type: ignore[union-attr]
    down, up = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)

    found = Counter(one.source for one in done if one.part != "backward" and one.source in weights)
    last: Any = model.decoder.blocks[-1]  # type: ignore[index]
    halves = {parameter.untyped_storage().data_ptr() for parameter in last.attn.qkv.parameters()}
    assert found == {one: 2 if one in halves else 1 for one in weights}  # the halves of one map, each once

    activations = [one for one in done if one.source not in weights and one.made[0][0] == 3]
    forward = Counter(one.kinds for one in activations if one.part != "backward")
    # down: what the norms of a block give (two); in the last block what is asked, too; patches, latent, before the
    # head. up: the decoder's first tokens, the prediction
    assert forward == {down: 2 * 2 * DEPTH + 1 + 3, up: 2}
    backward = Counter(one.kinds for one in activations if one.part == "backward")
    # their opposites, less that of the patches; and a gradient of the residual sum enters each of two branches
    assert backward == {up: 2 * 2 * DEPTH + 1 + 2, down: 2 * 2 * DEPTH + 3}

    gradients = [one for one in done if one.part == "backward" and one not in activations]
    assert Counter(one.kinds for one in gradients) == {up: len(weights) + 3}  # the kernel, and twice two halves


def test_what_is_computed_anew_casts_no_weight_again() -> None:
    model = build()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    casts = []
    for anew in (False, True):
        model.set_checkpointing(int(anew), int(anew))
        done = watched(model, "bf16")
        casts.append(Counter(one.source for one in done if one.name == "_to_copy" and one.source in weights))
    more = casts[1] - casts[0]
    last: Any = model.decoder.blocks[-1]  # type: ignore[index]
    assert set(more) <= {parameter.untyped_storage().data_ptr() for parameter in last.attn.qkv.parameters()}
