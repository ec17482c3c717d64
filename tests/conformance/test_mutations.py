"""Every check can fail: each thing broken on purpose makes just the checks deviate that are about it."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maekit.conformance import paper, suite
from maekit.conformance.adapter import NotShown
from maekit.conformance.check import CRASHED, DEVIATES, NOT_SHOWN, OK, Check, audit
from maekit.conformance.own import Own
from maekit.model.heads import LinearHead
from maekit.model.mae import MaskedAutoencoder

SLOW = {"published-cost", "parameter-counts"}
DRAWING = {"mask-uniform", "mask-independent"}
"""They need hundreds of passes, and see nothing but masks."""
QUICK = [check for check in suite.CHECKS if check.name not in SLOW]
STILL = [check for check in QUICK if check.name not in DRAWING]


def deviating(adapter: Any, checks: Sequence[Check] = STILL) -> dict[str, str]:
    """Return what deviates, and how it was found."""
    findings = audit(adapter, checks)
    assert not [finding for finding in findings if finding.status == CRASHED], findings
    return {finding.check.name: finding.found for finding in findings if finding.status == DEVIATES}


Change = Callable[[MaskedAutoencoder], object]


class Changed(Own):
    """maekit with fresh weights changed."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def build(self, seed: int) -> MaskedAutoencoder:
        model = super().build(seed)
        with torch.no_grad():
            self.change(model)
        return model


def table(model: MaskedAutoencoder) -> Tensor:
    assert model.encoder.pos_embed is not None
    return model.encoder.pos_embed


def three_matrices(model: MaskedAutoencoder) -> None:
    for part in (*model.encoder.blocks, *model.decoder.blocks):
        weight = part.get_parameter("attn.qkv.weight")
        for matrix in weight.chunk(3):
            nn.init.xavier_uniform_(matrix)


def height_first(positions: Tensor, prefix: int = 1) -> None:
    half = positions.shape[-1] // 2
    positions[0, prefix:] = torch.cat([positions[0, prefix:, half:], positions[0, prefix:, :half]], -1)


def other_eps(part: nn.Module) -> None:
    for norm in part.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = 1e-5


FRESH: dict[str, tuple[Change, set[str]]] = {
    "qkv drawn as three matrices": (three_matrices, {"init-qkv"}),
    "linear layers normal": (lambda m: nn.init.normal_(m.decoder.embed.weight, std=0.02), {"init-linear"}),
    "a block's linear layers by torch's default": (
        lambda m: m.encoder.blocks[0].mlp.fc1.reset_parameters() or nn.init.zeros_(m.encoder.blocks[0].mlp.fc1.bias),  # type: ignore[union-attr, operator]
        {"init-linear"},
    ),
    "patch projection by torch's default": (
        lambda m: nn.init.kaiming_uniform_(m.encoder.patch_embed.proj.weight, a=math.sqrt(5)),
        {"init-patch"},
    ),
    "patch bias zero": (lambda m: nn.init.zeros_(m.encoder.patch_embed.proj.bias), {"init-patch-bias"}),  # type: ignore[arg-type]
    "a linear bias not zero": (lambda m: m.decoder.pred.bias.fill_(0.01), {"init-bias"}),
    "a norm weight not one": (lambda m: m.decoder.norm.weight.fill_(0.9), {"init-norm"}),
    "epsilon 1e-5 in the decoder": (lambda m: other_eps(m.decoder), {"norm-eps"}),
    "class token zero": (lambda m: m.encoder.cls_token.zero_(), {"init-class-token"}),  # type: ignore[union-attr]
    "class token of timm": (lambda m: m.encoder.cls_token.normal_(std=1e-6), {"init-class-token"}),  # type: ignore[union-attr]
    "mask token zero": (lambda m: m.decoder.mask_token.zero_(), {"init-mask-token"}),
    "encoder positions zero": (lambda m: table(m).zero_(), {"positions-encoder"}),
    "encoder positions height first": (lambda m: height_first(table(m)), {"positions-encoder"}),
    "encoder positions of MoCo v3": (
        lambda m: table(m)[0, 1:].copy_(paper.sincos(192, (10, 10), endpoint=True)), {"positions-encoder"},
    ),
    "decoder positions height first": (lambda m: height_first(m.decoder.pos_embed), {"positions-decoder"}),
    "decoder positions zero": (
        lambda m: m.decoder.pos_embed.zero_(), {"positions-decoder", "predictions-differ"},
    ),
    "positions learned": (
        lambda m: table(m).normal_(std=0.02).requires_grad_(True),
        {"positions-encoder", "positions-class", "positions-frozen", "decay-tables", "decay"} - {"decay"},
    ),
    "class token has a position": (lambda m: table(m)[:, 0].fill_(0.1), {"positions-class"}),
    "a weight that is not a number": (lambda m: m.decoder.pred.weight[0, 0].fill_(math.nan), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FRESH if "not a number" not in name])
