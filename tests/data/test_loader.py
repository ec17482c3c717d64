"""Every sample is a function of (seed, epoch, index): nothing else may move a pixel or a mask."""

import json
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maekit.data.augment import EvalView, PretrainView
from maekit.data.loader import Batch, Loader, auto_workers
from maekit.data.sources import DatasetSource, Source, open_source
from maekit.errors import MaekitError
from maekit.model.masking import random_masking

COUNT, BATCH = 22, 8
STEPS = 5
"""Two epochs of two batches of 8 (6 of 22 images are dropped in each), and one more."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Labelled noise of different sizes, in two classes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = generator.integers(0, 256, (12 + i % 5, 14, 3), dtype=np.uint8)
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return open_source(root)


def loader(source: Any, **changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "batch_size": BATCH, "micro_batch": BATCH, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "seed": 7,
        "num_noise": 9, "drop_last": True,
    }  # fmt: skip
    settings |= changes
    return Loader(source, settings.pop("view", PretrainView((8, 8))), **settings)


def whole(steps: Iterator[Iterator[Batch]]) -> list[Batch]:
    """Join the micro-batches of each step."""
    return [join(list(parts)) for parts in steps]


def join(parts: list[Batch]) -> Batch:
    assert len({int(part["step"]) for part in parts}) == 1
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "step"}
    return {**whole, "step": parts[0]["step"]}


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def plain(source: Source) -> list[Batch]:
    return whole(loader(source).steps(0, STEPS))


@pytest.mark.parametrize("workers", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4))])
def test_the_number_of_workers_changes_nothing(source: Source, plain: list[Batch], workers: int) -> None:
    """F22."""
    torch.manual_seed(workers)
    random.seed(workers)
    assert same(whole(loader(source, workers=workers).steps(0, STEPS)), plain)


@pytest.mark.parametrize("start", range(1, STEPS))
def test_a_later_start_gives_the_tail(source: Source, plain: list[Batch], start: int) -> None:
    assert same(whole(loader(source).steps(start, STEPS)), plain[start:])


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_are_parts_of_the_same_batch(source: Source, plain: list[Batch], micro: int) -> None:
    steps = [list(parts) for parts in loader(source, micro_batch=micro).steps(0, STEPS)]
    assert [len(part["ids"]) for part in steps[0]] == [min(micro, BATCH - i) for i in range(0, BATCH, micro)]
    assert same([join(parts) for parts in steps], plain)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_same_global_batch(source: Source, plain: list[Batch], world: int) -> None:
    ranks = [whole(loader(source, rank=rank, world=world, micro_batch=3).steps(0, STEPS)) for rank in range(world)]
    assert same([join(list(parts)) for parts in zip(*ranks, strict=True)], plain)


def test_another_number_of_processes_from_any_step_on_changes_no_sample_and_no_mask(source: Source) -> None:
    """F18: 1 -> 2 -> 4 -> 2 -> 1 in the middle of epochs, each launch with a loader of its own."""
    plain = whole(loader(source, drop_last=False).steps(0, 12))
    found: list[Batch] = []
    for start, stop, world in ((0, 2, 1), (2, 4, 2), (4, 7, 4), (7, 10, 2), (10, 12, 1)):
        ranks = [
            whole(loader(source, drop_last=False, rank=rank, world=world, micro_batch=3).steps(start, stop))
            for rank in range(world)
        ]
        found += [join(list(parts)) for parts in zip(*ranks, strict=True)]
    assert same(found, plain)
    for epoch in range(4):
        assert sorted(torch.cat([batch["ids"] for batch in found[3 * epoch :][:3]]).tolist()) == list(range(COUNT))
    masks = [torch.cat([random_masking(rows, 4).mask for rows in batch["noise"].split(3)]) for batch in found]
    assert all(torch.equal(mask, random_masking(b["noise"], 4).mask) for mask, b in zip(masks, plain, strict=True))


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 3), (8, 1)])
def test_without_drop_last_an_epoch_ends_with_a_short_batch(source: Source, world: int, micro: int) -> None:
    """6 images of 22 are left for the third batch: with 8 processes two have none and pass one of weight 0."""
    seen, filled = [], 0
    for rank in range(world):
        subject = loader(source, rank=rank, world=world, micro_batch=micro, drop_last=False)
        assert subject.steps_per_epoch == 3
        for at, parts in enumerate(subject.steps(0, 6)):
            batch = join(list(parts))
            size, mine = subject.sizes(at)
            assert size == (6 if at % 3 == 2 else BATCH)
            assert len(batch["ids"]) == max(1, mine)
            seen += [(at // 3, i) for i in batch["ids"].tolist()] if mine else []
            filled += mine == 0
    assert sorted(seen) == [(epoch, i) for epoch in range(2) for i in range(COUNT)]
    assert filled == (2 * 2 if world == 8 else 0)


def test_a_micro_batch_is_made_when_it_is_asked_for(source: Source) -> None:
    subject = loader(source, micro_batch=2)
    parts = next(subject.steps(0, 1))
    next(parts)
    assert subject.bad.seen == 2


def test_samples_differ_by_seed_and_by_epoch(source: Source, plain: list[Batch]) -> None:
    other = whole(loader(source, seed=8).steps(0, STEPS))
    assert not torch.equal(other[0]["ids"], plain[0]["ids"])
    by_key = {
        (epoch, i): batch["noise"][at]
        for epoch, batch in enumerate(plain[::2])
        for at, i in enumerate(batch["ids"].tolist())
    }
    assert len({tuple(noise.tolist()) for noise in by_key.values()}) == len(by_key)


def test_noise_is_uniform_and_of_the_length_asked_for(plain: list[Batch]) -> None:
    noise = torch.cat([batch["noise"] for batch in plain])
    assert noise.shape == (STEPS * BATCH, 9) and noise.min() >= 0 and noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.06)


def test_an_epoch_is_a_permutation_whose_incomplete_batch_is_dropped(source: Source, plain: list[Batch]) -> None:
    subject = loader(source)
    assert subject.steps_per_epoch == 2
    for epoch in range(3):
        assert sorted(subject.order(epoch).tolist()) == list(range(COUNT))
    assert not torch.equal(subject.order(0), subject.order(1))
    seen = torch.cat([plain[0]["ids"], plain[1]["ids"]]).tolist()
    assert len(set(seen)) == 2 * BATCH and seen == subject.order(0)[: 2 * BATCH].tolist()
    assert plain[2]["ids"].tolist() == subject.order(1)[:BATCH].tolist()


def test_a_set_smaller_than_a_batch_is_one_short_batch_an_epoch(source: Source) -> None:
    subject = loader(source, batch_size=100, micro_batch=100)
    assert subject.steps_per_epoch == 1 and subject.batch_size == COUNT
    for batch in whole(subject.steps(0, 2)):
        assert sorted(batch["ids"].tolist()) == list(range(COUNT))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_sweep_covers_each_sample_once(source: Source, world: int, workers: int) -> None:
    view = EvalView((8, 8), 1.0)
    parts = [
        list(loader(source, view=view, rank=rank, world=world, micro_batch=4, workers=workers).sweep())
        for rank in range(world)
    ]
    ids = [i for part in parts for batch in part for i in batch["ids"].tolist()]
    assert sorted(ids) == list(range(COUNT))
    labels = [i for part in parts for batch in part for i in batch["labels"].tolist()]
    assert source.labels is not None and labels == [source.labels[i] for i in ids]
    assert [i for batch in parts[0] for i in batch["ids"].tolist()] == list(range(0, COUNT, world))


@pytest.mark.parametrize("world", [1, 2, 7])
def test_sweeps_of_parts_cover_each_part_once(source: Source, world: int) -> None:
    parts = [range(0, 10), range(10, 13), range(20, COUNT)]
    found: list[set[int]] = [set(), set(), set()]
    for rank in range(world):
        mine = loader(source, view=EvalView((8, 8), 1.0), rank=rank, world=world, micro_batch=4, workers=0)
        for part, batches in zip(found, mine.sweeps(parts), strict=True):
            ids = [i for batch in batches for i in batch["ids"].tolist()]
            assert ids and ids == sorted(ids)  # at least one, for the exchange with other processes
            part |= set(ids)
    assert found == [set(part) for part in parts]


def test_images_are_normalised_by_mean_and_std(source: Source) -> None:
    view = EvalView((8, 8), 1.0)
    (batch,) = loader(source, view=view, micro_batch=100).sweep()
    raw, *_ = loader(source, view=view, micro_batch=100, mean=(0.0,) * 3, std=(1.0,) * 3).sweep()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    pixels = (raw["images"] * 255).round()
    torch.testing.assert_close(batch["images"], (pixels / 255 - mean) / std, rtol=0, atol=1e-6)
    with Image.open(Path(source.root) / source.ids[0]) as image:  # type: ignore[attr-defined]
        shown = view(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(pixels[0], shown.float())


class Decoded:
    """A map-style data set of what it is given."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_pictures_and_float_arrays_in_one_batch_mean_the_same_values() -> None:
    byte = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    source = DatasetSource(Decoded([byte, byte.float() / 255]))
    (batch,) = loader(source, view=EvalView((8, 8), 1.0)).sweep()
    torch.testing.assert_close(batch["images"][0], batch["images"][1])
    assert batch["labels"].tolist() == [-1, -1]


