"""Where the encoder looks: attention of each head, and rollout through all blocks.

timm's attention runs fused and keeps no weights, and its modules stay as they are: a hook reads what goes into
``blocks.i.attn`` and the weights are computed once more from it. One image at a time, block by block, so that no more
than one block's (heads, T, T) is held.

B batch, T tokens with prefix, N patches, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maekit.errors import MaekitError
from maekit.model.mae import MaskedAutoencoder
from maekit.report.gallery import SHOWN_SIDE, Part, framed, heat
from maekit.report.grids import reconstruction_grid
from maekit.report.page import Table

MOST_HEADS = 16
"""Heads that are drawn; ViT-L and -H have 16."""
Place = tuple[int, int]
"""Row and column of a patch, from 0."""


@dataclass(frozen=True)
class Attended:
    """Attention of some images; queries are the class token, where there is one, and then the places asked for.

    Attributes:
        queries: what each is called.
        heads: block -> (B, Q, heads, T), weights over all tokens, each row of sum 1.
        rollout: (B, Q, T).
        distance: (blocks, heads), mean distance in patches from a patch to those it attends to.
        prefix: (blocks, heads), mean share of a patch's attention that goes to class and register tokens.
    """

    queries: list[str]
    heads: dict[int, Tensor]
    rollout: Tensor
    distance: Tensor
    prefix: Tensor


def attention_weights(attention: Attention, tokens: Tensor) -> Tensor:
    """Return the weights (B, heads, T, T) that a block's attention gives tokens (B, T, D): rows sum to 1."""
    batch, count, _ = tokens.shape
    qkv = attention.qkv(tokens).reshape(batch, count, 3, attention.num_heads, attention.head_dim)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return ((query * attention.scale) @ key.transpose(-2, -1)).softmax(-1)


def roll_out(rolled: Tensor | None, weights: Tensor) -> Tensor:
    """Go one block further in attention rollout (Abnar and Zuidema, arXiv 2005.00928, section 3).

    The heads are averaged; half of what a token is comes through the residual connection, so the identity is added
    with weight one half; then the blocks' matrices are multiplied, each row of sum 1.

    Args:
        rolled: (B, T, T) of the blocks before, None before the first.
        weights: (B, heads, T, T) of this block.
    """
    mean = weights.mean(1)
    step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)
    step = step / step.sum(-1, keepdim=True)
    return step if rolled is None else step @ rolled


@torch.no_grad()
def attend(
    model: MaskedAutoencoder, images: Tensor, places: Sequence[Place], blocks: Sequence[int] | None = None
) -> Attended:
    """Run the encoder on whole images and collect where it looks.

    Args:
        model: in eval mode.
        images: (B, C, H, W), normalised, on the model's device.
        places: patches whose attention is wanted besides the class token's.
        blocks: blocks, counted from 1, whose heads are kept; None: the last.

    Raises:
        MaekitError: E-CONFIG-MODEL for blocks without an attention module as timm's, E-CONFIG-PATCHES for a patch
            outside the grid.
    """
    encoder = model.encoder
    kept = [len(encoder.blocks)] if blocks is None else list(blocks)
    rows, queries = _queries(model, places)
    modules = [_attention(block) for block in encoder.blocks]
    distances = _distances(model.grid).to(images.device)
    heads: dict[int, list[Tensor]] = {block: [] for block in kept}
    rollouts: list[Tensor] = []
    numbers: list[Tensor] = []
    for image in images:
        rolled: list[Tensor] = []

        def look(block: int, weights: Tensor, rolled: list[Tensor] = rolled) -> None:
            rolled[:] = [roll_out(rolled[0] if rolled else None, weights)]
            numbers.append(_numbers(weights[0], distances, encoder.num_prefix_tokens).cpu())
            if block in heads:
                heads[block].append(weights[0, :, rows].transpose(0, 1).cpu())

        _run(encoder, modules, image[None], look)
        rollouts.append(rolled[0][0, rows].cpu())
    distance, prefix = torch.stack(numbers).unflatten(0, (len(images), -1)).mean(0).unbind(1)
    stacked = {block: torch.stack(each) for block, each in heads.items()}
    return Attended(queries, stacked, torch.stack(rollouts), distance, prefix)


