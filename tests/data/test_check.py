import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maekit.data.check import Report, check, survey
from maekit.data.image import read_image
from maekit.data.source import DatasetSource
from maekit.data.sources import open_source
from maekit.errors import MaekitError

RNG = np.random.default_rng(0)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photos(root: Path, count: int, bad: int = 0) -> Path:
    """Noise pictures of different sizes and formats, and files that are none."""
    for i in range(count):
        write(root / f"good{i:03d}.{('png', 'bmp', 'webp')[i % 3]}", RNG.integers(0, 256, (8 + i % 5, 9, 3), np.uint8))
    for i in range(bad):
        (root / f"bad{i:03d}.jpg").write_bytes(b"no picture")
    return root


def test_mean_and_std_are_those_of_all_pixels_of_all_images(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path, 20))
    pixels = np.concatenate([read_image(source.read(i)).flatten(1).numpy() / 255 for i in range(20)], 1)  # type: ignore[arg-type]
    report = survey(source)
    assert report.mean == pytest.approx(pixels.mean(1), abs=1e-9) and report.std == pytest.approx(
        pixels.std(1), abs=1e-9
    )
    assert report.channels == 3 and report.seen == 20 and not report.bad


def test_large_images_are_counted_in_blocks_to_the_same_sums(tmp_path: Path) -> None:
    large = RNG.integers(0, 256, (1500, 1501, 3), np.uint8)
    write(tmp_path / "a.bmp", large)
    report = survey(open_source(tmp_path))
    assert report.mean == pytest.approx(large.mean((0, 1)) / 255, abs=1e-12)
    assert report.std == pytest.approx(large.std((0, 1)) / 255, abs=1e-12)


def test_arrays_of_floats_are_measured_as_they_are(tmp_path: Path) -> None:
    arrays = [RNG.normal(3, 2, (8, 9, 5)).astype(np.float32) for _ in range(4)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    report, pixels = survey(open_source(tmp_path)), np.stack(arrays).reshape(-1, 5)
    assert report.channels == 5 and report.formats == {"npy": 4}
    assert report.mean == pytest.approx(pixels.mean(0), rel=1e-5) and report.std == pytest.approx(
        pixels.std(0), rel=1e-5
    )


def test_sizes_and_formats_are_counted(tmp_path: Path) -> None:
    report = survey(open_source(photos(tmp_path, 15)))
    assert report.sizes == {(8 + i, 9): 3 for i in range(5)}
    assert report.formats == {"PNG": 5, "BMP": 5, "WebP": 5}


def test_the_same_bytes_under_two_names_are_duplicates(tmp_path: Path) -> None:
    source = photos(tmp_path, 5)
    for copy in ("x/1.png", "x/2.jpg"):
        (tmp_path / copy).parent.mkdir(exist_ok=True)
        (tmp_path / copy).write_bytes((tmp_path / "good003.png").read_bytes())
    assert survey(open_source(source)).duplicates == [["good003.png", "x/1.png", "x/2.jpg"]]


def test_a_few_bad_images_are_named_in_the_log_and_put_up_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "maekit"):
        report = check(open_source(photos(tmp_path, 20, bad=5)))
    assert [name for name, _ in report.bad] == [f"bad00{i}.jpg" for i in range(5)] and report.seen == 25
    assert sum("skipped: cannot use bad00" in line for line in caplog.messages) == 5
    assert "5 of 25 images" in caplog.messages[-1]


def test_too_many_bad_images_stop_with_their_number_and_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MaekitError) as caught:
        check(open_source(photos(tmp_path, 20, bad=6)))
    assert caught.value.code == "E-DATA-BAD" and caught.value.exit_code == 3
    assert "6 of 26" in str(caught.value) and "bad000.jpg" in str(caught.value) and "maekit data" in str(caught.value)
    assert sum("bad00" in line for line in caplog.messages) == 5
    assert survey(open_source(tmp_path)).too_many_bad


def test_of_many_images_one_in_a_hundred_may_be_bad() -> None:
    assert Report(seen=10_000).max_bad == 100 and Report(seen=100).max_bad == 5


def test_a_set_of_which_nothing_is_left_stops(tmp_path: Path) -> None:
    with pytest.raises(MaekitError, match="3 of 3"):
        check(open_source(photos(tmp_path, 0, bad=3)))


def test_an_image_with_other_channels_than_the_rest_is_bad(tmp_path: Path) -> None:
    photos(tmp_path, 4)
    np.save(tmp_path / "z.npy", np.zeros((8, 8, 5), np.uint8))
    assert survey(open_source(tmp_path)).bad == [("z.npy", "5 channels, others have 3")]
    bad = survey(open_source(tmp_path), channels=5).bad
    assert len(bad) == 4 and all("cannot give 5 channels" in reason for _, reason in bad)


def test_only_as_many_as_the_limit_are_read_evenly_and_by_the_seed() -> None:
    class Counting(list[torch.Tensor]):
        seen: list[int]

        def __getitem__(self, i: int) -> torch.Tensor:  # type: ignore[override]
            self.seen.append(i)
            return super().__getitem__(i)

    images = Counting(torch.zeros(3, 4, 4, dtype=torch.uint8) for _ in range(1000))
    drawn = []
    for seed in (0, 0, 1):
        images.seen = []
        assert check(DatasetSource(images), limit=100, seed=seed).seen == 100
        drawn.append(sorted(images.seen))
    assert drawn[0] == drawn[1] != drawn[2]
    assert [i // 10 for i in drawn[0]] == list(range(100))


def test_of_more_than_ten_thousand_images_ten_thousand_are_read() -> None:
    """The figure of the fifth promise: what is read when nobody says how many."""
    images, seen = torch.zeros(10_001, 1, 2, 2, dtype=torch.uint8), []

    class Counting(Sequence[torch.Tensor]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: Any) -> Any:
            seen.append(i)
            return images[i]

    assert check(DatasetSource(Counting())).seen == 10_000
    assert len(set(seen)) == 10_000


def test_a_report_does_not_depend_on_the_run(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path, 60, bad=3))
    assert survey(source) == survey(source)


def test_decoded_datasets_are_surveyed_too() -> None:
    report = survey(DatasetSource([Image.new("RGB", (9, 8), "red")] * 3))
    assert report.formats == {"decoded": 3} and report.mean == (1, 0, 0) and report.std == (0, 0, 0)
    assert report.duplicates == [["0", "1", "2"]]


def test_images_of_several_frames_are_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    for name in ("a.gif", "b.gif"):
        out = io.BytesIO()
        frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
        (tmp_path / name).write_bytes(out.getvalue())
    assert check(open_source(tmp_path)).mean == (0, 0, 0)
    assert caplog.messages == ["2 images have several frames or pages; the first one is used"]
