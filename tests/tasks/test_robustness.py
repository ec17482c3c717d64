"""The verb from end to end: own corruptions, occlusion, the published sets in miniature, what cannot be scored."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from maekit.data.imagenet import synsets
from maekit.errors import MaekitError
from maekit.interchange.weights import metadata
from maekit.model.heads import classifier
from maekit.model.mae import create_model
from maekit.scores.corruption import ALEXNET, KINDS, STANDARD
from maekit.tasks.classifying import chosen
from maekit.tasks.corruptions import chosen_kinds
from maekit.tasks.robustness import robustness

SIDE = 32
Run = Callable[..., Any]


def weights(path: Path, classes: list[str], favourites: dict[int, float] | None = None, outputs: int = 0) -> Path:
    """Write a small classifier; with favourites one that says the same of every image: the output of largest value."""
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, embed_dim=16, depth=1, num_heads=2, decoder_dim=16,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    made = classifier(model, len(classes) or outputs)
    torch.nn.init.normal_(made.head.weight)  # type: ignore[arg-type]
    if favourites is not None:
        torch.nn.init.zeros_(made.head.weight)  # type: ignore[arg-type]
        with torch.no_grad():
            for output, value in favourites.items():
                made.head.bias[output] = value  # type: ignore[index]
    header = metadata(model, classes=classes or None, pool="mean")
    safetensors.torch.save_file(made.state_dict(), path, header)
    return path


def picture(file: Path, seed: int) -> None:
    """Write a coloured picture with an edge."""
    rng = np.random.default_rng(seed)
    pixels = np.full((SIDE, SIDE, 3), rng.integers(40, 216, 3), np.uint8)
    pixels[rng.integers(4, 20) :, rng.integers(4, 20) :] = rng.integers(0, 256, 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def folders(root: Path, counts: dict[str, int]) -> Path:
    """Write so many images into each class folder."""
    for at, (name, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / name / f"{i}.png", 100 * at + i)
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier of three colours' classes that says different things of different images, and images."""
    root = tmp_path_factory.mktemp("own")
    return weights(root / "c.safetensors", ["a", "b", "c"]), folders(root / "data", {"a": 4, "b": 4, "c": 4})


@pytest.fixture
def score(own: tuple[Path, Path], tmp_path: Path) -> Run:
    """``score(protocol=..., ...)`` -> metrics."""

    def run(**changes: Any) -> dict[str, Any]:
        base = {
            "run": own[0],
            "data": str(own[1]),
            "all_images": True,
            "out": tmp_path / "out",
            "workers": 0,
            "device": "cpu",
        }
        return dict(robustness({key: value for key, value in (base | changes).items() if value is not None}).metrics)

    return run


def refused(code: str, score: Run, /, **changes: Any) -> str:
    with pytest.raises(MaekitError) as caught:
        score(**changes)
    assert caught.value.code == code, caught.value
    return str(caught.value)


# ---------------------------------------------------------------------------------------- corruptions made here