def test_fresh_weights_changed_are_found_and_nothing_else(name: str) -> None:
    change, expected = FRESH[name]
    assert set(deviating(Changed(change))) == expected


def test_what_was_found_says_what_it_is() -> None:
    assert "height first" in deviating(Changed(FRESH["encoder positions height first"][0]))["positions-encoder"]
    assert "D/4 - 1" in deviating(Changed(FRESH["encoder positions of MoCo v3"][0]))["positions-encoder"]
    assert "all zero" in deviating(Changed(FRESH["decoder positions zero"][0]))["positions-decoder"]


def test_a_weight_that_is_not_a_number_is_found() -> None:
    findings = {f.check.name: f for f in audit(Changed(FRESH["a weight that is not a number"][0]), STILL)}
    assert findings["finite"].status == DEVIATES
    assert "decoder_pred.weight" in findings["finite"].found


class Written(Own):
    """maekit's weights under the paper's arithmetic, of which a part can be replaced."""

    heads = (3, 4)

    def __init__(self, **ways: Any) -> None:
        self.ways = ways

    def masked(self, noise: Tensor | None, batch: int, num: int, keep: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(batch, num) if noise is None else noise
        ids = noise.argsort(1)[:, :keep]
        return ids, torch.ones(batch, num, dtype=torch.bool).scatter(1, ids, False)

    def encoder(self, tensors: Mapping[str, Tensor], images: Tensor, ids: Tensor) -> Tensor:
        return paper.encode(tensors, images, ids, 3, **self.ways.get("encode", {}))

    def decoder(self, tensors: Mapping[str, Tensor], latent: Tensor, ids: Tensor) -> Tensor:
        return paper.decode(tensors, latent, ids, 4, **self.ways.get("decode", {}))

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        return paper.loss(images, pred, mask, **self.ways.get("loss", {}))

    def keep(self, num: int, ratio: float) -> int:
        return paper.num_keep(num, ratio)

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> dict[str, Any]:
        tensors = self.tensors(model)
        ids, mask = self.masked(noise, len(images), 100, self.keep(100, mask_ratio))
        latent = self.encoder(tensors, images, ids)
        pred = self.decoder(tensors, latent, ids)
        return {"loss": self.loss(images, pred, mask), "pred": pred, "mask": mask, "latent": latent, "ids_keep": ids}

    def features(self, model: Any, images: Tensor) -> Tensor:
        return paper.encode(self.tensors(model), images, torch.arange(100).expand(len(images), -1), 3)


def test_the_papers_arithmetic_itself_is_clean() -> None:
    assert deviating(Written(), QUICK) == {}


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ({"encode": {"positions": "after masking"}}, {"positions-before-masking"}),
        ({"encode": {"positions": "never"}}, {"positions-before-masking"}),
        ({"encode": {"norm": False}}, {"encoder-norm", "all-trained"}),
        ({"decode": {"class_token": False}}, {"class-token-in-decoder"}),
        ({"decode": {"norm": False}}, {"decoder-norm", "all-trained"}),
        ({"decode": {"positions": False}}, {"decoder-positions", "predictions-differ"}),
        ({"loss": {"variance": "biased"}}, {"target-variance"}),
        ({"loss": {"eps": "1e-6 outside the root"}}, {"target-eps"}),
        ({"loss": {"eps": "1e-5 inside the root"}}, {"target-eps"}),
        ({"loss": {"order": "channel slowest"}}, {"patch-order"}),
        ({"loss": {"target": "plain pixels"}}, {"target-normalised"}),
        ({"loss": {"over": "all"}}, {"loss-masked-only"}),
        ({"loss": {"over": "visible"}}, {"loss-masked-only"}),
    ],
)
def test_a_forward_pass_computed_otherwise_is_found_and_nothing_else(ways: dict[str, Any], expected: set[str]) -> None:
    assert set(deviating(Written(**ways))) == expected


class Tied(Written):
    def masked(self, noise: Tensor | None, batch: int, num: int, keep: int) -> tuple[Tensor, Tensor]:
        return super().masked(torch.rand(1, num).expand(batch, -1) if noise is None else noise, batch, num, keep)


class Fixed(Written):
    def masked(self, noise: Tensor | None, batch: int, num: int, keep: int) -> tuple[Tensor, Tensor]:
        if noise is None:
            noise = torch.rand(batch, num, generator=torch.Generator().manual_seed(3))
        return super().masked(noise, batch, num, keep)


