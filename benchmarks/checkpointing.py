"""What saving checkpoints costs training: steps of ViT-B with saves beside them over steps without.

Rounds of the same steps take turns: with one save in them, beside training (`maekit.train.saver`), with one save that
training waits for, and with none. The share is what a save adds to training, scaled to one save a minute. The stall is
the time that the loop itself waits in `Saver.save`.

    python benchmarks/checkpointing.py [--model vit_base_patch16_224] [--batch 4] [--seconds 20] [--rounds 5] [--json]
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from maekit.model.mae import create_model
from maekit.train.optim import adamw, pretrain_groups
from maekit.train.saver import Saver
from maekit.train.state import State


def main() -> None:
    """Time rounds of each kind in turns and print what a save costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = create_model(options.model, decoder_dim=512, decoder_depth=8, decoder_heads=16).to(device)
    optimizer = adamw(pretrain_groups(model, 0.05), betas=(0.9, 0.95), lr=1e-4)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    noise = torch.rand(options.batch, model.num_patches, device=device)
    state = State(model, optimizer, torch.amp.GradScaler(device.type, enabled=False), None)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model.loss(images, noise, mask_ratio=0.75).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_of(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return time.perf_counter() - began

    seconds_of(2)
    steps = max(4, round(options.seconds / (seconds_of(2) / 2)))
    times: dict[str, list[float]] = {"none": [], "beside": [], "waited for": []}
    stalls: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), {}, keep=1) as saver:
        saver.save(0, state.tensors(), state.numbers())  # the memory of the copy is there from then on
        saver.wait()
        for number in range(1, options.rounds + 1):
            times["none"].append(seconds_of(steps))
            began = time.perf_counter()
            saver.save(2 * number, state.tensors(), state.numbers())
            stalls.append(time.perf_counter() - began)
            rest = seconds_of(steps)
            still = not (saver.writing is None or saver.writing.done())
            saver.wait()
            times["beside"].append(stalls[-1] + rest)
            began = time.perf_counter()
            saver.save(2 * number + 1, state.tensors(), state.numbers())
            saver.wait()
            times["waited for"].append(time.perf_counter() - began + seconds_of(steps))
            if still:
                raise SystemExit("a round is shorter than a save: more --seconds")
    added = {
        name: [value - none for value, none in zip(times[name], times["none"], strict=True)]
        for name in ("beside", "waited for")
    }
    size = sum(value.numel() * value.element_size() for named in state.tensors().values() for value in named.values())
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "model": options.model, "batch": options.batch,
        "steps": steps, "megabytes": size / 1e6, "step_seconds": statistics.median(times["none"]) / steps,
        "stall_seconds": statistics.median(stalls),
        **{f"{name.replace(' ', '_')}_seconds": statistics.median(value) for name, value in added.items()},
        "share_at_one_a_minute": statistics.median(added["beside"]) / 60,
    }  # fmt: skip
    spread = " to ".join(f"{value / 60:.2%}" for value in (min(added["beside"]), max(added["beside"])))
    print(f"{options.model}: {size / 1e6:,.0f} MB, {steps} steps a round, {result['step_seconds']:.2f} s a step")
    print(f"the loop stands still for {result['stall_seconds']:.2f} s")
    print(f"a save adds {result['beside_seconds']:.2f} s beside, {result['waited_for_seconds']:.2f} s waited for")
    print(f"one a minute: {result['share_at_one_a_minute']:.2%} ({spread})")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