def test_all_nineteen_kinds_become_table_plot_and_mce(score: Run, tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    found = score(severities=[1, 5], reference="alexnet")
    assert list(found["kinds"]) == list(KINDS) and found["images"] == 12
    table = json.loads((tmp_path / "out" / "robustness.json").read_text())
    by_hand = []
    for kind in STANDARD:  # oracle: the definition, straight from the errors that were written
        mine = sum(table["errors"][kind][s] for s in ("1", "5"))
        by_hand.append(mine / (ALEXNET[kind, 1] + ALEXNET[kind, 5]))
    assert found["mce"] == pytest.approx(np.mean(by_hand)) and found["reference"] == "AlexNet"
    assert found["extra_ce"] is None and 0 <= found["extra_error"] <= 1 and found["published"] == {}
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [row["kind"] for row in rows] == list(KINDS) and rows[0]["severity 5"] == str(table["errors"][KINDS[0]]["5"])
    assert "mean of the 15 standard kinds" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "corruptions.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found


def test_an_unfinished_scoring_goes_on_after_the_last_kind(score: Run, tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    settings = {"kinds": ["fog", "contrast"], "severities": [2]}
    whole = score(**settings)
    file = tmp_path / "out" / "robustness.json"
    table = json.loads(file.read_text())
    table["errors"]["fog"] = {"2": 0.125}  # what stands there is kept
    del table["errors"]["contrast"]
    file.write_text(json.dumps(table))
    (tmp_path / "out" / "result.json").unlink()
    again = score(**settings)
    assert again["kinds"]["fog"]["error"] == 0.125
    assert again["kinds"]["contrast"] == whole["kinds"]["contrast"]
    assert again["mce"] is None  # two kinds are no mCE


def test_errors_of_other_weights_are_not_taken_over(score: Run, tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    file = weights(tmp_path / "w.safetensors", ["a", "b", "c"], {0: 1.0})
    settings = {"run": file, "kinds": ["fog"], "severities": [2]}
    assert score(**settings)["kinds"]["fog"]["error"] == pytest.approx(8 / 12)
    (tmp_path / "out" / "result.json").unlink()
    weights(file, ["a", "b", "c"], {0: 1.0, 1: 2.0})
    (tmp_path / "out" / "robustness.json").write_text(
        (tmp_path / "out" / "robustness.json").read_text().replace("0.66666", "0.11111")
    )
    assert score(**settings)["kinds"]["fog"]["error"] == pytest.approx(8 / 12)


def test_the_reference_may_be_weights_or_what_was_scored_before(score: Run, tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    constant = weights(tmp_path / "constant.safetensors", ["a", "b", "c"], {0: 1.0})
    settings: dict[str, Any] = {"kinds": ["noise"], "severities": [1, 3]}
    before = score(run=constant, out=tmp_path / "before", **settings)
    assert before["reference"] is None and before["kinds"]["shot_noise"]["ce"] is None
    one = score(reference=str(constant), out=tmp_path / "one", **settings)
    two = score(reference=str(tmp_path / "before"), out=tmp_path / "two", **settings)
    assert one["kinds"] == two["kinds"]
    assert one["kinds"]["shot_noise"]["ce"] == pytest.approx(one["kinds"]["shot_noise"]["error"] / (8 / 12))
    line = refused("E-CONFIG-REFERENCE", score, reference=str(tmp_path / "before"), out=tmp_path / "three", limit=5)
    assert "data" in line or "images" in line


def test_the_same_images_are_scored_whatever_the_model_and_other_seeds_are_other_draws() -> None:
    ids = [f"a/{i}.png" for i in range(50)]
    assert chosen(ids, 9, 0) == chosen(ids, 9, 0) != chosen(ids, 9, 1)
    assert set(chosen(ids, 9, 0)) < set(chosen(ids, 20, 0)) and len(chosen(ids, 9, 0)) == 9


def test_without_the_extra_nothing_is_begun(score: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert "pip install 'maekit[robust]'" in refused("E-ENV-IMPORT", score)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- occlusion


def test_occlusion_starts_at_the_plain_score_and_ends_in_files(score: Run, tmp_path: Path) -> None:
    found = score(protocol="occlusion", fractions=[0, 0.5, 0.9])
    curves = found["curves"]
    assert list(curves) == ["drop", "black", "shuffle"] and found["patches"] == 16
    at_zero = {points[0] for points in curves.values()}
    assert len(at_zero) == 1, "nothing is occluded: all ways are the plain model"
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [float(row["fraction"]) for row in rows] == [0, 0.5, 0.9]
    assert (tmp_path / "out" / "occlusion.png").exists() and json.loads((tmp_path / "out" / "result.json").read_text())


def test_occlusion_is_the_same_twice_and_follows_the_seed(score: Run, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"protocol": "occlusion", "fractions": [0.5, 0.75], "occlusions": ["shuffle", "drop"]}
    one, two = (score(out=tmp_path / name, **settings)["curves"] for name in "ab")
    others = [score(out=tmp_path / f"s{seed}", seed=seed, **settings)["curves"] for seed in (1, 2, 3)]
    assert one == two and list(one) == ["shuffle", "drop"] and any(other != one for other in others)


# -------------------------------------------------------------------------------------------- published sets


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[int, float]], Path]:
    """Weights of 1000 outputs that say the same of every image."""
    root = tmp_path_factory.mktemp("imagenet")

    def make(favourites: dict[int, float]) -> Path:
        file = root / f"{'-'.join(map(str, favourites))}.safetensors"
        return file if file.exists() else weights(file, synsets(), favourites)

    return make


@pytest.fixture
def published(score: Run, tmp_path: Path) -> Run:
    def run(protocol: str, model: Path, data: Path, **changes: Any) -> dict[str, Any]:
        return score(run=model, data=str(data), protocol=protocol, all_images=None, **changes)

    return run


def test_the_classes_are_timms() -> None:
    assert synsets() == ImageNetInfo("imagenet-1k").label_names() and synsets()[6] == "n01498041"


def test_imagenet_a_scores_among_its_200_classes(published: Run, imagenet: Run, tmp_path: Path) -> None:
    # 0 (tench) is no class of A; 6 and 11 are: the model prefers tench, then 11
    data = folders(tmp_path / "in-a", {synsets()[6]: 1, synsets()[11]: 3})
    found = published("in-a", imagenet({0: 9.0, 11: 5.0}), data)
    assert found["top1"] == 0.75 and found["top1_all"] == 0.0 and found["outputs"] == 200
    assert found["published"]["MAE ViT-B"] == 0.359 and found["published"]["supervised ViT-H"] == 0.331
    assert "MAE ViT-L | 0.571" in (tmp_path / "out" / "table.md").read_text()


def test_a_class_that_is_none_of_the_set_is_refused(published: Run, imagenet: Run, tmp_path: Path) -> None:
    data = folders(tmp_path / "in-r", {synsets()[0]: 1, synsets()[1]: 1})
    assert synsets()[0] in refused("E-DATA-CLASSES", published, protocol="in-r", model=imagenet({1: 1.0}), data=data)


def test_imagenet_v2_goes_by_number_and_not_by_name(published: Run, imagenet: Run, tmp_path: Path) -> None:
    # sorted as text, 10 stands before 2
    data = folders(tmp_path / "imagenetv2-matched-frequency-format-val", {"2": 3, "10": 2, "999": 1, "0": 1, "1": 1})
    assert published("in-v2", imagenet({2: 1.0}), data, out=tmp_path / "x")["top1"] == 3 / 8
    assert published("in-v2", imagenet({999: 1.0}), data, out=tmp_path / "y")["top1"] == 1 / 8


def test_imagenet_sketch_competes_among_all_classes(published: Run, imagenet: Run, tmp_path: Path) -> None:
    data = folders(tmp_path / "sketch", {synsets()[0]: 1, synsets()[999]: 1})
    found = published("in-sketch", imagenet({999: 1.0}), data)
    assert found["top1"] == 0.5 and "top1_all" not in found and found["published"]["best before MAE"] == 0.36


@pytest.mark.parametrize("flat", [True, False])
def test_real_counts_any_label_and_leaves_out_images_without(
    published: Run, imagenet: Run, tmp_path: Path, flat: bool
) -> None:
    # the first five of timm's labels: [], [970, 795], [230, 231], [809], [516, 850]
    for number in range(1, 6):
        folder = "" if flat else f"{synsets()[number]}/"
        picture(tmp_path / "val" / f"{folder}ILSVRC2012_val_{number:08d}.JPEG", number)
    found = published("in-real", imagenet({795: 1.0}), tmp_path / "val")
    assert found["images"] == 4 and found["left_out"] == 1 and found["top1"] == 0.25
    other = published("in-real", imagenet({850: 1.0}), tmp_path / "val", out=tmp_path / "other", limit=4)
    assert other["top1"] == 0.25


def test_real_needs_the_numbers_in_the_names(published: Run, imagenet: Run, tmp_path: Path) -> None:
    data = folders(tmp_path / "val", {synsets()[0]: 1})
    refused("E-DATA-LABELS", published, protocol="in-real", model=imagenet({0: 1.0}), data=data)


@pytest.mark.parametrize("archive", ["", "weather"])
def test_imagenet_c_is_read_as_published(published: Run, imagenet: Run, tmp_path: Path, archive: str) -> None:
    root = tmp_path / "in-c"
    for kind, right in (("fog", 1), ("snow", 3)):
        for severity in range(1, 6):
            folders(root / archive / kind / str(severity), {synsets()[7]: right, synsets()[8]: 1})
    found = published("in-c", imagenet({7: 1.0}), root)
    assert list(found["kinds"]) == ["snow", "fog"] and found["mce"] is None and found["top1"] is None
    assert found["kinds"]["fog"]["error"] == 0.5
    assert found["kinds"]["fog"]["ce"] == pytest.approx(2.5 / sum(ALEXNET["fog", s] for s in range(1, 6)))
    assert found["published"]["MAE ViT-H"] == 0.338 and found["reference"] == "AlexNet"


def test_imagenet_c_without_a_severity_or_any_kind_is_refused(published: Run, imagenet: Run, tmp_path: Path) -> None:
    folders(tmp_path / "c" / "fog" / "1", {synsets()[7]: 1, synsets()[8]: 1})
    assert "severity 2" in refused(
        "E-DATA-PATH", published, protocol="in-c", model=imagenet({7: 1.0}), data=tmp_path / "c"
    )
    refused("E-DATA-PATH", published, protocol="in-c", model=imagenet({7: 1.0}), data=tmp_path / "c" / "fog")


def test_mapped_classes_as_objectnet(published: Run, imagenet: Run, tmp_path: Path) -> None:
    data = folders(tmp_path / "objectnet", {"chair": 3, "bench": 1, "spoon": 4})
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"chair": [423, 559, "n04099969"], "bench": synsets()[703]}))
    found = published("mapped", imagenet({765: 1.0}), data, class_map=file)  # 765 is n04099969
    assert found["images"] == 4 and found["left_out"] == 4 and found["top1"] == 0.75
    (tmp_path / "map.txt").write_text("703\n559\n4\n")  # bench, chair, spoon: timm's form
    found = published("mapped", imagenet({4: 1.0}), data, class_map=tmp_path / "map.txt", out=tmp_path / "other")
    assert found["top1"] == 0.5