class Leaning(Written):
    """Prefers to keep the middle of the image."""

    def masked(self, noise: Tensor | None, batch: int, num: int, keep: int) -> tuple[Tensor, Tensor]:
        if noise is None:
            noise = torch.rand(batch, num) - 0.3 * torch.linspace(-1, 1, num).abs()
        return super().masked(noise, batch, num, keep)


class HighestStay(Written):
    def masked(self, noise: Tensor | None, batch: int, num: int, keep: int) -> tuple[Tensor, Tensor]:
        return super().masked(None if noise is None else -noise, batch, num, keep)


class ClassTokenCounts(Written):
    """The ratio is taken of the patches and the class token, which is among those kept, as lightly once did."""

    def keep(self, num: int, ratio: float) -> int:
        return paper.num_keep(num + 1, ratio) - 1


class Rounded(Written):
    def keep(self, num: int, ratio: float) -> int:
        return math.ceil(num * (1 - ratio) - 1e-9) - (ratio == 0.3)


class Truncated(Written):
    """Official, float dust included."""

    def keep(self, num: int, ratio: float) -> int:
        return int(num * (1 - ratio))


class Everything(Written):
    """Encodes all patches with mask tokens in the encoder's input: three times the cost."""

    def encoder(self, tensors: Mapping[str, Tensor], images: Tensor, ids: Tensor) -> Tensor:
        whole = paper.encode(tensors, images, torch.arange(100).expand(len(images), -1), 3)
        return torch.cat([whole[:, :1], paper.rows(whole[:, 1:], ids)], 1)


class Smooth(Written):
    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        return (paper.patches(images, 100) - pred).abs().mean(-1)[mask].mean()


class MaskedFeatures(Written):
    def features(self, model: Any, images: Tensor) -> Tensor:
        return paper.encode(self.tensors(model), images, torch.arange(25)[None].expand(len(images), -1), 3)


class Waiting(Written):
    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        assert mask.sum() > 0
        return super().loss(images, pred, mask)


class Idle(Own):
    def build(self, seed: int) -> MaskedAutoencoder:
        model = super().build(seed)
        model.register_parameter("spare", nn.Parameter(torch.zeros(2, 2)))
        return model

    def resized(self, model: Any, grid: int) -> tuple[Tensor, Tensor]:
        return super().resized(super().build(0), grid)


class Unseeded(Own):
    def build(self, seed: int) -> MaskedAutoencoder:
        model = super().build(seed)
        with torch.no_grad():
            model.encoder.patch_embed.proj.weight.copy_(super().build(0).encoder.patch_embed.proj.weight)
        return model


class LeakyEncoder(Written):
    """The removed patches' mean enters each token."""

    def encoder(self, tensors: Mapping[str, Tensor], images: Tensor, ids: Tensor) -> Tensor:
        return super().encoder(tensors, images, ids) + images.mean((1, 2, 3))[:, None, None]


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (Tied(), {"mask-independent"}),
        (Fixed(), {"mask-independent", "mask-uniform"}),
        (Leaning(), {"mask-uniform"}),
        (HighestStay(), {"mask-noise"}),
        (ClassTokenCounts(), {"mask-count", "mask-count-dust"}),
        (Rounded(), {"mask-count"}),
        (Truncated(), {"mask-count-dust"}),
        (Everything(), {"encoder", "removed-pixels-unseen", "visible-only"}),
        (LeakyEncoder(), {"encoder", "removed-pixels-unseen"}),
        (Smooth(), {"loss"}),
        (MaskedFeatures(), {"features-unmasked"}),
        (Waiting(), {"host-waits"}),
        (Idle(), {"parameters", "all-trained"}),
        (Unseeded(), {"init-seed"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Own) else "",
)
def test_masks_costs_and_leaks_are_found_and_nothing_else(adapter: Own, expected: set[str]) -> None:
    assert set(deviating(adapter, QUICK)) == expected


# ------------------------------------------------------------------------------------------------- the recipe


class ExemptTokens(Own):
    """Takes the tokens out of weight decay, as MMPretrain does."""

    def pretrain_optimizer(self, model: Any) -> torch.optim.Optimizer:
        tokens = {id(model.encoder.cls_token), id(model.decoder.mask_token)}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups[p.ndim > 1 and not name.endswith(".bias") and id(p) not in tokens].append(p)
        return torch.optim.AdamW(
            [{"params": groups[True], "weight_decay": 0.05}, {"params": groups[False], "weight_decay": 0.0}],
            betas=(0.9, 0.95),
        )


