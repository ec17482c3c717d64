"""Masks that users bring: every form gives the right scores to the right image, and what does not fit is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maekit.data.augment import EvalView
from maekit.data.loader import Loader
from maekit.data.masks import open_masks
from maekit.data.sources import Source, open_source
from maekit.errors import MaekitError

GRID = (2, 3)
COUNT = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Five images in two folders, of 12 x 18 pixels."""
    root = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (12, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i}.png")
    return open_source(root)


def write(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)
    return path


VALUES = np.arange(COUNT * 6).reshape(COUNT, 6) % 11


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float16, np.float64])
@pytest.mark.parametrize("flat", [True, False])
def test_an_array_is_for_all_images_or_for_each(source: Source, tmp_path: Path, kind: type, flat: bool) -> None:
    for values, each in ((VALUES, True), (VALUES[3], False)):
        shaped = values.astype(kind) if flat else values.astype(kind).reshape(*values.shape[:-1], *GRID)
        masks = open_masks(write(tmp_path / "masks.npy", shaped), source, GRID)
        assert masks.per_image is each
        for index in (0, 4):
            scores = masks.scores(index)
            expected = torch.tensor((values[index] if each else values).astype(kind).astype(np.float32))
            assert scores.dtype == torch.float32 and torch.equal(scores, expected)


def test_what_goes_to_a_loader_worker_is_the_path_and_not_the_array(source: Source, tmp_path: Path) -> None:
    masks = open_masks(write(tmp_path / "masks.npy", VALUES.astype(float)), source, GRID)
    assert len(pickle.dumps(masks)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(masks)).scores(2), masks.scores(2))


def test_pictures_are_averaged_over_the_area_of_a_patch_and_brighter_is_higher(source: Source, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 256, (12, 18), dtype=np.uint8) for _ in range(COUNT)]
    for name, grey in zip(source.ids, pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grey).save(tmp_path / name)
    masks = open_masks(tmp_path, source, GRID)
    assert masks.per_image
    for index, grey in enumerate(pixels):
        by_hand = grey.reshape(2, 6, 3, 6).mean((1, 3)).flatten() / 255
        np.testing.assert_allclose(masks.scores(index).numpy(), by_hand, rtol=1e-5)


def test_a_picture_of_another_aspect_is_cut_in_the_middle_as_the_image_is(source: Source, tmp_path: Path) -> None:
    square = np.zeros((18, 18), dtype=np.uint8)
    square[3:9, :6] = 255  # rows 3 to 15 are seen
    square[:3] = square[15:] = 100
    for name in source.ids:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(square).save(tmp_path / name)
    assert open_masks(tmp_path, source, GRID).scores(0).tolist() == [1, 0, 0, 0, 0, 0]


def test_a_folder_may_hold_arrays_of_the_grid_or_larger(source: Source, tmp_path: Path) -> None:
    shapes = [(6,), (2, 3), (4, 6), (2, 3), (12, 18)]
    for name, shape in zip(source.ids, shapes, strict=True):
        write((tmp_path / name).with_suffix(".npy"), np.full(shape, -3.5))
    masks = open_masks(tmp_path, source, GRID)
    assert all(masks.scores(i).tolist() == [-3.5] * 6 for i in range(COUNT))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loader_gives_each_sample_its_scores_and_the_batch_its_step(
    source: Source, tmp_path: Path, workers: int
) -> None:
    masks = open_masks(write(tmp_path / "masks.npy", VALUES.astype(float)), source, GRID)
    loader = Loader(
        source, EvalView((12, 18), 1.0), batch_size=3, micro_batch=2, mean=(0.5,) * 3, std=(0.5,) * 3, num_noise=6,
        workers=workers, masks=masks,
    )  # fmt: skip
    for step, parts in enumerate(loader.steps(2, 5), 2):
        for batch in parts:
            assert torch.equal(batch["scores"].double(), torch.from_numpy(VALUES[batch["ids"].numpy()]).double())
            assert batch["step"].shape == () and batch["step"].dtype == torch.int64 and int(batch["step"]) == step
    assert "step" not in next(loader.sweep())