@pytest.mark.parametrize("text", ['{"chair": 1000}', '{"sofa": 1}', "[1]", "{", '{"chair": "n0"}', '{"chair": true}'])
def test_a_class_map_that_cannot_be_used_is_one_line(published: Run, imagenet: Run, tmp_path: Path, text: str) -> None:
    data = folders(tmp_path / "objectnet", {"chair": 1, "bench": 1})
    (tmp_path / "map.json").write_text(text)
    refused(
        "E-DATA-MAP", published, protocol="mapped", model=imagenet({4: 1.0}), data=data, class_map=tmp_path / "map.json"
    )


def test_official_weights_without_names_have_imagenets_order(published: Run, tmp_path: Path) -> None:
    data = folders(tmp_path / "sketch", {synsets()[3]: 1, synsets()[4]: 1})
    assert published("in-sketch", weights(tmp_path / "o.safetensors", [], {3: 1.0}, 1000), data)["top1"] == 0.5


def test_a_model_of_other_classes_is_refused(published: Run, own: tuple[Path, Path], tmp_path: Path) -> None:
    data = folders(tmp_path / "sketch", {synsets()[3]: 1, synsets()[4]: 1})
    assert "--protocol mapped" in refused("E-DATA-CLASSES", published, protocol="in-sketch", model=own[0], data=data)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def bad(score: Run) -> Iterator[Run]:
    yield lambda **changes: refused(changes.pop("code"), score, **changes)