class Broken:
    """Images of which some cannot be read."""

    labels = targets = None

    def __init__(self, count: int, bad: set[int]) -> None:
        self.ids, self.bad = [f"{i}.png" for i in range(count)], bad

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Tensor:
        if index in self.bad:
            raise MaekitError("E-DATA-IMAGE", f"cannot use {self.ids[index]}")
        return torch.full((3, 8, 8), index % 256, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_image_is_replaced_by_the_next_and_listed_once(tmp_path: Path, workers: int) -> None:
    log = tmp_path / "bad_files.jsonl"
    subject = loader(Broken(20, {4, 5, 19}), batch_size=20, micro_batch=5, workers=workers, bad_log=log)
    for batch in whole(subject.steps(0, 3)):
        assert sorted(batch["ids"].tolist()) == sorted([0, 0, 1, 2, 3, 6, 6, 6, *range(7, 19)])
    listed = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(entry["id"] for entry in listed) == ["19.png", "4.png", "5.png"]
    assert "cannot use 4.png" in {entry["id"]: entry["reason"] for entry in listed}["4.png"]


def test_a_run_that_goes_on_lists_an_unreadable_image_no_second_time(tmp_path: Path) -> None:
    log = tmp_path / "bad_files.jsonl"
    for _ in range(2):
        whole(loader(Broken(8, {3}), bad_log=log).steps(0, 2))
    assert len(log.read_text().splitlines()) == 1


def test_what_replaces_an_image_keeps_the_crop_and_mask_of_its_place() -> None:
    good, bad = (whole(loader(Broken(8, broken)).steps(0, 1))[0] for broken in (set(), {3}))
    assert torch.equal(good["noise"], bad["noise"])
    at = good["ids"].tolist().index(3)
    assert bad["ids"].tolist()[at] == 4 and bad["ids"].tolist()[:at] == good["ids"].tolist()[:at]


@pytest.mark.parametrize(
    ("count", "bad", "stops"), [(40, 5, False), (40, 6, True), (1000, 10, False), (1000, 11, True)]
)
def test_more_than_five_or_one_per_cent_of_bad_images_stop(count: int, bad: int, stops: bool) -> None:
    subject = loader(Broken(count, set(range(0, 2 * bad, 2))), batch_size=count, micro_batch=count, num_noise=0)
    if not stops:
        assert len(whole(subject.steps(0, 1))) == 1 and len(subject.bad.found) == bad
        return
    with pytest.raises(MaekitError, match=f"found {bad} of {count} seen, expected at most 5 or 1 %") as caught:
        whole(subject.steps(0, 1))
    assert caught.value.code == "E-DATA-BAD" and caught.value.exit_code == 3


def test_nothing_but_bad_images_is_an_error_that_names_the_first() -> None:
    with pytest.raises(MaekitError, match=r"cannot use \d\.png") as caught:
        whole(loader(Broken(8, set(range(8)))).steps(0, 1))
    assert caught.value.code == "E-DATA-BAD"


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_error_of_the_command() -> None:
    with pytest.raises(MaekitError) as caught:
        whole(loader(Broken(8, set(range(8))), workers=1).steps(0, 1))
    assert caught.value.code == "E-DATA-BAD"


def test_images_of_other_channels_count_as_unreadable() -> None:
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in range(8)]
    images[2] = torch.zeros(4, 8, 8, dtype=torch.uint8)
    subject = loader(DatasetSource(Decoded(images)))
    assert 2 not in whole(subject.steps(0, 1))[0]["ids"].tolist()
    assert "found 4 channels, expected 3" in subject.bad.found["2"]


