"""How a step's cost grows: what is made of times is exact; how fast it was is never asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maekit.bench.contenders import ours
from maekit.bench.scale import Point, cores, fitted, judged
from maekit.errors import MaekitError
from maekit.model.flops import flops
from maekit.model.mae import create_model
from maekit.report.scaling import told
from maekit.tasks.bench import bench

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
    "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "device": "cpu", "precision": "fp32", "action": "scale",
}  # fmt: skip
SPEC = {key: value for key, value in TINY.items() if key not in ("model", "device", "precision", "action")}


def test_the_figures_of_a_sweep_over_mask_ratios_belong_together(tmp_path: Path) -> None:
    done = bench({**TINY, "img_size": 32, "batch_size": 4, "rounds": 2, "out": tmp_path / "new"})
    found: Any = done.metrics
    model = create_model("vit_tiny_patch16_224", img_size=32, **SPEC)
    assert [(one["value"], one["size"]) for one in found["points"]] == [
        (0.9, 1), (0.75, 4), (0.5, 8), (0.25, 12), (0.1, 14),
    ]  # fmt: skip
    for one in found["points"]:
        assert one["flops"] == 4 * flops(model, one["value"]).total and 0 < one["attention"] < 1 > one["decoder"]
        assert one["lowest"] <= one["seconds"] <= one["highest"]
        assert one["images_per_second"] == pytest.approx(4 / one["seconds"])
        assert one["flops_per_second"] == pytest.approx(one["flops"] / one["seconds"])
        rate = max(other["flops_per_second"] for other in found["points"])
        assert one["over_best"] == pytest.approx(rate / one["flops_per_second"])
    assert json.loads((tmp_path / "new" / "scale.json").read_text()) == json.loads(json.dumps(found))
    with Image.open(tmp_path / "new" / "scale.png") as picture:
        assert min(picture.size) > 500
    assert "decoder" in done.text and "patches kept" in done.text


@pytest.mark.parametrize(
    ("over", "more", "sizes", "exponent"),
    [("batch-size", {"img_size": 16, "batch_size": 5}, [1, 2, 5], 1.0),
     ("img-size", {"img_size": 16, "batch_size": 2}, [1, 2, 4], 0.794),
     ("threads", {"points": [1, min(2, cores())], "img_size": 16, "batch_size": 2}, [1, 2], -1.0)],
)  # fmt: skip
def test_other_settings_are_swept(over: str, more: dict[str, Any], sizes: list[int], exponent: float) -> None:
    if over == "threads" and cores() < 2:
        pytest.skip("one core")
    before = torch.get_num_threads()
    found: Any = bench({**TINY, "over": over, "rounds": 1, **more}).metrics
    assert [one["size"] for one in found["points"]] == sizes
    assert found["points"][0]["grows"] is None and found["points"][0]["expected"] is None
    assert found["points"][-1]["expected"] == pytest.approx(exponent, abs=1e-3)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [({"over": "threads", "points": [1, 4096]}, "E-CONFIG-POINTS.*4096.*at most"),
     ({"over": "batch-size", "points": [1, 2.5]}, "E-CONFIG-POINTS.*2.5.*whole numbers"),
     ({"over": "batch-size", "points": [2, 2]}, "E-CONFIG-POINTS.*at least 2"),
     ({"over": "mask-ratio", "points": [0.5, 1]}, "E-CONFIG-POINTS.*found 1, expected shares"),
     ({"points": [0.5, 0.99], "img_size": 32}, "E-CONFIG-MASK.*keeps no patch"),
     ({"points": [0.78, 0.76, 0.5], "img_size": 32}, "E-CONFIG-POINTS.*3 patches at 0.76.*different number"),
     ({"mask_kind": "none", "loss_on": "all", "add_noise": 0.3, "img_size": 32}, "E-CONFIG-POINTS.*none"),
     ({"over": "img-size", "points": [32, 36]}, "E-CONFIG-SIZE.*36 x 36"),
     ({"over": "img-size", "points": [32, 64], "img_size": 32}, "E-CONFIG-IDLE.*--img-size"),
     ({"mask_ratio": 0.5}, "E-CONFIG-IDLE.*--mask-ratio"), ({"action": "train", "over": "threads"}, "E-CONFIG-IDLE")],
)  # fmt: skip
def test_points_that_cannot_be_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(MaekitError, match=words):
        bench({**TINY, **more})


positive = st.floats(1e-6, 1e3)


@given(positive, st.floats(1e6, 1e15), st.lists(st.integers(1, 10**6), min_size=2, max_size=6, unique=True))
def test_a_line_is_found_again(fixed: float, rate: float, sizes: list[int]) -> None:
    line = fitted([rate * size for size in sizes], [fixed + size for size in sizes])
    assert line.misses < 1e-3
    assert [line.at(rate * size) for size in sizes] == pytest.approx([fixed + size for size in sizes], rel=1e-3)


def test_neither_part_of_a_line_is_negative() -> None:
    faster, slower = fitted([1.0, 2.0], [1.0, 4.0]), fitted([1.0, 2.0], [3.0, 2.0])
    assert faster.fixed_seconds == 0 and faster.flops_per_second is not None
    assert slower.flops_per_second is None and 2 < slower.fixed_seconds < 3


def test_what_is_fixed_and_what_is_dear_is_said() -> None:
    """Made-up times: a tenth of a second, and 1 GFLOP/s."""
    model = create_model("vit_tiny_patch16_224", img_size=16, **SPEC)
    contender = ours(model, 0.75, "fp32", compiled=False)
    points = [
        Point(size, contender, torch.empty(size, 3, 16, 16), 1, size, size * 10**8, 0.1, 0.5) for size in (1, 4, 64)
    ]
    found, line = judged(points, [[0.19, 0.2, 0.3], [0.5], [6.5]])
    assert line.fixed_seconds == pytest.approx(0.1) and line.flops_per_second == pytest.approx(1e9)
    assert [one.fitted for one in found] == pytest.approx([0.2, 0.5, 6.5]) and found[2].over_best == 1
    assert found[0].over_best == pytest.approx(2 / (65 / 64)) and found[0].highest == 0.3
    assert found[1].grows == pytest.approx(0.661, abs=1e-3) and found[1].expected == pytest.approx(1)
    said = "\n".join(told({"over": "batch-size", "points": [vars(one) for one in found], "line": vars(line)}))
    assert "within 10%: batch-size 64\ndearer: 1, 1.97 times (mostly a fixed cost)\ndearer: 4, 1.23" in said