def test_an_image_whose_mask_cannot_be_read_is_left_out(source: Source, tmp_path: Path) -> None:
    for name in source.ids:
        write((tmp_path / name).with_suffix(".npy"), np.zeros(6))
    (tmp_path / source.ids[1]).with_suffix(".npy").write_bytes(b"nothing")
    loader = Loader(
        source, EvalView((12, 18), 1.0), batch_size=5, micro_batch=5, mean=(0.5,) * 3, std=(0.5,) * 3,
        masks=open_masks(tmp_path, source, GRID),
    )  # fmt: skip
    (batch,) = next(loader.steps(0, 1))
    assert 1 not in batch["ids"].tolist()
    assert "cannot read mask" in loader.bad.found[source.ids[1]]


def refused(path: Path, source: Source, said: str) -> None:
    with pytest.raises(MaekitError, match=said) as caught:
        open_masks(path, source, GRID).scores(0)
    assert caught.value.code == "E-DATA-MASK"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((3, 2)), r"shape \(3, 2\), expected \(6,\) or \(2, 3\) for all images, \(5, 6\) or \(5, 2, 3\)"),
        (np.zeros((4, 6)), r"shape \(4, 6\)"),
        (np.zeros((0, 6)), "cannot read|shape"),
        (np.zeros(()), r"shape \(\)"),
        (np.where(np.arange(30).reshape(5, 6) == 14, np.nan, 0.0), r"found nan at \[2, 2\], expected finite"),
        (np.array([0, 0, 0, np.inf, 0, 0]), r"found inf at \[3\]"),
        (np.full(6, 1e300), "expected finite"),
        (np.zeros(6, dtype=complex), "found type complex128"),
        (np.array(["a"] * 6), "found type <U1"),
    ],
    ids=["turned", "too few", "empty", "a number", "nan", "infinite", "beyond 32 bits", "complex", "text"],
)
def test_an_array_that_does_not_fit_is_refused(source: Source, tmp_path: Path, values: np.ndarray, said: str) -> None:
    refused(write(tmp_path / "masks.npy", values), source, said)


def test_a_pickle_is_never_loaded(source: Source, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("a pickle was loaded",))

    np.save(tmp_path / "masks.npy", np.array([Bomb()] * 6, dtype=object), allow_pickle=True)
    refused(tmp_path / "masks.npy", source, "Python objects")
    for name in source.ids:
        target = (tmp_path / "folder" / name).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / "masks.npy").read_bytes())
    refused(tmp_path / "folder", source, "cannot read mask")


def test_what_is_no_array_and_no_folder_of_masks_is_refused(source: Source, tmp_path: Path) -> None:
    refused(tmp_path / "none", source, "no such file or folder")
    (tmp_path / "text.npy").write_text("hello")
    refused(tmp_path / "text.npy", source, "cannot read")
    whole = write(tmp_path / "cut.npy", np.zeros((5, 6))).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-8])
    refused(tmp_path / "cut.npy", source, "cannot read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", source, "no .png and no .npy file")


def test_missing_masks_are_counted_and_the_first_five_named(source: Source, tmp_path: Path) -> None:
    write((tmp_path / source.ids[2]).with_suffix(".npy"), np.zeros(6))
    refused(tmp_path, source, "none for 4 of 5 images: a/0.png, a/2.png, b/1.png, b/3.png, expected one for each")
    many = source.subset([0, 1, 3, 4] * 3)
    refused(tmp_path, many, "none for 12 of 12 images: a/0.png, a/2.png, b/1.png, b/3.png, a/0.png, ...")


@pytest.mark.parametrize("name", ["nan.npy", "volume.npy", "text.png"])
def test_a_bad_file_in_a_folder_is_refused(source: Source, tmp_path: Path, name: str) -> None:
    for one in source.ids:
        target = (tmp_path / one).with_suffix(Path(name).suffix)
        target.parent.mkdir(exist_ok=True)
        if name == "text.png":
            target.write_text("hello")
        else:
            np.save(target, np.full((2, 3), np.nan) if name == "nan.npy" else np.zeros((2, 3, 2)))
    refused(tmp_path, source, "mask")