def test_a_loader_without_workers_leaves_the_global_generators_seeded_by_the_last_sample(source: Source) -> None:
    """Documented: samples draw from the global generators; who trains in his own process seeds again afterwards."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        whole(loader(source).steps(0, 1))
        found.append(torch.rand(()))
    assert found[0] == found[1]


@pytest.mark.slow
def test_workers_leave_the_global_generators_of_the_main_process_alone(source: Source) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    whole(loader(source, workers=1).steps(0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


PROGRAM = """
from maekit.data.augment import PretrainView
from maekit.data.loader import Loader
from maekit.data.sources import open_source

if __name__ == "__main__":
    view, statistics = PretrainView((28, 28)), {"mean": (0.3,), "std": (0.3,)}
    loader = Loader(open_source("builtin:fashion"), view, batch_size=8, micro_batch=8, workers=2, **statistics)
    steps = loader.steps(0, 1000)
    print(len(next(next(steps))["ids"]))
"""


def test_a_program_that_leaves_an_iteration_half_done_ends(tmp_path: Path) -> None:
    """Workers ignore the SIGTERM with which multiprocessing ends them, and it then waits for them."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "8\n" and done.stderr == ""


@pytest.mark.slow
def test_workers_end_with_the_error_that_ended_the_iteration() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(MaekitError) as caught:
        whole(loader(Broken(8, set(range(8))), workers=1).steps(0, 1))
    assert caught.value.__traceback__ is not None  # which keeps the frames, and what they hold
    assert set(multiprocessing.active_children()) <= before