def test_what_cannot_be_scored_is_one_line(bad: Run, own: tuple[Path, Path], tmp_path: Path) -> None:
    assert "did you mean 'fog'" in bad(code="E-USAGE-KINDS", kinds=["fogg"])
    bad(code="E-USAGE-DATA", data=None)
    bad(code="E-USAGE-RUN", run=None, protocol="occlusion")
    bad(code="E-USAGE-MAP", protocol="mapped", all_images=None)
    assert "fractions" in bad(code="E-CONFIG-BOTH", protocol="in-a", fractions=[0.5], all_images=None)
    bad(code="E-DATA-LABELS", protocol="occlusion", data=str(own[1] / "a"))
    two = folders(tmp_path / "two", {"a": 2, "z": 2})
    assert "'z'" in bad(code="E-DATA-CLASSES", protocol="occlusion", data=str(two))
    bare = weights(tmp_path / "bare.safetensors", [], {0: 1.0}, 7)
    assert "expected 7" in bad(code="E-DATA-CLASSES", protocol="occlusion", run=bare)
    assert not (tmp_path / "out").exists()


def test_a_pretrained_run_has_no_head_to_score(bad: Run, pretrained: Path) -> None:
    assert "maekit finetune" in bad(code="E-CKPT-KIND", run=pretrained, protocol="occlusion")


def test_groups_name_their_kinds() -> None:
    assert chosen_kinds(["blur", "fog"]) == ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "fog"]
    assert chosen_kinds([]) == list(KINDS)


def test_the_command(maekit: Callable[..., Any], own: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["robustness", own[0], "--data", own[1], "--all-images", "--protocol", "occlusion", "--occlusions", "drop"]
    done = maekit(*words, "--fractions", 0, 0.5, "--out", out, "--device", "cpu", "--json")
    assert done.code == 0 and "Warning" not in done.stderr, done.stderr
    assert [point[0] for point in done.json["curves"]["drop"]] == [0, 0.5]
    again = maekit(*words, "--fractions", 0, 0.5, "--out", out, "--device", "cpu", "--json")
    assert again.json == done.json and "nothing to do" in again.stderr


@pytest.mark.slow
def test_two_processes_find_the_same(score: Run, own: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    changes: dict[str, dict[str, Any]] = {
        "corruptions": {"kinds": ["glass_blur", "fog"], "severities": [3], "limit": 11},
        "occlusion": {"fractions": [0.5, 0.75]},
    }
    for protocol, settings in changes.items():
        alone = score(protocol=protocol, out=tmp_path / protocol, **settings)
        words = ["--protocol", protocol, "--data", own[1], "--all-images", "--workers", 0, "--device", "cpu"]
        for name, value in settings.items():
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
        out = tmp_path / f"{protocol}-two"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "maekit", "robustness"]
        done = subprocess.run(
            [*command, *map(str, [own[0], *words, "--out", out])], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(alone | {"out": str(out)}))
