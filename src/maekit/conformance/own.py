"""maekit's own adapters: this installation, and a file of weights."""

import contextlib
import copy
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from maekit import __version__
from maekit.conformance.adapter import NotShown
from maekit.data.augment import EvalView, default_crop_pct
from maekit.data.loader import Loader
from maekit.data.sources import DatasetSource
from maekit.interchange.weights import load_model, save_encoder
from maekit.model.heads import LinearHead, classifier
from maekit.model.mae import MaskedAutoencoder, at_size, create_model
from maekit.settings import Loop, Pretrain
from maekit.train.device import World
from maekit.train.loop import Plan, fit
from maekit.train.optim import adamw, finetune_groups, lars, pretrain_groups
from maekit.train.schedule import Schedule, schedule

SMALL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "img_size": 80, "patch_size": 8, "depth": 3,
    "decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4,
}  # fmt: skip
"""100 patches, a number that float dust shows at; every rule is the same at any size."""
NAMES = {"B": "vit_base_patch16_224", "L": "vit_large_patch16_224", "H": "vit_huge_patch14_224"}


class Own:
    """This installation of maekit, by a model of two blocks; counts are of the published sizes."""

    name, version = "maekit", __version__
    how = "create_model: width 192, 3 + 2 blocks, 100 patches; ViT-B, L and H without memory for counts"
    trained = False

    def build(self, seed: int) -> MaskedAutoencoder:
        """Draw a small model."""
        torch.manual_seed(seed)
        return create_model(**SMALL)

    def tensors(self, model: Any) -> Mapping[str, Tensor]:
        """Rename: the encoder has the authors' names, the decoder's get their prefix."""
        encoder = dict(model.encoder.named_parameters())
        decoder = {
            name if name == "mask_token" else f"decoder_{name}": value
            for name, value in model.decoder.named_parameters()
        }
        return encoder | decoder

    def forward(self, model: Any, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Mapping[str, Any]:
        """Run the model."""
        return model(images, mask_ratio, noise=noise)._asdict()

    def features(self, model: Any, images: Tensor) -> Tensor:
        """Return all tokens."""
        return model.features(images, pool="tokens")

    def published(self, size: str) -> nn.Module:
        """Build a published size without memory."""
        with torch.device("meta"):
            return create_model(NAMES[size])

    def resized(self, model: Any, grid: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the same weights at another image size."""
        other = at_size(model, grid * model.patch)
        assert other.encoder.pos_embed is not None
        return other.encoder.pos_embed, other.decoder.pos_embed

    def saved_names(self, model: Any) -> tuple[set[str], set[str]]:
        """Write the encoder's file; timm's own names are what it is meant for."""
        with tempfile.TemporaryDirectory() as folder:
            save_encoder(model, Path(folder) / "encoder.safetensors")
            written = set(load_file(Path(folder) / "encoder.safetensors"))
        with torch.device("meta"):
            published = timm.create_model(
                model.spec["name"], num_classes=0, depth=len(model.encoder.blocks), patch_size=model.patch
            )
        return written, set(published.state_dict())

    def pretrain_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build what `maekit pretrain` trains with by default."""
        settings = Pretrain()
        return adamw(pretrain_groups(model, settings.weight_decay), betas=settings.betas, lr=1e-3)

    def learning_rate(self, step: int, *, steps: int, warmup: int, base_lr: float, batch: int) -> float:
        """Ask the schedule."""
        loop = Loop(steps=steps, warmup_steps=warmup, base_lr=base_lr, batch_size=batch)
        return schedule(loop, 1, batch).lr(step)

    def train_epoch(self, module: nn.Module, images: Tensor, optimizer: Any, *, batch: int, micro_batch: int) -> None:
        """Train on the one loop and the one loader, into a folder that is thrown away."""
        size = (images.shape[2], images.shape[3])
        loader = Loader(
            DatasetSource([image.permute(1, 2, 0).numpy() for image in images], channels=images.shape[1]),
            EvalView(size, 1.0),
            batch_size=batch, micro_batch=micro_batch, mean=(0.0,), std=(1.0,),
        )  # fmt: skip
        loop = Loop(epochs=1, batch_size=batch, lr=1.0, warmup_steps=0, precision="fp32")
        plan = Plan(Schedule(loader.steps_per_epoch, 0, 1.0, 1.0, loader.steps_per_epoch), loop, 0, {})

        def step(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": module(batch["images"])}

        with tempfile.TemporaryDirectory() as folder, _quietly():
            fit(module, step, loader, optimizer, plan, run=Path(folder), world=World(0, 1, torch.device("cpu")))

    def finetune_model(self, model: Any, num_classes: int, drop_path: float) -> nn.Module:
        """Put a head on, as `maekit finetune` does by default."""
        return classifier(model, num_classes, drop_path=drop_path)

    def finetune_groups(self, classifier: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
        """Group as `maekit finetune` does."""
        return finetune_groups(classifier, 0.05, layer_decay)

    def eval_view(self, image: Image.Image) -> Tensor:
        """Show what every score of maekit is taken on."""
        return EvalView((224, 224), default_crop_pct((224, 224)))(pil_to_tensor(image))

    def probe_head(self, dim: int, num_classes: int) -> nn.Module:
        """Build the head of `maekit probe --protocol lars`."""
        return LinearHead(dim, num_classes)

    def probe_optimizer(self, head: nn.Module) -> torch.optim.Optimizer:
        """Build its optimizer."""
        return lars(head, lr=6.4)


class File(Own):
    """Weights of a file or run folder, whatever layout `load_model` reads, in maekit's model."""

    trained = True

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.model = load_model(path)
        torch.manual_seed(1)
        # what differs between two readings was drawn, not read
        self.holds_decoder = torch.equal(self.model.decoder.mask_token, load_model(path).decoder.mask_token)
        self.name, self.how = str(path), f"load_model: {self.model.spec['name']}"
        self.how += "" if self.holds_decoder else "; the file holds no decoder"
        self.grid, self.heads = self.model.grid, (self.model.num_heads, self.model.spec["decoder_heads"])

    def build(self, seed: int) -> MaskedAutoencoder:
        """Return the file's weights, whatever the seed."""
        return copy.deepcopy(self.model)

    def tensors(self, model: Any) -> Mapping[str, Tensor]:
        """Leave out a decoder that was drawn anew."""
        found = super().tensors(model)
        if self.holds_decoder:
            return found
        return {name: value for name, value in found.items() if "decoder" not in name and name != "mask_token"}

    def published(self, size: str) -> nn.Module:
        """Say that one file is one size."""
        raise NotShown("the audit is of one file")

    def resized(self, model: Any, grid: int) -> tuple[Tensor, Tensor]:
        """Leave grids that are not square out."""
        if model.grid[0] != model.grid[1]:
            raise NotShown("the grid is not square")
        return super().resized(model, grid)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the loop's lines about its throw-away folder off the terminal."""
    log = logging.getLogger("maekit")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