def test_small_sets_are_read_in_the_main_process() -> None:
    assert auto_workers(10_000, (28, 28)) == 0 < auto_workers(10_000, (224, 224)) <= 8
    assert auto_workers(50_000, (32, 32)) == 0 < auto_workers(50_000, (32, 32), beside_gpu=True)


def test_dct_scaling_changes_large_jpeg_a_little_and_nothing_else(source: Source, tmp_path: Path) -> None:
    plain, scaled = (whole(loader(source, dct_scaling=on).steps(0, 2)) for on in (False, True))
    assert same(plain, scaled)  # small, and no JPEG
    y, x = np.mgrid[0:320, 0:400]
    for i in range(BATCH):
        waves = [127 + 100 * np.sin(x / (20 + i)) * np.cos(y / (31 - i)) for _ in range(3)]
        Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(tmp_path / f"{i}.jpg", quality=95)
    view, large = PretrainView((8, 8), scale=(1.0, 1.0)), open_source(tmp_path)
    plain, scaled = (whole(loader(large, view=view, dct_scaling=on).steps(0, 2)) for on in (False, True))
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(a["noise"], b["noise"]) and not torch.equal(a["images"], b["images"])
        assert (a["images"] - b["images"]).abs().mean() < 0.1  # of a deviation of 1


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_resized_on_the_device_are_those_of_the_loader_whatever_the_workers(
    source: Source, channels: int
) -> None:
    """The same boxes, mirrors and masks; a level of difference in a value here and there."""
    std = (0.5,) * channels
    given = {"mean": std, "std": std, "micro_batch": 3, "drop_last": False}
    plain, here, workers = (
        whole(loader(source, view=PretrainView((8, 6), cut_only=cut), workers=count, **given).steps(0, STEPS))
        for cut, count in ((False, 0), (True, 0), (True, 2))
    )
    assert same(here, workers)
    for a, b in zip(plain, here, strict=True):
        assert {name: a[name].shape for name in a} == {name: b[name].shape for name in b}
        assert all(torch.equal(a[name], b[name]) for name in a if name != "images")
        levels = (a["images"] - b["images"]).abs() * 0.5 * 255
        assert levels.max() < 1.01 and levels.mean() < 0.02


