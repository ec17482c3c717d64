"""What a checkpoint costs: counted and put together; how long it took is never asserted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maekit.bench.contenders import ours
from maekit.bench.saving import Cost, Costs, costs
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.model.mae import create_model
from maekit.tasks.bench import bench
from maekit.train import checkpoint

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
    "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "batch_size": 4, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def test_a_checkpoint_that_is_measured_is_one_to_go_on_from(tmp_path: Path) -> None:
    spec = {key: value for key, value in TINY.items() if key not in ("model", "batch_size", "device", "precision")}
    model = create_model("vit_tiny_patch16_224", **spec)
    found = costs(ours(model, 0.75, "fp32", compiled=False), torch.randn(4, 3, 16, 16), tmp_path, {}, rounds=1)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.step == 5  # one before, one of each kind to warm up, one of each that counts
    assert len(checkpoint.steps(tmp_path)) == 1
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    assert {name.rpartition("/")[0] for name in saved.tensors["optimizer"]} == trained
    assert found.bytes == sum(file.stat().st_size for file in saved.path.iterdir())
    for cost in (found.beside, found.waited):
        assert len(cost.stall) == len(cost.write) == len(cost.added) == 1
        assert min(cost.stall) > 0 and min(cost.write) > 0
    assert found.steps >= 4 and found.step_seconds > 0


def test_shares_are_of_all_the_time() -> None:
    cost = Cost([0.1], [2.0], [0.2, 0.5, 9.0])
    found = Costs(bytes=10, steps=4, step_seconds=0.1, beside=cost, waited=cost, late=0)
    assert found.seconds == 0.5 and found.share(45) == pytest.approx(0.1)


def test_bench_checkpoint_leaves_nothing_on_the_disk_that_it_measures(tmp_path: Path) -> None:
    images = len(open_source("builtin:fashion", "train-or-all"))
    assert images % 3
    given = {"batch_size": 3, "data": "builtin:fashion", "rounds": 1, "out": tmp_path / "new"}
    done = bench({**TINY, "action": "checkpoint", **given})
    found: Any = done.metrics
    assert list((tmp_path / "new").iterdir()) == []
    assert set(found["share"]) == {"one a minute", f"every {images // 3 + 1} steps"}  # an epoch
    assert found["share"]["one a minute"] == pytest.approx(found["added_seconds"] / 60)
    assert found["bytes_per_second"] == pytest.approx(found["bytes"] / found["write_seconds"])
    assert "loop waits for copy" in done.text and "verified at" in done.text


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MaekitError, match="E-ENV-OUT"):
        bench({**TINY, "action": "checkpoint", "out": tmp_path / "file"})
