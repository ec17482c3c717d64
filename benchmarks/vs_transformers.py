"""Steps and images a second against transformers' ViTMAE of the same size: forward, backward, AdamW.

Both models live in one process and take turns, round by round, so that a machine that slows down slows both; the
ratio is taken within each round. Same sizes, precision, images, optimizer and ratio of masked patches.

    pip install transformers
    python benchmarks/vs_transformers.py [--device cuda] [--precision bf16] [--batch 16] [--rounds 9] [--json]
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

import maekit
from maekit.model.mae import create_model
from maekit.recipes import RECIPES
from maekit.settings import Pretrain

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """One architecture, said once for both."""

    model: str
    img_size: int
    channels: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    target: str
    mask_ratio: float
    batch: int
    steps: int


def _recipe(name: str, steps: int) -> Size:
    """Take a size from a recipe, so that the figures are of what is shipped."""
    run = cast(Pretrain, RECIPES[name]().settings)
    assert run.img_size[0] == run.img_size[1] and run.patch_size and run.embed_dim and run.depth and run.num_heads
    return Size(
        run.model,
        run.img_size[0],
        cast(int, run.channels),
        run.patch_size,
        run.embed_dim,
        run.depth,
        run.num_heads,
        run.decoder_dim,
        run.decoder_depth,
        run.decoder_heads,
        run.target,
        run.mask_ratio,
        run.batch_size,
        steps,
    )


SIZES = {
    "quickstart": _recipe("builtin/pretrain-fashion", 8),
    "28px/4": Size("vit_tiny_patch16_224", 28, 1, 4, 96, 4, 4, 64, 1, 4, "pixel", 0.75, 256, 4),
    "vit-b/16": Size("vit_base_patch16_224", 224, 3, 16, 768, 12, 12, 512, 8, 16, "norm_pixel", 0.75, 16, 1),
}


def ours(size: Size) -> tuple[nn.Module, Loss]:
    """Build maekit's model and the call that training makes."""
    model = create_model(
        size.model,
        img_size=size.img_size,
        patch_size=size.patch_size,
        in_chans=size.channels,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        decoder_dim=size.decoder_dim,
        decoder_depth=size.decoder_depth,
        decoder_heads=size.decoder_heads,
        target=size.target,
    )
    return model, lambda images: model.loss(images, mask_ratio=size.mask_ratio)


def theirs(size: Size) -> tuple[nn.Module, Loss]:
    """Build transformers' model with its fastest attention."""
    settings: dict[str, Any] = {
        "image_size": size.img_size,
        "num_channels": size.channels,
        "patch_size": size.patch_size,
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": 4 * size.embed_dim,
        "decoder_hidden_size": size.decoder_dim,
        "decoder_num_hidden_layers": size.decoder_depth,
        "decoder_num_attention_heads": size.decoder_heads,
        "decoder_intermediate_size": 4 * size.decoder_dim,
        "mask_ratio": size.mask_ratio,
        "norm_pix_loss": size.target == "norm_pixel",
        "attn_implementation": "sdpa",
    }
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**settings))
    return model, lambda images: model(images).loss


class Contender:
    """A model in training, and how long its steps take."""

    def __init__(self, made: tuple[nn.Module, Loss], device: torch.device, precision: str, compiled: bool) -> None:
        self.model, self.loss = made[0].to(device).train(), made[1]
        if compiled:
            self.loss = torch.compile(self.loss)
        self.device, self.precision = device, precision
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def seconds(self, images: Tensor, steps: int) -> float:
        """Return seconds for one step, over `steps` of them."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            with self._autocast():
                loss = self.loss(images)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return (time.perf_counter() - start) / steps

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Let both train in turns; return medians and the spread of the ratio over rounds."""
    size, device = SIZES[name], torch.device(options.device)
    batch, steps = options.batch or size.batch, options.steps or size.steps
    images = torch.randn(batch, size.channels, size.img_size, size.img_size, device=device)
    contenders = {
        label: Contender(build(size), device, options.precision, options.compile)
        for label, build in (("maekit", ours), ("transformers", theirs))
    }
    for contender in contenders.values():
        contender.seconds(images, max(2, steps // 2))  # warm-up: optimizer state, kernel choice, compilation
    rounds = [
        {label: contenders[label].seconds(images, steps) for label in order}
        for order in _orders(options.rounds, list(contenders))
    ]
    ratios = sorted(times["transformers"] / times["maekit"] for times in rounds)
    medians = {label: statistics.median(times[label] for times in rounds) for label in contenders}
    return {
        "size": name,
        "batch": batch,
        "patch_size": SIZES[name].patch_size,
        "mask_ratio": SIZES[name].mask_ratio,
        "parameters": {label: contender.parameters for label, contender in contenders.items()},
        "steps_per_second": {label: 1 / seconds for label, seconds in medians.items()},
        "images_per_second": {label: batch / seconds for label, seconds in medians.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "rounds": options.rounds,
    }


def _orders(rounds: int, labels: list[str]) -> Iterator[list[str]]:
    """Yield who goes first, in turns."""
    for index in range(rounds):
        yield labels if index % 2 == 0 else labels[::-1]


def table(found: list[dict[str, Any]]) -> str:
    """Return the results for people."""
    lines = [f"{'size':12} {'batch':>5}  {'model':13} {'steps/s':>9} {'images/s':>9}  speed of maekit / transformers"]
    for result in found:
        for label in ("maekit", "transformers"):
            ratio = f"{result['ratio']:.2f} ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})"
            lines.append(
                f"{result['size']:12} {result['batch']:5}  {label:13} {result['steps_per_second'][label]:9.2f} "
                f"{result['images_per_second'][label]:9.1f}  {ratio if label == 'maekit' else ''}".rstrip()
            )
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, help="images per step; default: the size's own")
    parser.add_argument("--steps", type=int, help="steps per round; default: the size's own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="both through torch.compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = [compare(name, options) for name in options.size or SIZES]
    where = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else platform.processor()
    setting = {
        "device": where or options.device,
        "threads": torch.get_num_threads(),
        "precision": options.precision,
        "compile": options.compile,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "maekit": maekit.__version__,
    }
    print("  ".join(f"{name} {value}" for name, value in setting.items()))
    print(table(found))
    if options.json:
        print(json.dumps({**setting, "results": found}))


if __name__ == "__main__":
    main()
