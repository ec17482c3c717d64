"""What a user counts on is on the disk before it has its name, and its name before anything else is done (F9)."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maekit.data.packing import write_verified
from maekit.errors import MaekitError
from maekit.interchange.targets import save_target
from maekit.interchange.write import staged
from maekit.report.files import whole, write_whole


def in_pieces(path: Path) -> None:
    with whole(path) as place:
        place.write_bytes(b"x")


def a_file(path: Path) -> None:
    with staged(path) as place:
        place.write_bytes(b"x")


def a_folder(path: Path) -> None:
    with staged(path) as place:
        place.mkdir()
        (place / "config.json").write_text("{}")
        (place / "model").write_bytes(b"x")


def components(path: Path) -> None:
    save_target(path, torch.nn.Linear(1, 1), {}, "pca", mean=(0.5,), std=(0.5,), fingerprint="")


WRITERS: dict[str, Callable[[Path], object]] = {
    "write_whole": lambda path: write_whole(path, b"x"),
    "whole": in_pieces,
    "write_verified": lambda path: write_verified(path, b"x"),
    "staged file": a_file,
    "staged folder": a_folder,
    "save_target": components,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_synced_before_it_has_its_name_and_the_folder_after(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append(("named", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    path = tmp_path / "what"
    WRITERS[name](path)
    at = done.index(("named", path))
    before = {one.name for what, one in done[:at] if what == "sync"}
    assert any(one.startswith(".tmp-") for one in before)
    assert not path.is_dir() or before >= {"config.json", "model"}
    assert done[at + 1 :] == [("sync", tmp_path)] and [one.name for one in tmp_path.iterdir()] == ["what"]


def test_a_file_system_that_cannot_sync_is_put_up_with_and_a_disk_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> Callable[[int], None]:
        def fail(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    write_whole(tmp_path / "config.yaml", b"old")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(MaekitError, match=r"E-ENV-OUT.*Input/output error"):
        write_whole(tmp_path / "config.yaml", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    write_whole(tmp_path / "config.yaml", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]
