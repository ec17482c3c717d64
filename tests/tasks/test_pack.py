"""``maekit pack``: the same images under the same names, whatever stops it; training sees no difference."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maekit as package
from maekit import failpoints
from maekit.data.image import read_image
from maekit.data.pixels import PixelSource
from maekit.data.source import Source
from maekit.data.sources import Form, label_subset, open_source
from maekit.errors import MaekitError
from maekit.tasks import pack as verb

Run = Callable[..., Any]
RAW: dict[str, Any] = {"format": "raw", "channels": 1}
PNG: dict[str, Any] = {"format": "png", "channels": 1, "recompress": True}


@pytest.fixture
def pack(tmp_path: Path) -> Run:
    """``pack(DATA, ...)`` -> metrics; the folder is ``tmp_path / "packed"`` unless said."""

    def run(data: Path | str, **changes: Any) -> dict[str, Any]:
        return dict(package.pack({"data": str(data), "out": tmp_path / "packed", "workers": 2, **changes}).metrics)

    return run


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    yield failpoints.arm
    failpoints.arm("")


def pixels(source: Source, channels: int = 1) -> list[torch.Tensor]:
    found = [source.read(i) for i in range(len(source))]
    return [one if isinstance(one, torch.Tensor) else read_image(one, channels=channels) for one in found]


def files(folder: Path) -> dict[str, bytes]:
    """Return all but what a clock decides."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "pack.json"}


# ------------------------------------------------------------------------------------------------ the same images


@pytest.mark.parametrize("way", [RAW, PNG, {}], ids=["raw", "png", "as they are"])
def test_every_part_subset_and_hold_out_is_that_of_the_source(
    pack: Run, classes: Path, way: Any, tmp_path: Path
) -> None:
    found = pack(classes, shard_images=100, **way)
    assert found["images"] == 340 and found["parts"] == {"train": 240, "val": 100} and found["files"] == 4
    assert found["psnr"] is None and found["skipped"] == 0 and found["kept"] == (0 if way else 340)
    for split in (None, "train", "val", "train-or-all", "val-or-all"):
        one, other = (open_source(place, split) for place in (classes, tmp_path / "packed"))  # type: ignore[arg-type]
        assert (other.ids, other.labels, other.classes) == (one.ids, one.labels, one.classes), split
        assert all(map(torch.equal, pixels(one), pixels(other)))
        assert isinstance(other, PixelSource) == (way is RAW)
        for spec in ("3/class", "10%", "57"):
            assert label_subset(other, spec, 5) == label_subset(one, spec, 5)
    # a whole without parts: a fifth is held out by a hash of the ids
    pack(classes / "train", out=tmp_path / "whole", **way)
    for split in ("train", "val"):
        one, other = open_source(classes / "train", split), open_source(tmp_path / "whole", split)
        assert (other.ids, other.labels, other.classes) == (one.ids, one.labels, one.classes) and len(one) < 240


@pytest.mark.parametrize("way", [RAW, PNG], ids=["raw", "png"])
def test_pre_training_sees_the_same_samples_and_masks(
    pack: Run, flat: Path, tiny: dict[str, Any], result: dict[str, Any], way: Any, tmp_path: Path
) -> None:
    pack(flat, shard_images=16, **way)
    again = package.pretrain({**tiny, "data": str(tmp_path / "packed"), "out": tmp_path / "run"})
    assert again.metrics["state_sha256"] == result["state_sha256"]