def _queries(model: MaskedAutoencoder, places: Sequence[Place]) -> tuple[list[int], list[str]]:
    """Return the tokens whose attention is wanted, and their names."""
    (rows, columns), prefix = model.grid, model.encoder.num_prefix_tokens
    for row, column in places:
        if not (0 <= row < rows and 0 <= column < columns):
            raise MaekitError(
                "E-CONFIG-PATCHES", "setting patches", found=f"{row},{column} in a grid of {rows} x {columns} patches",
                expected=f"row 0 to {rows - 1}, column 0 to {columns - 1}",
                hint=f"--patches {rows // 2},{columns // 2}",
            )  # fmt: skip
    tokens = [prefix + row * columns + column for row, column in places]
    names = [f"patch {row},{column}" for row, column in places]
    return ([0, *tokens], ["class token", *names]) if model.encoder.has_class_token else (tokens, names)


def _attention(block: nn.Module) -> Attention:
    found = getattr(block, "attn", None)
    if not isinstance(found, Attention):
        raise MaekitError(
            "E-CONFIG-MODEL", "attention maps", found=f"blocks of class {type(block).__name__}",
            expected="blocks with one attention module as timm's plain ones", hint="--only without attention",
        )  # fmt: skip
    return found


def _run(
    encoder: VisionTransformer, modules: Sequence[Attention], image: Tensor, look: Callable[[int, Tensor], None]
) -> None:
    """Run the encoder and hand each block's number, from 1, and weights (1, heads, T, T) to `look`."""

    def hook(block: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: look(block, attention_weights(modules[block - 1], inputs[0]).float())

    hooks = [module.register_forward_pre_hook(hook(at)) for at, module in enumerate(modules, 1)]
    try:
        encoder.forward_features(image)
    finally:
        for each in hooks:
            each.remove()


def _distances(grid: tuple[int, int]) -> Tensor:
    """Return the distance of every two patches (N, N), in patches."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(-1, 2).float()
    return torch.cdist(places, places)


def _numbers(weights: Tensor, distances: Tensor, prefix: int) -> Tensor:
    """Return of each head (2, heads): mean distance to the patches attended to, share that the prefix gets."""
    between = weights[:, prefix:, prefix:]
    share = between.sum(-1)
    distance = (between * distances).sum(-1) / share.clamp(min=1e-12)
    return torch.stack([distance.mean(-1), 1 - share.mean(-1)])


# ------------------------------------------------------------------------------------------------ the pictures


def attention_part(
    model: MaskedAutoencoder, images: Tensor, found: Attended, names: Sequence[str], prefix: str = ""
) -> Part:
    """Draw heads of every query, blocks, and rollout.

    Args:
        model: whose attention it is.
        images: (B, C, H, W), 0..1.
        found: of these images.
        names: of the images.
        prefix: of the files' names.
    """
    last = max(found.heads)
    marked = [_marked(model, images, query) for query in found.queries]
    pictures = {
        f"{prefix}attention-{_file(query)}.png": (
            heads_figure(model, marked[at], found, at, last, names),
            f"Attention of the {query} after block {last}, head by head. Each map is bright at its own largest patch.",
        )
        for at, query in enumerate(found.queries)
    }
    if len(found.heads) > 1:
        pictures[f"{prefix}attention-blocks.png"] = (
            _blocks_figure(model, marked[0], found, names),
            f"Mean over the heads of the attention of the {found.queries[0]}, block by block.",
        )
    pictures[f"{prefix}attention-rollout.png"] = (
        _rollout_figure(model, marked, found, names),
        "Attention rollout (Abnar and Zuidema, arXiv 2005.00928): what of the patches reaches the token through all "
        "blocks, half of every block going by its residual connection. Each map reaches from its lowest patch, black, "
        "to its highest; a patch itself, which keeps most, is left out of its own.",
    )
    text = ["Whole images, nothing removed. A blue frame marks the patch that looks."]
    if not model.encoder.has_class_token:
        text.append("This encoder has no class token.")
    return Part("Attention", text=text, pictures=pictures, tables=[_table(found)])


def heads_figure(
    model: MaskedAutoencoder, marked: Tensor, found: Attended, query: int, block: int, names: Sequence[str]
) -> Image.Image:
    """Draw each head's map of one query after one block."""
    weights = found.heads[block][:, query, :, model.encoder.num_prefix_tokens :]
    heads = min(weights.shape[1], MOST_HEADS)
    maps = [heat(weights.mean(1), model.grid, model.patch)]
    maps += [heat(weights[:, head], model.grid, model.patch) for head in range(heads)]
    headers = ["image", "mean of heads", *(f"head {head + 1}" for head in range(heads))]
    left_out = weights.shape[1] - heads
    return reconstruction_grid(
        [[marked[i], *(each[i] for each in maps)] for i in range(len(marked))], headers, names,
        notes=[f"{left_out} more heads are not drawn."] * bool(left_out), max_side=SHOWN_SIDE if heads < 7 else 112,
    )  # fmt: skip


def _blocks_figure(model: MaskedAutoencoder, marked: Tensor, found: Attended, names: Sequence[str]) -> Image.Image:
    prefix = model.encoder.num_prefix_tokens
    maps = {b: heat(each[:, 0, :, prefix:].mean(1), model.grid, model.patch) for b, each in sorted(found.heads.items())}
    return reconstruction_grid(
        [[marked[i], *(each[i] for each in maps.values())] for i in range(len(marked))],
        ["image", *(f"block {block}" for block in maps)], names, max_side=SHOWN_SIDE if len(maps) < 7 else 112,
    )  # fmt: skip


def _rollout_figure(
    model: MaskedAutoencoder, marked: Sequence[Tensor], found: Attended, names: Sequence[str]
) -> Image.Image:
    columns: list[tuple[str, Tensor]] = []
    for at, query in enumerate(found.queries):
        weights = found.rollout[:, at, model.encoder.num_prefix_tokens :].clone()
        if query != "class token":
            weights[:, _number(model, query)] = torch.nan  # half of every block's weight is on the token itself
        weights -= weights.nan_to_num(torch.inf).amin(1, keepdim=True)  # what comes from everywhere shows nothing
        columns += [("image", marked[at]), (query, heat(weights, model.grid, model.patch))]
    return reconstruction_grid(
        [[each[i] for _, each in columns] for i in range(len(marked[0]))], [header for header, _ in columns], names,
        groups=[("", 2)] * len(found.queries), max_side=SHOWN_SIDE,
    )  # fmt: skip


def _marked(model: MaskedAutoencoder, images: Tensor, query: str) -> Tensor:
    """Return the images (B, 3, H, W) with a frame around the patch that looks."""
    if query == "class token":
        return images
    row, column = divmod(_number(model, query), model.grid[1])
    return torch.stack([framed(image, (row, column), model.patch) for image in images])


def _number(model: MaskedAutoencoder, query: str) -> int:
    row, column = map(int, query.removeprefix("patch ").split(","))
    return row * model.grid[1] + column


def _file(query: str) -> str:
    return query.replace("class token", "class").replace("patch ", "").replace(",", "-")


def _table(found: Attended) -> Table:
    rows = [
        [block, f"{each.min():.2f}", f"{each.mean():.2f}", f"{each.max():.2f}", f"{100 * share.mean():.1f} %"]
        for block, (each, share) in enumerate(zip(found.distance, found.prefix, strict=True), 1)
    ]
    return Table(
        ["block", "nearest head", "mean distance", "farthest head", "to class and register tokens"],
        rows,
        note="How far a patch looks: mean distance, in patches, to those it attends to, weighted by attention, over "
        "all patches of these images; and the share of its attention that goes to tokens without a place.",
    )
