"""What `maekit bench` prints belongs together and comes from steps that train; how fast it was is never asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maekit.bench.contenders import ours, peer
from maekit.bench.machine import layer_in_fp32_over_bf16, peak
from maekit.bench.shares import KINDS, PARTS, REST, kinds, shares
from maekit.errors import MaekitError
from maekit.model.flops import flops
from maekit.model.mae import create_model
from maekit.tasks.bench import bench

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "batch_size": 8, "device": "cpu",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the peak be sought among small products."""
    monkeypatch.setattr("maekit.bench.machine.SIZES", (64, 128))


def test_the_figures_of_a_step_belong_together(small: None, tmp_path: Path) -> None:
    done = bench({**TINY, "action": "train", "rounds": 3, "profile": str(tmp_path / "trace.json"), "precision": "fp32"})
    found: Any = done.metrics
    middle, model = found["step_seconds"]["p50"], create_model(**MODEL)
    assert found["images_per_second"] == pytest.approx(8 / middle)
    assert found["flops_per_image"] == flops(model, 0.75).total
    assert found["flops_per_second"] == pytest.approx(found["flops_per_image"] * 8 / middle)
    assert found["mfu"] == pytest.approx(found["flops_per_second"] / found["peak_flops"])
    assert middle <= found["step_seconds"]["p90"] <= found["step_seconds"]["p99"]
    assert list(found["shares"]) == list(PARTS) and sum(found["shares"].values()) == pytest.approx(1)
    assert [*found["kinds"]] == [*KINDS, REST] and sum(found["kinds"].values()) == pytest.approx(1)
    assert min(found["kinds"].values()) > 0
    assert found["ratio"] == {} and f"MFU {found['mfu']:.0%}" in done.text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_whether_compiling_pays_is_told(small: None) -> None:
    done = bench({**TINY, "action": "train", "rounds": 3, "precision": "fp32", "compile": True})
    found: Any = done.metrics
    saved = found["step_seconds"]["p50"] * (found["compiled_is_faster"] - 1)
    assert found["ratio"] == {} and "maekit, not compiled" in done.text
    if saved > 0:
        steps = (found["first_step_seconds"] - found["step_seconds"]["p50"]) / saved
        assert found["compiling_pays_after_steps"] == pytest.approx(steps, abs=1.01)
        assert f"pays from {found['compiling_pays_after_steps']:,} steps on" in done.text
    else:
        assert found["compiling_pays_after_steps"] is None and "never pays" in done.text


MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["transformers", "lightly", "timm-forward"])
def test_peers_have_the_same_sizes_and_train(name: str) -> None:
    pytest.importorskip(name.partition("-")[0])
    torch.manual_seed(0)
    own = create_model(**MODEL)
    other = peer(name, own, 0.75, "fp32", CPU)
    mine = ours(own, 0.75, "fp32", compiled=False)

    def trained(model: torch.nn.Module) -> int:
        return sum(part.numel() for part in model.parameters() if part.requires_grad)

    images = torch.randn(8, 3, 32, 32)
    if not other.trains:
        before = [part.clone() for part in other.model.parameters()]
        assert other.seconds(images) > 0
        assert all(map(torch.equal, before, other.model.parameters()))
        return
    assert trained(other.model) == pytest.approx(trained(mine.model), rel=0.01)
    for one in (mine, other):
        with torch.no_grad():
            first = float(torch.stack([one.loss(images) for _ in range(8)]).mean())
        for group in one.optimizer.param_groups:
            group["lr"] = 3e-3
        for _ in range(30):
            one.step(images)
        with torch.no_grad():
            last = float(torch.stack([one.loss(images) for _ in range(8)]).mean())
        assert last < first


def test_a_peer_may_have_a_precision_of_its_own() -> None:
    pytest.importorskip("transformers")
    found: Any = bench({**TINY, "action": "train", "precision": "bf16", "vs": "transformers,transformers:fp32"}).metrics
    assert set(found["ratio"]) == {"transformers", "transformers:fp32"} and set(found["versions"]) == {"transformers"}
    own = create_model(**MODEL)
    precisions = [peer(name, own, 0.75, "bf16", CPU).precision for name in ("transformers", "transformers:fp32")]
    assert precisions == ["bf16", "fp32"]
    for wrong in ("transformers:fp8", "nobody:fp32", ":fp32", "transformers:"):
        with pytest.raises(MaekitError, match=f"E-CONFIG-PEER.*found {wrong}.*transformers"):
            peer(wrong, own, 0.75, "fp32", CPU)