def test_resized_it_says_size_and_quality(pack: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "maekit")
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i, side in enumerate((40, 80, 120)):
        values = np.kron(rng.integers(0, 256, (side // 8, side // 10, 3)), np.ones((8, 10, 1))).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / f"data/{i}.png")
    found = pack(tmp_path / "data", short_side=64)
    source = open_source(tmp_path / "packed")
    assert source.ids == ["0.png", "1.png", "2.png"]
    assert [tuple(image.shape[1:]) for image in pixels(source, 3)] == [(40, 40), (64, 64), (64, 64)]
    assert source.read(0) == (tmp_path / "data/0.png").read_bytes() and found["kept"] == 1
    assert found["bytes_before"] == sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    assert found["bytes_after"] == sum(len(source.read(i)) for i in range(3))  # type: ignore[arg-type]
    assert 20 < found["psnr"] < 60 and found["images_per_second"] > 0 and "free" in caplog.text
    told = json.loads((tmp_path / "packed/pack.json").read_text())
    assert told["result"]["psnr"] == found["psnr"] and list(told["files"]) == ["images-00000-of-00001.parquet"]


def test_tags_and_numbers_are_kept(pack: Run, flat: Path, tmp_path: Path) -> None:
    shutil.copytree(flat, tmp_path / "data")
    lines = [f"{i:02d}.png,{'b|a' if i % 3 else ''},{i / 7},{i}" for i in range(40)]
    (tmp_path / "data/list.csv").write_text("\n".join(["path,label,x,y", *lines]))
    for task, column in (("multilabel", None), ("regression", "x,y"), ("regression", "y")):
        out = tmp_path / f"{task}-{column}"
        pack(tmp_path / "data/list.csv", task=task, label_column=column, out=out)
        one, other = (
            open_source(place, "train", label_column=column, form=Form(task))  # type: ignore[arg-type]
            for place in (tmp_path / "data/list.csv", out)
        )
        assert one.targets is not None and other.targets is not None and other.ids == one.ids
        assert other.targets.names == one.targets.names
        assert np.array_equal(other.targets.values, one.targets.values)


# ------------------------------------------------------------------------------------------------------- stopped


FAULTS = ["pack-shard:kill@3"] + [
    pytest.param(fault, marks=pytest.mark.slow)
    for fault in ("pack-write:kill@2", "pack-read-back:kill@4", "pack-finish:kill", "pack-shard:int@2")
]


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(maekit: Run, flat: Path, tmp_path: Path, fault: str) -> None:
    words = ["pack", flat, "--short-side", 20, "--shard-images", 8, "--workers", 2, "--out"]
    done = maekit(*words, tmp_path / "packed", environment={failpoints.VARIABLE: fault})
    assert done.code == (75 if "int" in fault else -9), done.stderr
    with pytest.raises(MaekitError, match="E-DATA-PATH"):  # whole, or not there
        open_source(tmp_path / "packed")
    done = maekit(*words, tmp_path / "packed")
    assert done.code == 0 and ("going on after" in done.stderr or "finish" in fault), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert maekit(*words, tmp_path / "whole", "--workers", 1).code == 0
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


def test_a_full_disk_stops_it_and_a_damaged_shard_is_packed_anew(
    pack: Run, flat: Path, tmp_path: Path, arm: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "maekit")
    pack(flat, shard_images=16, out=tmp_path / "whole")
    arm("pack-write:enospc")
    with pytest.raises(MaekitError, match=r"E-ENV-OUT.*No space"):
        pack(flat, shard_images=16)
    assert not (tmp_path / ".packed.parts").exists()  # nothing was written: nothing is left
    arm("pack-write:enospc@3")
    with pytest.raises(MaekitError, match=r"E-STOP-DISK.*same command goes on"):
        pack(flat, shard_images=16)
    shard = tmp_path / ".packed.parts/images-00001-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-9] + b"123456789")
    pack(flat, shard_images=16)
    assert "packed anew" in caplog.text and "going on after 16 of 40" in caplog.text
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


def test_what_does_not_fit_on_the_disk_is_not_begun(
    pack: Run, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(MaekitError, match=r"E-ENV-DISK.*5 kB free.*kB"):
        pack(flat)
    assert not list(tmp_path.iterdir())


def test_done_already(pack: Run, flat: Path, tmp_path: Path) -> None:
    first = pack(flat, shard_images=16)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    assert pack(flat, shard_images=16) == first
    again = package.pack({"data": str(tmp_path / "packed"), "out": tmp_path / "more"})
    assert "nothing to do" in again.text and not (tmp_path / "more").exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()} == before


# ------------------------------------------------------------------------------------------------------- refused


def test_other_settings_and_other_images_are_refused(pack: Run, flat: Path, tmp_path: Path, arm: Run) -> None:
    shutil.copytree(flat, tmp_path / "data")
    arm("pack-write:eio@3")
    with pytest.raises(MaekitError, match="E-ENV-OUT"):
        pack(tmp_path / "data", shard_images=16)
    for place in (".packed.parts", "packed"):  # unfinished, finished
        for changes, found in (({"quality": 80}, "quality 90 -> 80"), ({"shard_images": 8}, "shard_images 16 -> 8")):
            with pytest.raises(MaekitError, match=rf"E-CONFIG-RUN.*{place}.*{found}"):
                pack(tmp_path / "data", **{"shard_images": 16, **changes})
        shutil.copy(flat / "00.png", tmp_path / "data/new.png")
        with pytest.raises(MaekitError, match=r"E-CONFIG-RUN.*other images"):
            pack(tmp_path / "data", shard_images=16)
        (tmp_path / "data/new.png").unlink()
        pack(tmp_path / "data", shard_images=16)
    (tmp_path / "data/00.png").touch()  # packed already: what a file's clock says is nothing
    pack(tmp_path / "data", shard_images=16)
    with pytest.raises(MaekitError, match=r"E-CONFIG-OUT.*files that are no packed data"):
        pack(flat, out=tmp_path / "data")
    with pytest.raises(MaekitError, match=r"E-CONFIG-OUT.*a file"):
        pack(flat, out=tmp_path / "data/00.png")


@pytest.mark.parametrize(
    "said", ["", "{", "[]", "3", '{"about": 3}', '{"about": {"way": []}}', '{"about": {"way": {}}}']
)
def test_a_pack_json_that_is_none_is_no_packed_set(pack: Run, flat: Path, tmp_path: Path, said: str) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/pack.json").write_text(said)
    with pytest.raises(MaekitError, match=r"E-CONFIG-OUT.*files that are no packed data"):
        pack(flat)
    (tmp_path / "packed").rename(tmp_path / ".packed.parts")
    assert pack(flat)["images"] == 40


def test_unreadable_images_are_skipped_and_listed_or_stop(
    pack: Run, flat: Path, tmp_path: Path, arm: Run, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(flat, tmp_path / "data")
    for i in (3, 30):
        (tmp_path / f"data/{i:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(MaekitError, match=r"E-DATA-BAD.*03\.png"):
        pack(tmp_path / "data", bad_images="stop")
    assert not (tmp_path / ".packed.parts").exists()
    arm("pack-shard:eio@3")
    with pytest.raises(MaekitError, match="E-ENV-OUT"):
        pack(tmp_path / "data", shard_images=16)
    found = pack(tmp_path / "data", shard_images=16)  # the one found before the stop is counted, too
    assert found["images"] == 38 and found["skipped"] == 2
    listed = [json.loads(line)["id"] for line in (tmp_path / "packed/bad_files.jsonl").read_text().splitlines()]
    assert listed == ["03.png", "30.png"]
    assert open_source(tmp_path / "packed").ids == [f"{i:02d}.png" for i in range(40) if i not in (3, 30)]
    for i in range(6):
        (tmp_path / f"data/{i:02d}.png").write_bytes(b"")
    with pytest.raises(MaekitError, match=r"E-DATA-BAD.*at most 5 or 1 %"):
        pack(tmp_path / "data", out=tmp_path / "other")


def test_raw_images_have_one_size(pack: Run, flat: Path, tmp_path: Path) -> None:
    shutil.copytree(flat, tmp_path / "data")
    Image.open(flat / "00.png").resize((30, 40)).save(tmp_path / "data/20.png")
    with pytest.raises(MaekitError, match=r"E-CONFIG-SIZE.*20\.png.*found 40 x 30 x 1, expected 28 x 28 x 1"):
        pack(tmp_path / "data", **RAW)
    found = pack(tmp_path / "data", **RAW, square=True, short_side=24)
    assert found["images"] == 40 and np.load(tmp_path / "packed/images-00000-of-00001.npy").shape == (40, 24, 24, 1)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"data": None}, "E-USAGE-DATA"),
        ({"out": None}, "E-USAGE-OUT"),
        ({"data": "nowhere"}, "E-DATA-PATH"),
        ({"format": "png", "quality": 80}, "E-CONFIG-IDLE"),
        ({"format": "raw", "recompress": True}, "E-CONFIG-IDLE"),
        ({"format": "gif"}, "E-CONFIG-VALUE"),
        ({"short_side": 3}, "E-CONFIG-VALUE"),
        ({"label_column": "x"}, "E-DATA-COLUMN"),
    ],
)
def test_wrong_settings_are_refused_and_leave_nothing(flat: Path, tmp_path: Path, changes: Any, code: str) -> None:
    with pytest.raises(MaekitError, match=code):
        package.pack({"data": str(flat), "out": tmp_path / "packed", **changes})
    assert not list(tmp_path.iterdir())


def test_out_is_not_among_the_images(pack: Run, classes: Path) -> None:
    with pytest.raises(MaekitError, match=r"E-CONFIG-OUT.*a place in --data"):
        pack(classes, out=classes / "packed")
    with pytest.raises(MaekitError, match=r"E-CONFIG-OUT.*no packed data"):
        pack(classes, out="..")


def test_the_space_that_is_asked_for_is_about_what_is_taken(pack: Run, tmp_path: Path) -> None:
    source = open_source("builtin:fashion", "val")
    chosen = source.subset(range(300))
    job = verb.Job(verb.Way("jpeg", 90, 20, False, None, False), {"images": chosen}, {})
    _, each = verb._looked_at(job)
    (tmp_path / "data").mkdir()
    for i in range(300):
        (tmp_path / f"data/{i}.webp").write_bytes(bytes(chosen.read(i)))  # type: ignore[arg-type]
    pack(tmp_path / "data", short_side=20)
    size = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.parquet"))
    assert 300 * (each + 40) == pytest.approx(size, rel=0.15)
