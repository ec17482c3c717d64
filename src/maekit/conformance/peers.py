"""Small adapters to other implementations, as they install: each imports its library when it is built, not before.

Models are drawn from scratch, three blocks deep (rules do not depend on depth) and otherwise as the library's defaults
have them; nothing is downloaded.
"""

import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from maekit.config import suggest
from maekit.conformance.adapter import Adapter, NotShown
from maekit.errors import MaekitError, clean

DEPTH = 3
SIZES = {
    "B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "H": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
          "patch_size": 14},
}  # fmt: skip
HUB = {"vit-mae-base": "B", "vit-mae-large": "L", "vit-mae-huge": "H"}


def needed(module: str, package: str) -> ModuleType:
    """Import a library.

    Raises:
        MaekitError: E-ENV-IMPORT if it is not there.
    """
    try:
        with _calm():
            return import_module(module)
    except ImportError as error:
        raise MaekitError("E-ENV-IMPORT", f"package {package} cannot be imported", found=error,
                          hint=f"pip install {package}") from error  # fmt: skip


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Leave a library's own warnings to those who use it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Transformers:
    """transformers' ViTMAEForPreTraining, as its configuration class has it."""

    def __init__(self, name: str) -> None:
        if name not in HUB:
            raise MaekitError("E-CONFIG-MODEL", f"model transformers:{clean(name, 60)}{suggest(name, HUB)}",
                              expected=" | ".join(HUB))  # fmt: skip
        self.library: Any = needed("transformers", "transformers")
        self.library.utils.logging.disable_progress_bar()
        self.size = SIZES[HUB[name]]
        self.name, self.version = "transformers", version("transformers")
        self.how = (
            f"ViTMAEForPreTraining(ViTMAEConfig()) of {name}'s sizes, {DEPTH} + {DEPTH} blocks; nothing downloaded"
        )
        self.heads = (self.size["num_attention_heads"], 16)

    def build(self, seed: int) -> nn.Module:
        """Draw a model."""
        return self._draw(seed, self.size | {"num_hidden_layers": DEPTH, "decoder_num_hidden_layers": DEPTH})

    def _draw(self, seed: int, size: dict[str, int]) -> nn.Module:
        torch.manual_seed(seed)
        with _calm():
            return self.library.ViTMAEForPreTraining(self.library.ViTMAEConfig(**size))

    def published(self, size: str) -> nn.Module:
        """Build a published size without memory."""
        with torch.device("meta"):
            return self._draw(0, SIZES[size])

    def tensors(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Rename the layouts of 4.x and 5.x; query, key and value are put together."""
        named, found = dict(model.named_parameters()), {}
        for name, value in named.items():
            found[_official(name)] = value
        for key in [key for key in found if ".attn.query." in key]:
            parts = [found.pop(key.replace("query", part)) for part in ("query", "key", "value")]
            found[key.replace("query", "qkv")] = torch.cat([part.detach() for part in parts])
        return found

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        """Run encoder and decoder; the loss is the model's own."""
        model.config.mask_ratio = model.vit.embeddings.config.mask_ratio = mask_ratio
        latent: list[Tensor] = []
        hook = model.decoder.register_forward_pre_hook(lambda _, given: latent.append(given[0]))
        try:
            out = model(images, noise=noise)
        finally:
            hook.remove()
        return {"loss": out.loss, "pred": out.logits, "mask": out.mask, "ids_restore": out.ids_restore,
                "latent": latent[0]}  # fmt: skip

    def features(self, model: Any, images: Tensor) -> Tensor:
        """Return the encoder's last hidden state in eval mode, with the configuration as it comes."""
        model.config.mask_ratio = model.vit.embeddings.config.mask_ratio = self.library.ViTMAEConfig().mask_ratio
        return model.vit(images).last_hidden_state

    def resized(self, model: Any, grid: int) -> tuple[Tensor, Tensor]:
        """Ask both interpolations."""
        embeddings, side = model.vit.embeddings, grid * model.config.patch_size
        tokens = torch.zeros(1, 1 + grid * grid, model.config.hidden_size)
        encoder = embeddings.interpolate_pos_encoding(tokens, side, side)
        wider = torch.zeros(1, 1 + grid * grid, model.config.decoder_hidden_size)
        return encoder, model.decoder.interpolate_pos_encoding(wider)

    def saved_names(self, model: Any) -> tuple[set[str], set[str]]:
        """Save, and name the keys of the hub's vit-mae files (as 4.57.6 has them)."""
        from safetensors import safe_open

        with tempfile.TemporaryDirectory() as folder, _calm():
            model.save_pretrained(folder)
            with safe_open(Path(folder) / "model.safetensors", "pt") as file:
                written = set(file.keys())
        return written, _hub_names(DEPTH)

    def pretrain_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build AdamW with the defaults of TrainingArguments; its groups as Trainer makes them."""
        fields = self.library.TrainingArguments.__dataclass_fields__
        rate, betas = fields["weight_decay"].default, (fields["adam_beta1"].default, fields["adam_beta2"].default)
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=betas, weight_decay=rate)


OFFICIAL = (
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^vit\.(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", lambda m: f".attn.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""transformers' names, of 4.x and 5.x, and the authors'."""


def _official(name: str) -> str:
    for pattern, replacement in OFFICIAL:
        name = re.sub(pattern, replacement, name)
    return name


def _hub_names(depth: int) -> set[str]:
    layer = ("attention.attention.query", "attention.attention.key", "attention.attention.value",
             "attention.output.dense", "intermediate.dense", "output.dense",
             "layernorm_before", "layernorm_after")  # fmt: skip
    layers = [f"{part}.{i}.{name}" for part in ("vit.encoder.layer", "decoder.decoder_layers") for i in range(depth)
              for name in layer]  # fmt: skip
    layers += ["vit.embeddings.patch_embeddings.projection", "vit.layernorm", "decoder.decoder_embed",
               "decoder.decoder_norm", "decoder.decoder_pred"]  # fmt: skip
    single = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "decoder.mask_token",
              "decoder.decoder_pos_embed"}  # fmt: skip
    return single | {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}


