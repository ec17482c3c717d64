"""The command on a tiny run with several checkpoints, and what it says to mistakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maekit.errors import MaekitError
from maekit.interchange.weights import save_model
from maekit.model.mae import create_model
from maekit.tasks.gallery import gallery

ALL = {
    "masks.png", "ratios.png", "training.png", "attention-class.png", "attention-2-2.png", "attention-rollout.png",
    "features.png", "features-without-place.png", "failures-images.png", "failures-patches.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(
    maekit: Callable[..., Any],
    flat: Path,
    tiny: dict[str, Any],
    flags: Callable[[dict[str, Any]], list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pre-training that keeps the checkpoints of steps 4, 8 and 12."""
    out = tmp_path_factory.mktemp("gallery") / "run"
    done = maekit("pretrain", "--data", flat, "--out", out, "--keep", 5, *flags(tiny))
    assert done.code == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that cut the same images into other patches and predict histograms of gradients."""
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2, target="hog",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_model(model, path)
    return path


def test_the_command_writes_a_page_and_every_picture(maekit: Callable[..., Any], run: Path, flat: Path) -> None:
    done = maekit(
        "gallery", run, "--data", flat, "--split", "all", "--count", 3, "--among", 10, "--ratios", 50, 75, "--json"
    )
    assert done.code == 0, done.stderr
    assert done.json["images"] == 3
    assert done.json["parts"] == ["Kinds of masks", "Mask ratios", "Over training", "Attention", "Features", "Failures"]
    out = run / "gallery"
    assert {file.name for file in out.iterdir()} == ALL | {"index.html"}
    assert {Path(file).name for file in done.json["files"]} == ALL | {"index.html"}
    page = (out / "index.html").read_text()
    assert page.count("<img") == len(ALL) and "http" not in page.replace("http-equiv", "").replace("http://www.w3", "")
    assert all(f"step {step}" in page for step in (4, 8, 12))
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ALL)


def test_the_same_seed_draws_the_same(run: Path, flat: Path, tmp_path: Path) -> None:
    asked = {"runs": [run], "data": str(flat), "count": 2, "among": 4, "only": "ratios,features,failures"}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        gallery({**asked, "out": tmp_path / name, "seed": seed})
    drawn = {n: {p.name: p.read_bytes() for p in (tmp_path / n).glob("*.png")} for n in "abc"}
    assert drawn["a"] == drawn["b"] and drawn["a"]["ratios.png"] != drawn["c"]["ratios.png"]
    assert drawn["a"]["features.png"] == drawn["c"]["features.png"]


def test_runs_stand_side_by_side_under_their_names(run: Path, other: Path, flat: Path, tmp_path: Path) -> None:
    weights = tmp_path / "far" / "other.safetensors"
    weights.parent.mkdir()
    torch.manual_seed(1)
    save_model(
        create_model(
            "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, embed_dim=16, depth=1, num_heads=2,
            decoder_dim=16, decoder_depth=2, decoder_heads=2, target="pixel",
        ),
        weights,
    )  # fmt: skip
    asked = {"data": str(flat), "count": 2, "only": ["beside", "features"], "out": tmp_path / "out"}
    found = gallery({**asked, "runs": [run, other, weights]})
    # as long as it takes to tell them apart
    last = [path.with_suffix("").parts[-2:] for path in (run, other, weights)]
    names = ["/".join(each) for each in last]
    assert found.metrics["parts"] == ["Side by side", *(f"Features: {name}" for name in names)]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "predicts hog, which are no pixels" in page and "The same images, the same masks." in page
    assert (tmp_path / "out" / f"{names[0].replace('/', '-')}-features.png").exists()


def test_weights_without_checkpoints_or_pixels_say_so(other: Path, flat: Path, tmp_path: Path) -> None:
    asked = {"runs": [other], "data": str(flat), "count": 2, "out": tmp_path, "only": "training,ratios"}
    gallery(asked)
    page = (tmp_path / "index.html").read_text()
    assert "keeps no checkpoint" in page and "no pixels" in page
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"runs": []}, "E-USAGE-RUN"),
        ({"data": None}, "E-USAGE-IMAGES"),
        ({"runs": [Path("absent")]}, "E-CKPT-"),
        ({"data": "absent"}, "E-DATA-PATH"),
        ({"patches": ["4,0"], "only": "attention"}, "E-CONFIG-PATCHES.*grid of 4 x 4"),
        ({"blocks": [2], "only": "features"}, "E-CONFIG-BLOCKS.*expected 1 to 1"),
        ({"mask_ratio": 0.99}, "E-CONFIG-MASK"),
        ({"only": "ratios,attenton"}, "E-CONFIG-"),
        ({"patches": ["3"]}, "E-CONFIG-"),
        ({"out": Path(__file__)}, "E-ENV-OUT"),
    ],
)
def test_faults_are_one_plain_error_and_leave_nothing(
    run: Path, flat: Path, tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    asked: dict[str, Any] = {"runs": [run], "data": str(flat), "count": 2, "among": 2, "out": tmp_path / "out"}
    with pytest.raises(MaekitError, match=code):
        gallery(asked | change)
    assert not (tmp_path / "out").exists()


def test_a_run_named_twice_is_refused(run: Path, flat: Path) -> None:
    with pytest.raises(MaekitError, match=r"E-USAGE-RUN.*twice"):
        gallery({"runs": [run, run], "data": str(flat)})