def test_float_arrays_and_pictures_beside_one_another_are_resized_on_the_device_to_the_same_numbers() -> None:
    """Whoever shares a batch with whom, with several samples of each."""
    mixed = [torch.rand(3, 9 + i, 12) for i in range(8)]
    mixed[::2] = [(255 * image).to(torch.uint8) for image in mixed[::2]]
    found = [
        whole(
            loader(DatasetSource(mixed), view=PretrainView((8, 8), cut_only=cut), micro_batch=part, repeats=2).steps(
                0, 2
            )
        )
        for cut, part in ((False, 8), (True, 8), (True, 1))
    ]
    assert same(found[1], found[2])
    for plain, cut in zip(found[0], found[1], strict=True):
        arrays = plain["ids"] % 2 == 1
        assert 0 < arrays.sum() < len(arrays)
        assert torch.allclose(plain["images"][arrays], cut["images"][arrays], atol=1e-5)
        levels = (plain["images"] - cut["images"]).abs() * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) * 255
        assert levels.max() < 1.01


# ------------------------------------------------------------------------------------- several samples of an image


class Counted(DatasetSource):
    """Counts what is read."""

    def read(self, i: int) -> Tensor:
        self.dataset.reads.append(i)
        return super().read(i)


class Pictures(list[Tensor]):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        super().__init__(torch.randint(256, (3, 16, 18), generator=generator, dtype=torch.uint8) for _ in range(count))
        self.reads: list[int] = []


def test_an_epoch_of_repeats_reads_every_image_once_and_makes_so_many_samples_of_it() -> None:
    pictures = Pictures(10)
    found = loader(Counted(pictures), repeats=4, drop_last=False)
    assert found.steps_per_epoch == 5 and [found.sizes(step) for step in range(5)] == [(8, 8)] * 5
    batches = whole(found.steps(0, 5))
    for batch in batches:  # all samples of an image in one batch
        assert sorted(batch["ids"].unique(return_counts=True)[1].tolist()) == [4, 4]
    assert sorted(pictures.reads) == list(range(10))
    samples, noise = (torch.cat([batch[name] for batch in batches]) for name in ("images", "noise"))
    assert len({each.numpy().tobytes() for each in samples}) == len(noise.unique(dim=0)) == 40
    # the first sample of each image is the one that it has without repeats
    once = join(
        [{**batch, "step": torch.tensor(0)} for batch in whole(loader(Counted(pictures), drop_last=False).steps(0, 2))]
    )
    for image, label_noise, index in zip(once["images"], once["noise"], once["ids"], strict=True):
        ids = torch.cat([batch["ids"] for batch in batches])
        mine = (ids == index).nonzero().flatten()
        assert torch.equal(samples[mine[0]], image) and torch.equal(noise[mine[0]], label_noise)


@pytest.mark.parametrize("cut", [1, 3, 4, 8])
def test_repeats_are_the_same_however_they_are_cut_and_shared_out_and_wherever_one_begins(
    source: Source, cut: int
) -> None:
    reference = whole(loader(source, repeats=2).steps(0, 12))
    assert len(reference) == 12 and loader(source, repeats=2).steps_per_epoch == 5
    assert same(whole(loader(source, repeats=2, micro_batch=cut).steps(0, 12)), reference)
    assert same(whole(loader(source, repeats=2, micro_batch=cut).steps(7, 12)), reference[7:])
    shares = [whole(loader(source, repeats=2, micro_batch=cut, rank=r, world=2).steps(0, 12)) for r in range(2)]
    joined = [join([{**part, "step": pair[0]["step"]} for part in pair]) for pair in zip(*shares, strict=True)]
    assert same(joined, reference)


def test_repeats_are_the_same_with_workers_and_around_an_image_that_cannot_be_read(
    source: Source, tmp_path: Path
) -> None:
    broken = source.subset(range(COUNT))
    assert isinstance(broken.keys[3], str)
    root = tmp_path / "images"
    for i in range(COUNT):
        place = root / broken.ids[i]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"" if i == 3 else bytes(source.read(i)))  # type: ignore[arg-type]
    broken = open_source(root)
    here = whole(loader(broken, repeats=2, micro_batch=3).steps(0, 6))
    assert same(whole(loader(broken, repeats=2, micro_batch=3, workers=2).steps(0, 6)), here)
    ids = torch.cat([batch["ids"] for batch in here[:5]])
    assert (ids == 3).sum() == 0 and (ids == 4).sum() in (2, 4)  # the next one stands in for both