class Timm:
    """A timm VisionTransformer: an encoder, its fine-tuning groups, its evaluation; no autoencoder (D22)."""

    def __init__(self, name: str) -> None:
        self.library: Any = needed("timm", "timm")
        self.model = name
        if not self.library.is_model(name):
            raise MaekitError("E-CONFIG-MODEL", f"model timm:{clean(name, 60)}", found="a name timm does not know",
                              expected="one such as vit_base_patch16_224.mae")  # fmt: skip
        self.name, self.version = f"timm:{name}", version("timm")
        self.how = f"timm.create_model({name!r}, pretrained=False), {DEPTH} blocks"

    def build(self, seed: int) -> nn.Module:
        """Draw an encoder."""
        torch.manual_seed(seed)
        return self._create(num_classes=0)

    def _create(self, **more: Any) -> nn.Module:
        try:
            return self.library.create_model(self.model, pretrained=False, depth=DEPTH, **more)
        except TypeError as error:
            raise MaekitError("E-CONFIG-MODEL", f"model timm:{self.model}", found=error,
                              expected="a VisionTransformer") from error  # fmt: skip

    def tensors(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Its names are the authors'."""
        return dict(model.named_parameters())

    def forward(self, model: nn.Module, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        """Say that there is none."""
        raise NotShown("timm has no masked autoencoder")

    def features(self, model: Any, images: Tensor) -> Tensor:
        """Return all tokens."""
        return model.forward_features(images)

    def finetune_model(self, model: nn.Module, num_classes: int, drop_path: float) -> nn.Module:
        """Create the classifier, mean-pooled."""
        return self._create(num_classes=num_classes, global_pool="avg", drop_path_rate=drop_path)

    def finetune_groups(self, classifier: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
        """Group by timm's own function."""
        groups = import_module("timm.optim").param_groups_layer_decay
        return groups(classifier, weight_decay=0.05, layer_decay=layer_decay)

    def eval_view(self, image: Any) -> Tensor:
        """Apply the model's own evaluation transform, without its normalisation."""
        data = import_module("timm.data")
        config = data.resolve_data_config({}, model=self._create())
        return data.create_transform(**(config | {"mean": (0.0,) * 3, "std": (1.0,) * 3}))(image) * 255


class Lightly:
    """lightly's MAE parts, put together as its own benchmark does (which is not installed with it)."""

    heads = (12, 16)

    def __init__(self) -> None:
        needed("lightly", "lightly")
        with _calm():
            self.modules: Any = import_module("lightly.models.modules.masked_vision_transformer_timm")
            self.decoders: Any = import_module("lightly.models.modules.masked_autoencoder_timm")
            self.tools: Any = import_module("lightly.models.utils")
        self.timm: Any = needed("timm", "timm")
        self.name, self.version = "lightly", version("lightly")
        self.how = (
            f"MaskedVisionTransformerTIMM and MAEDecoderTIMM, {DEPTH} + {DEPTH} blocks; forward pass, groups and "
            "optimizer as in its ViT-B/16 benchmark, whose file is not installed"
        )

    def build(self, seed: int) -> nn.Module:
        """Draw encoder and decoder."""
        torch.manual_seed(seed)
        vit = self.timm.create_model("vit_base_patch16_224", num_classes=0, depth=DEPTH)
        with _calm():
            return nn.ModuleDict({
                "backbone": self.modules.MaskedVisionTransformerTIMM(vit=vit),
                "decoder": self.decoders.MAEDecoderTIMM(
                    num_patches=196, patch_size=16, embed_dim=768, decoder_depth=DEPTH
                ),
            })  # fmt: skip

    def tensors(self, model: Any) -> Mapping[str, Tensor]:
        """Both halves have the authors' names; the encoder's own mask token is no part of the method."""
        return dict(model["backbone"].vit.named_parameters()) | dict(model["decoder"].named_parameters())

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        """Mask by lightly's function or the noise; encode, fill with mask tokens, decode, score as the benchmark."""
        length, batch, tools = model["backbone"].sequence_length, len(images), self.tools
        if noise is None:
            keep, removed = tools.random_token_mask((batch, length), mask_ratio=mask_ratio)
        else:
            order = torch.cat([noise.new_full((batch, 1), -1.0), noise], 1).argsort(1)
            count = tools.random_token_mask((1, length), mask_ratio=mask_ratio)[0].shape[1]
            keep, removed = order[:, :count], order[:, count:]
        latent = model["backbone"].encode(images, idx_keep=keep)
        decoder = model["decoder"]
        tokens = tools.repeat_token(decoder.mask_token, (batch, length))
        tokens = tools.set_at_index(tokens, keep, decoder.embed(latent).type_as(tokens))
        pred = decoder.predict(decoder.decode(tokens))[:, 1:]
        target = tools.get_at_index(tools.patchify(images, 16), removed - 1)
        loss = nn.functional.mse_loss(tools.get_at_index(pred, removed - 1), target)
        mask = torch.zeros(batch, length - 1).scatter(1, removed - 1, 1.0)
        return {"loss": loss, "pred": pred, "mask": mask, "latent": latent, "ids_keep": keep[:, 1:] - 1}

    def features(self, model: Any, images: Tensor) -> Tensor:
        """Return all tokens."""
        return model["backbone"].encode(images)

    def pretrain_optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Group by lightly's function; rates as in its benchmark."""
        decay, exempt = self.tools.get_weight_decay_parameters([model["backbone"], model["decoder"]])
        return torch.optim.AdamW(
            [{"params": decay}, {"params": exempt, "weight_decay": 0.0}], betas=(0.9, 0.95), weight_decay=0.05
        )

    def finetune_model(self, model: Any, num_classes: int, drop_path: float) -> nn.Module:
        """Add stochastic depth by lightly's function, and the head of its classifiers."""
        backbone = self.modules.MaskedVisionTransformerTIMM(
            vit=self.timm.create_model("vit_base_patch16_224", num_classes=0, depth=DEPTH)
        )
        with _calm():
            self.tools.add_stochastic_depth_to_blocks(backbone, prob=drop_path)
        return nn.ModuleDict({"model": backbone, "classification_head": nn.Linear(768, num_classes)})

    def finetune_groups(self, classifier: Any, layer_decay: float) -> list[dict[str, Any]]:
        """Group leaf modules by name as the benchmark does: ``encoder_layer_I`` scales, everything else has rate 1."""
        leaves = self.tools.get_named_leaf_modules(classifier["model"])
        groups = [
            {"params": list(classifier["classification_head"].parameters()), "weight_decay": 0.0, "lr_scale": 1.0}
        ]
        for name, module in leaves.items():
            layer = re.search(r"encoder_layer_(\d+)", name)
            scale = layer_decay ** (DEPTH - 1 - int(layer[1])) if layer else 1.0
            for parameters, rate in zip(self.tools.get_weight_decay_parameters([module]), (0.05, 0.0), strict=True):
                groups.append({"params": parameters, "weight_decay": rate, "lr_scale": scale})
        return groups


class StablePretraining:
    """stable-pretraining's MAE module."""

    def __init__(self) -> None:
        needed("stable_pretraining", "stable-pretraining")
        with _calm():
            self.methods: Any = needed("stable_pretraining.methods", "stable-pretraining")
        self.timm: Any = needed("timm", "timm")
        self.name, self.version = "stable-pretraining", version("stable-pretraining")
        self.how = f"stable_pretraining.methods.MAE around vit_base_patch16_224, {DEPTH} + {DEPTH} blocks"

    def build(self, seed: int) -> nn.Module:
        """Draw a model."""
        torch.manual_seed(seed)
        vit = self.timm.create_model("vit_base_patch16_224", num_classes=0, depth=DEPTH)
        with _calm():
            return self.methods.MAE(vit, decoder_depth=DEPTH)

    def tensors(self, model: Any) -> Mapping[str, Tensor]:
        """Rename; its mask token is of the encoder's width and is projected, so its table and token do not fit."""
        inner = {"context_proj": "decoder_embed", "output_proj": "decoder_pred", "final_norm": "decoder_norm",
                 "blocks": "decoder_blocks", "query_proj": "query_proj"}  # fmt: skip
        found = dict(model.encoder.vit.named_parameters()) | {"mask_token": model.decoder.mask_token}
        transformer = model.decoder.transformer
        for name, value in transformer.named_parameters():
            first, _, rest = name.partition(".")
            found[f"{inner.get(first, first)}.{rest}"] = value
        return found | {"decoder_pos_embed": transformer.pos_embed}

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        """Run it in train mode, in which alone it masks and scores; noise cannot be handed in."""
        model.encoder.masking.mask_ratio = mask_ratio
        seen: list[Any] = []
        hook = model.encoder.register_forward_hook(lambda _, __, out: seen.append(out))
        before = model.training
        try:
            out = model.train()(images)
        finally:
            hook.remove()
            model.train(before)
        return {"loss": out.loss, "pred": out.predictions, "mask": out.mask, "latent": seen[0].encoded,
                "ids_keep": seen[0].ids_keep}  # fmt: skip

    def features(self, model: Any, images: Tensor) -> Tensor:
        """Return all tokens."""
        return model.encoder.forward_features(images)


PEERS: dict[str, Callable[..., Adapter]] = {
    "transformers": Transformers,
    "timm": Timm,
    "lightly": Lightly,
    "stable-pretraining": StablePretraining,
}
DEFAULTS = {"transformers": "vit-mae-base", "timm": "vit_base_patch16_224.mae"}


def peer(place: str) -> Adapter:
    """Build the adapter of ``transformers:NAME``, ``timm:NAME``, ``lightly`` or ``stable-pretraining``.

    Raises:
        MaekitError: E-CONFIG-PEER for an unknown library, E-CONFIG-MODEL for an unknown name, E-ENV-IMPORT.
    """
    library, colon, name = place.partition(":")
    if library not in PEERS or (colon and library not in DEFAULTS):
        raise MaekitError("E-CONFIG-PEER", f"setting model: {clean(place, 60)!r}{suggest(library, PEERS)}",
                          expected="transformers:vit-mae-base | timm:NAME | lightly | stable-pretraining")  # fmt: skip
    return PEERS[library](name or DEFAULTS[library]) if library in DEFAULTS else PEERS[library]()