@pytest.mark.parametrize("name", ["transformers", "lightly"])
def test_a_variant_that_a_peer_does_not_have_is_refused(name: str) -> None:
    pytest.importorskip(name)
    with pytest.raises(MaekitError, match="E-CONFIG-PEER"):
        peer(name, create_model(**MODEL, variant={"decoder_kind": "cross"}), 0.75, "fp32", CPU)


def test_marks_are_taken_away_again() -> None:
    model = create_model(**MODEL)
    found = shares(ours(model, 0.75, "fp32", compiled=False), torch.randn(2, 3, *model.img_size), rounds=1)
    assert set(found) == set(PARTS) and min(found.values()) > 0
    assert not model.decoder.pred._forward_hooks and not model.encoder.norm._forward_hooks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_kinds_of_a_step_are_told_by_what_was_called(precision: str) -> None:
    """Wide and shallow it is a matter of linear maps, narrow and of many tokens of attention."""
    wide = {**MODEL, "embed_dim": 256, "num_heads": 1, "img_size": 16, "decoder_dim": 16}
    many = {**MODEL, "embed_dim": 8, "num_heads": 2, "patch_size": 2, "depth": 4, "decoder_dim": 8}
    found = []
    for spec in (wide, many):
        model = create_model(**spec)
        found.append(kinds(ours(model, 0.5, precision, compiled=False), torch.randn(64, 3, *model.img_size), rounds=1))
    assert found[0]["linear maps"] > found[0]["attention"] and found[1]["attention"] > found[1]["linear maps"]


def test_masks_and_memory(small: None) -> None:
    masks: Any = bench({**TINY, "action": "mask", "rounds": 1}).metrics
    assert set(masks["share"]) == {"random 75 %", "block 50 %", "block 75 %", "grid 75 %", "centre 25 %"}
    nine: Any = bench({**TINY, "action": "mask", "rounds": 1, "img_size": 24}).metrics
    assert set(nine["share"]) == {*masks["share"]} - {"grid 75 %"}  # no such pattern on 3 x 3
    many = {"action": "memory", "batch_size": 256, "precision": "fp32", "patch_size": 4, "depth": 6, "decoder_depth": 4}
    memory: Any = bench({**TINY, **many}).metrics
    assert memory["mib"]["maekit --checkpointing"] < 0.8 * memory["mib"]["maekit"]
    some: Any = bench({**TINY, **many, "checkpointing_encoder": 2, "checkpointing_decoder": 0}).metrics
    encoder = some["mib"]["maekit --checkpointing --checkpointing-encoder 2 --checkpointing-decoder 0"]
    assert memory["mib"]["maekit --checkpointing"] < encoder < memory["mib"]["maekit"]
    counted = [*memory["counted_mib"].values(), *some["counted_mib"].values()]
    assert counted[1] < counted[3] < counted[0] == counted[2] < memory["mib"]["maekit"]
    trained = create_model(**{**MODEL, "patch_size": 4, "depth": 6, "decoder_depth": 4}).parameters()
    moments = sum(12 * part.numel() for part in trained if part.requires_grad) / 2**20  # with the weights, in fp32
    assert memory["kept_mib"]["maekit"] == pytest.approx(moments, rel=0.1)


def test_a_layer_is_timed_in_both() -> None:
    assert 0.01 < layer_in_fp32_over_bf16(32, tokens=64, rounds=1) < 100


def test_the_peak_is_that_of_the_larger_of_two_products() -> None:
    best, side = peak(CPU, torch.float32, rounds=1)
    assert best > 1e8 and side >= 2048


@pytest.mark.parametrize(
    ("given", "words"),
    [({}, "E-USAGE-ACTION"), ({"action": "train", "data": "x"}, "E-CONFIG-IDLE.*--data"),
     ({"action": "mask", "vs": "transformers"}, "E-CONFIG-IDLE.*--vs"),
     ({"action": "train", "vs": "x"}, "E-CONFIG-PEER"),
     ({"action": "memory", "vs": "timm-forwardx"}, "E-CONFIG-PEER"),
     ({"action": "train", "decoded_mb": 0}, "E-CONFIG-IDLE.*--decoded-mb"),
     ({"action": "data"}, "E-USAGE-DATA"), ({"action": "decode", "data": "."}, "E-DATA-EMPTY"),
     ({"action": "train", "model": "resnet18"}, "E-CONFIG-MODEL")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    given: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaekitError, match=words):
        bench(given)
