import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maekit.errors import MaekitError
from maekit.report.grids import cell_size, data_uri, picture, png_bytes, reconstruction_grid, shown_channels, write_png


def test_small_pictures_are_enlarged_by_a_whole_factor_without_new_colours() -> None:
    pixels = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    grid = reconstruction_grid([[pixels]], ["original"])
    assert cell_size((28, 28), 1) == (112, 112)
    found = np.asarray(grid)[:, 16:128, 0]
    enlarged = pixels[0].numpy().repeat(4, 0).repeat(4, 1)
    assert any(np.array_equal(found[top : top + 112], enlarged) for top in range(len(found) - 111))


@pytest.mark.parametrize(
    ("size", "cells", "shown"),
    [((32, 32), 8, (128, 128)), ((224, 224), 8, (224, 224)), ((448, 224), 8, (256, 128)), ((1, 4000), 1, (1, 256))],
)
def test_cells_have_a_sensible_size(size: tuple[int, int], cells: int, shown: tuple[int, int]) -> None:
    assert cell_size(size, cells) == shown


def test_a_thousand_large_pictures_are_shown_smaller_and_stay_within_the_budget() -> None:
    width, height = cell_size((512, 512), 6000, 512)
    assert width * height * 6000 <= 24_000_000


def test_channels_other_than_one_and_three_show_the_first_ones_and_say_so() -> None:
    five = torch.stack([torch.full((4, 4), 0.2 * c) for c in range(5)])
    assert picture(five).getpixel((0, 0)) == (0, 51, 102)
    assert picture(five[:2]).getpixel((0, 0)) == (0, 0, 0)
    assert shown_channels(5) == "Shown: the first three of 5 channels." and "the first of 2" in shown_channels(2)
    assert shown_channels(1) == shown_channels(3) == ""


def test_floats_out_of_range_and_not_a_number_are_drawn_not_wrapped() -> None:
    image = picture(torch.tensor([[[-1.0, 2.0, float("nan"), 0.5]]]))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (255,) * 3, (0,) * 3, (128,) * 3]


def test_arrays_are_height_width_channels() -> None:
    array = np.zeros((2, 3, 3), np.uint8)
    array[1, 2] = (1, 2, 3)
    assert picture(array).size == (3, 2) and picture(array).getpixel((2, 1)) == (1, 2, 3)


def test_headers_labels_groups_and_notes_are_drawn_and_do_not_touch_the_pictures() -> None:
    cells = [[torch.zeros(3, 28, 28), torch.ones(3, 28, 28)]] * 2
    plain = reconstruction_grid(cells, ["", ""])
    rich = reconstruction_grid(
        cells,
        ["original", "prediction"],
        ["a\nvery/long_name-" * 9, "b"],
        groups=[("", 1), ("75 %", 1)],
        warn=[1],
        notes=["why " * 40],
    )
    assert rich.width > plain.width and rich.height > plain.height
    red = np.asarray(rich).astype(int)
    assert ((red[..., 0] - red[..., 1]) > 80).any(), "a warned header is red"
    assert (np.asarray(rich)[..., 0] == 0).sum() >= 2 * 112 * 112


def test_equal_pictures_give_equal_bytes_without_metadata() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    image.info = {"dpi": (72, 72), "icc_profile": b"secret", "Software": "x"}
    data = png_bytes(image)
    assert data == png_bytes(image.copy())
    chunks, at = [], 8
    while at < len(data):
        chunks.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big") + 12
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
    assert data_uri(image).startswith("data:image/png;base64,")


def test_a_picture_is_written_whole_and_a_bad_place_is_one_plain_error(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    write_png(tmp_path / "new" / "a.png", image)
    assert Image.open(io.BytesIO((tmp_path / "new" / "a.png").read_bytes())).getpixel((0, 0)) == (1, 2, 3)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]
    with pytest.raises(MaekitError, match="E-ENV-OUT"):
        write_png(tmp_path / "new" / "a.png" / "b.png", image)