class DecayAll(Own):
    def pretrain_optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            (p for p in model.parameters() if p.requires_grad), betas=(0.9, 0.95), weight_decay=0.05
        )


class DefaultBetas(Own):
    def pretrain_optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(super().pretrain_optimizer(model).param_groups)


class ByEpoch(Own):
    def learning_rate(self, step: int, **more: Any) -> float:
        return (
            super().learning_rate(step // 312 * 312, **more)
            if more["steps"] > 312
            else super().learning_rate(step, **more)
        )


class LateStart(Own):
    """Starts the warm-up one step late: not from 0."""

    def learning_rate(self, step: int, **more: Any) -> float:
        return super().learning_rate(step + 1, **more)


class OtherBase(Own):
    """Scales by 4096, as one script does."""

    def learning_rate(self, step: int, **more: Any) -> float:
        return super().learning_rate(step, **more) / 16


def update(module: nn.Module, optimizer: torch.optim.Optimizer, parts: list[Tensor], weights: list[float]) -> None:
    for part, weight in zip(parts, weights, strict=True):
        (module(part) * weight).backward()
    optimizer.step()
    optimizer.zero_grad()


class UnevenParts(Own):
    """Averages micro-batches, whatever their size."""

    def train_epoch(self, module: Any, images: Tensor, optimizer: Any, *, batch: int, micro_batch: int) -> None:
        for whole in images.split(batch):
            parts = list(whole.split(micro_batch))
            update(module, optimizer, parts, [1 / len(parts)] * len(parts))


class LostWindow(Own):
    """Drops the gradients of an incomplete accumulation window (mae#49)."""

    def train_epoch(self, module: Any, images: Tensor, optimizer: Any, *, batch: int, micro_batch: int) -> None:
        for whole in images.split(batch):
            parts = list(whole.split(micro_batch))
            if len(whole) == batch:
                update(module, optimizer, parts, [len(part) / batch for part in parts])


class FlatRates(Own):
    def finetune_groups(self, classifier: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
        return super().finetune_groups(classifier, 1.0)


class LeavesOnly(Own):
    """Groups leaf modules, so that what the model itself holds is in none (D6)."""

    def finetune_groups(self, classifier: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
        held = {id(p) for p in classifier.parameters(recurse=False)}
        groups = super().finetune_groups(classifier, layer_decay)
        return [group | {"params": [p for p in group["params"] if id(p) not in held]} for group in groups]


class NormsDecay(Own):
    def finetune_groups(self, classifier: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
        return [group | {"weight_decay": 0.05} for group in super().finetune_groups(classifier, layer_decay)]


class Refitted(Own):
    """Changes the classifier."""

    def __init__(self, change: Callable[[Any], object]) -> None:
        self.change = change

    def finetune_model(self, model: Any, num_classes: int, drop_path: float) -> nn.Module:
        made = super().finetune_model(model, num_classes, drop_path)
        with torch.no_grad():
            self.change(made)
        return made


class NoDropPath(Own):
    def finetune_model(self, model: Any, num_classes: int, drop_path: float) -> nn.Module:
        return super().finetune_model(model, num_classes, 0.0)


def old_norm(model: Any) -> None:
    model.norm, model.fc_norm = model.fc_norm, nn.Identity()


def flat_drop_path(model: Any) -> None:
    for part in model.modules():
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.1


class Bilinear(Own):
    def eval_view(self, image: Any) -> Tensor:
        from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

        return center_crop(resize(pil_to_tensor(image), [256], antialias=True), [224])


class Squashed(Own):
    def eval_view(self, image: Any) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor, resize

        return resize(pil_to_tensor(image), [224, 224], antialias=True)


class PlainProbe(Own):
    def probe_head(self, dim: int, num_classes: int) -> nn.Module:
        return LinearHead(dim, num_classes).linear


class AffineProbe(Own):
    def probe_head(self, dim: int, num_classes: int) -> nn.Module:
        head = LinearHead(dim, num_classes)
        head.norm = nn.BatchNorm1d(dim)
        return head


class DecayedProbe(Own):
    def probe_optimizer(self, head: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


class Renamed(Own):
    def saved_names(self, model: Any) -> tuple[set[str], set[str]]:
        written, published = super().saved_names(model)
        return {name.replace("blocks.", "layers.") for name in written}, published


class OneDimensional(Own):
    """Stretches the decoder's table as one row, as transformers does (D21)."""

    def resized(self, model: Any, grid: int) -> tuple[Tensor, Tensor]:
        encoder, _ = super().resized(model, grid)
        row = model.decoder.pos_embed[:, 1:].transpose(1, 2)[:, :, None]
        row = F.interpolate(row, size=(1, grid * grid), mode="bicubic")[:, :, 0].transpose(1, 2)
        return encoder, torch.cat([model.decoder.pos_embed[:, :1], row], 1)


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (ExemptTokens(), {"decay-tokens"}),
        (DecayAll(), {"decay"}),
        (DefaultBetas(), {"betas"}),
        (ByEpoch(), {"learning-rate"}),
        (LateStart(), {"learning-rate", "effective-batch"}),
        (OtherBase(), {"learning-rate", "effective-batch"}),
        (UnevenParts(), {"accumulation"}),
        (LostWindow(), {"leftovers"}),
        (FlatRates(), {"layer-decay"}),
        (LeavesOnly(), {"finetune-groups"}),
        (NormsDecay(), {"finetune-decay"}),
        (Refitted(lambda m: m.head.weight.normal_(std=0.02)), {"head-init"}),
        (Refitted(old_norm), {"pool-norm"}),
        (Refitted(lambda m: m.pos_embed.requires_grad_(False)), {"finetune-positions"}),
        (Refitted(flat_drop_path), {"drop-path"}),
        (NoDropPath(), {"drop-path"}),
        (Bilinear(), {"eval-view"}),
        (Squashed(), {"eval-view"}),
        (PlainProbe(), {"probe-head"}),
        (AffineProbe(), {"probe-head"}),
        (DecayedProbe(), {"probe-optimizer"}),
        (Renamed(), {"saved-names"}),
        (OneDimensional(), {"positions-resized"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Own) else "",
)
def test_a_recipe_changed_is_found_and_nothing_else(adapter: Own, expected: set[str]) -> None:
    about = suite.chosen(sorted(name for family in ("positions", "pre-training", "fine-tuning", "evaluation and files")
                                for name in (check.name for check in suite.FAMILIES[family])))  # fmt: skip
    findings = audit(adapter, about)
    assert not [finding for finding in findings if finding.status in (CRASHED, NOT_SHOWN)]
    assert {finding.check.name for finding in findings if finding.status == DEVIATES} == expected


# ------------------------------------------------------------------------------------------------- the audit itself


class Broken(Own):
    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        raise RuntimeError("does not run")


def test_a_model_that_does_not_run_is_reported_as_crashed_and_never_as_ok() -> None:
    findings = audit(Broken(), suite.FAMILIES["forward pass and loss"])
    about_passes = [finding for finding in findings if finding.check.name not in ("finite", "features-unmasked")]
    assert {finding.status for finding in about_passes} == {CRASHED}
    assert "does not run" in about_passes[0].found


class WithoutDecoder(Own):
    def tensors(self, model: Any) -> Mapping[str, Tensor]:
        return dict(model.encoder.named_parameters())

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        raise NotShown("an encoder only")


def test_what_a_model_lacks_is_not_shown_with_the_reason() -> None:
    findings = audit(WithoutDecoder(), suite.FAMILIES["forward pass and loss"])
    assert {finding.status for finding in findings} == {OK, NOT_SHOWN}
    assert {finding.found for finding in findings if finding.status == NOT_SHOWN} >= {"an encoder only"}


def test_heads_are_found_by_trying() -> None:
    class Silent(Own):
        pass

    names = ("encoder", "decoder", "features-unmasked")
    assert {finding.status for finding in audit(Silent(), suite.chosen(names))} == {OK}


def test_counts_of_published_sizes_can_be_wrong() -> None:
    class Shallow(Own):
        def published(self, size: str) -> nn.Module:
            model: Any = copy.copy(super().published(size))
            model.decoder.blocks = model.decoder.blocks[:4]
            return model

    found = {finding.check.name: finding.status for finding in audit(Shallow(), suite.chosen(sorted(SLOW)))}
    assert found == dict.fromkeys(SLOW, DEVIATES)


class WithoutClassToken(Written):
    """The encoder's class token stays behind."""

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> dict[str, Any]:
        given = super().forward(model, images, noise, mask_ratio)
        return given | {"latent": given["latent"][:, 1:]}


def test_a_class_token_that_is_lost_is_found() -> None:
    assert deviating_of(WithoutClassToken(), "mask-class-token") == {"mask-class-token"}


def deviating_of(adapter: Any, *names: str) -> set[str]:
    return {finding.check.name for finding in audit(adapter, suite.chosen(names)) if finding.status == DEVIATES}


def test_every_check_is_made_to_deviate_somewhere_here() -> None:
    import ast
    from pathlib import Path

    words = {node.value for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Constant)}
    assert not {check.name for check in suite.CHECKS} - words
