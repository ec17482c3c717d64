"""What is no weights is refused in one line, what claims more than it has is refused quickly, and nothing ever runs."""

import argparse
import builtins
import io
import json
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from maekit import config
from maekit.errors import MaekitError
from maekit.interchange.files import File, read_file
from maekit.interchange.names import DETECTRON2, OFFICIAL, TIMM, TORCHVISION, TRANSFORMERS, Layout, theirs
from maekit.interchange.reading import Hints
from maekit.interchange.weights import load_model
from maekit.model.mae import MaskedAutoencoder, create_model

SOME: dict[str, Tensor] = {"a.weight": torch.arange(16.0).view(4, 4), "b": torch.tensor([1.0, 2.0, 3.0]).half()}
HINTS = Hints(num_heads=3, decoder_heads=2, target="pixel")


def tiny() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(
        "vit_base_patch16_224", img_size=(16, 16), patch_size=8, embed_dim=24, depth=2, num_heads=3,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip


def saved(value: object, *, old: bool = False, **more: Any) -> bytes:
    """Return what torch.save writes, in today's format or the one before."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not old, **more)
    return stream.getvalue()


def refusal(path: Path, content: bytes | None = None, read: Callable[[Path], object] = read_file) -> MaekitError:
    """Return the refusal of a file: one line, exit code 4."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MaekitError) as caught:
        read(path)
    error = caught.value
    assert error.code.startswith("E-CKPT-")
    assert error.exit_code == 4
    assert "\n" not in str(error)
    return error


def assert_read(file: File, expected: dict[str, Tensor]) -> None:
    assert file.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert file.tensors[name].dtype == value.dtype
        assert torch.equal(file.tensors[name], value)


# --- what is read


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_an_official_file_is_read_with_its_namespace_and_what_stood_beside(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "checkpoint-799.pth"
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    args = argparse.Namespace(norm_pix_loss=True, lr=1e-3, betas=(0.9, 0.95), data_path="/images", dist_url=None)
    content = {"model": SOME, "optimizer": optimizer.state_dict(), "epoch": 799, "scaler": {"scale": 1.0}, "args": args}
    path.write_bytes(saved(content, old=old))
    file = read_file(path)
    assert_read(file, SOME)
    assert file.container == "torch"
    assert file.facts["epoch"] == 799
    assert file.facts["args"] == {"norm_pix_loss": True, "lr": 1e-3, "data_path": "/images"}
    assert sorted(file.beside) == ["optimizer", "scaler"]


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module", "net"])
def test_weights_are_found_under_the_key_of_each_training_framework(tmp_path: Path, key: str) -> None:
    path = tmp_path / "last.ckpt"
    content = {key: SOME, "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2.5", "callbacks": {}}
    path.write_bytes(saved(content))
    file = read_file(path)
    assert_read(file, SOME)
    assert sorted(file.beside) == ["callbacks", "hyper_parameters"]
    said = {} if key in ("model", "state_dict") else {"weights under": key}
    assert file.facts == {"pytorch-lightning_version": "2.5"} | said


def test_a_lightning_file_of_an_official_model_loads_as_the_model_it_holds(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "last.ckpt"
    path.write_bytes(saved({"state_dict": {f"model.{n}": t for n, t in named(model, OFFICIAL).items()}, "epoch": 3}))
    again = load_model(path, hints=HINTS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_parameters_come_back_as_tensors_without_gradient(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(saved({"model": {"w": nn.Parameter(torch.ones(3))}}))
    value = read_file(path).tensors["w"]
    assert not value.requires_grad
    assert type(value) is Tensor


def test_tied_weights_are_read(tmp_path: Path) -> None:
    path, value = tmp_path / "m.pth", torch.randn(300, 300)
    path.write_bytes(saved({"one": value, "other": value}))
    assert_read(read_file(path), {"one": value, "other": value})


def test_bare_tensors_and_a_safetensors_file_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(saved(SOME))
    assert_read(read_file(path), SOME)
    path.write_bytes(safetensors.torch.save(SOME, {"who": "me"}))
    assert_read(read_file(path), SOME)
    assert read_file(path).metadata == {"who": "me"}


@pytest.mark.parametrize("length", [123, 123 + 256])
def test_a_safetensors_file_whose_length_begins_like_json_is_read(tmp_path: Path, length: int) -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    (tmp_path / "m.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(8))
    assert_read(read_file(tmp_path / "m.safetensors"), {"w": torch.zeros(2)})


# --- what is no weights

OTHER = {
    "empty file": b"",
    "web page": b"\n <!DOCTYPE html>\n<html><title>404</title>",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 343\n",
    "JSON": b'{"model_type": "vit_mae"}',
    "GGUF": b"GGUF\x03\0\0\0" + bytes(64),
    "ELF": b"\x7fELF\x02\x01\x01" + bytes(64),
    "gzip": b"\x1f\x8b\x08" + bytes(64),
    "zeros": bytes(4096),
    "no weights": random.Random(0).randbytes(4096),
    "no weights ": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(64),
    "no weights  ": b"Access denied\n",
}


@pytest.mark.parametrize("words", OTHER)
@pytest.mark.parametrize("name", ["model.safetensors", "mae_pretrain_vit_base.pth"])
def test_a_file_of_something_else_is_called_what_it_is(tmp_path: Path, words: str, name: str) -> None:
    error = refusal(tmp_path / name, OTHER[words])
    assert error.code == "E-CKPT-FORMAT"
    assert words.strip() in str(error)


def test_json_that_looks_like_a_safetensors_header_is_still_json(tmp_path: Path) -> None:
    assert "JSON" in str(refusal(tmp_path / "m.safetensors", b'{"abcd":{"x":1}}'))


@pytest.mark.parametrize(
    "content",
    [saved({"model": SOME}), saved({"model": SOME}, old=True), safetensors.torch.save(SOME)],
    ids=["zip", "old format", "safetensors"],
)
def test_a_file_cut_off_anywhere_is_no_weights(tmp_path: Path, content: bytes) -> None:
    for size in range(0, len(content), max(1, len(content) // 150)):
        assert refusal(tmp_path / "m.pth", content[:size]).code == "E-CKPT-FORMAT", size
    for size in range(len(content) - 40, len(content)):
        refusal(tmp_path / "m.pth", content[:size])


@pytest.mark.parametrize(
    "content",
    [saved({"model": SOME}), saved({"model": SOME}, old=True), safetensors.torch.save(SOME)],
    ids=["zip", "old format", "safetensors"],
)
def test_damaged_bytes_give_tensors_or_one_line_but_never_a_traceback(tmp_path: Path, content: bytes) -> None:
    chance, path = random.Random(1), tmp_path / "m.pth"
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            read_file(path)
        except MaekitError:
            refusal(path)


def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").code == "E-CKPT-FORMAT"
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    os.mkfifo(folder / "model.safetensors")
    assert refusal(folder).code == "E-CKPT-FORMAT"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert refusal(folder).code == "E-CKPT-FORMAT"


def test_a_folder_without_weights_says_what_lies_in_it(tmp_path: Path) -> None:
    assert "nothing" in str(refusal(tmp_path))
    (tmp_path / "notes.txt").touch()
    error = refusal(tmp_path)
    assert error.code == "E-CKPT-MISSING"
    assert "notes.txt" in str(error)


@pytest.mark.parametrize("name", ["absent", "x" * 300, "a\0b", "file/inside"], ids=["absent", "long", "NUL", "below"])
def test_a_name_with_nothing_behind_it_is_said_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    assert refusal(tmp_path / name).code == "E-CKPT-MISSING"
    assert refusal(tmp_path / name, read=load_model).code == "E-CKPT-MISSING"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(saved(SOME))
    path.chmod(0)
    assert refusal(path).code == "E-CKPT-FORMAT"


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"])
def test_a_configuration_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save(SOME))
    (tmp_path / "config.json").write_text(text, "latin-1")
    assert "config.json" in str(refusal(tmp_path))


# --- code in a file


class Payload:
    """When unpickled, calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


PAYLOADS: dict[str, Callable[[Path], tuple[Callable[..., object], ...]]] = {
    f"{os.system.__module__}.system": lambda place: (os.system, f"touch {place}"),  # type: ignore[dict-item]
    "builtins.exec": lambda place: (builtins.exec, f"open({str(place)!r}, 'w')"),  # type: ignore[dict-item]
    "builtins.eval": lambda place: (builtins.eval, f"open({str(place)!r}, 'w')"),  # type: ignore[dict-item]
}
NESTS: dict[str, Callable[[object], object]] = {
    "alone": lambda it: it,
    "as a weight": lambda it: {"model": {**SOME, "c": it}},
    "beside": lambda it: {"model": SOME, "optimizer": {"state": [{"x": (it,)}]}, "args": argparse.Namespace(lr=it)},
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("form", ["zip", "old format", "pickle"])
def test_a_pickle_with_a_payload_is_refused_by_its_name_and_never_runs(
    tmp_path: Path, name: str, nest: str, protocol: int, form: str
) -> None:
    sentinel, path = tmp_path / "it-ran", tmp_path / "m.pth"
    content = NESTS[nest](Payload(*PAYLOADS[name](sentinel)))
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        path.write_bytes(saved(content, old=form == "old format", pickle_protocol=protocol))
    error = refusal(path)
    assert error.code == "E-CKPT-PICKLE"
    assert name in str(error)
    assert not sentinel.exists()
    refusal(path, read=load_model)
    assert not sentinel.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_that_cannot_be_told_from_text_is_refused_unread(tmp_path: Path, protocol: int) -> None:
    sentinel = tmp_path / "it-ran"
    content = pickle.dumps(Payload(os.mkdir, str(sentinel)), protocol)
    assert refusal(tmp_path / "m.pth", content).code == "E-CKPT-FORMAT"
    assert not sentinel.exists()
    pickle.loads(content)
    assert sentinel.exists()  # the payload is live


def test_a_whole_pickled_module_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    error = refusal(tmp_path / "m.pth", saved(nn.Linear(2, 2)))
    assert error.code == "E-CKPT-PICKLE"
    assert "torch.nn.modules.linear.Linear" in str(error)


def test_names_that_a_pickle_takes_from_its_memory_are_followed(tmp_path: Path) -> None:
    twice = pickle.dumps([Payload(os.mkdir, "x"), Payload(os.rmdir, "x")], 4)  # the module's name comes from the memo
    words = str(refusal(tmp_path / "m.pth", twice))
    assert f"{os.mkdir.__module__}.mkdir" in words
    assert f"{os.rmdir.__module__}.rmdir" in words


def test_a_payload_behind_a_zip_and_a_zip_behind_a_payload_never_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "it-ran"
    payload, sound = pickle.dumps({"model": Payload(os.mkdir, str(sentinel))}), saved(SOME)
    assert "mkdir" in str(refusal(tmp_path / "m.pth", payload + sound))
    (tmp_path / "m.pth").write_bytes(sound + payload)
    try:
        assert_read(read_file(tmp_path / "m.pth"), SOME)
    except MaekitError:
        refusal(tmp_path / "m.pth")
    assert not sentinel.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_archive_is_called_a_program(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    error = refusal(path)
    assert error.code == "E-CKPT-FORMAT"
    assert "TorchScript" in str(error)


@pytest.mark.parametrize("name", ["m/models/model.json", "m/constants.pkl", "m/readme.txt"])
def test_an_archive_of_something_else_is_no_weights(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr(name, "{}")
    assert refusal(tmp_path / "m.pt2").code == "E-CKPT-FORMAT"


# --- claims


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    sound, path = tmp_path / "sound.pth", tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(5_000_000)}, sound)
    with zipfile.ZipFile(sound) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in whole.namelist():
            bomb.writestr(member, whole.read(member))
    assert path.stat().st_size < 200_000
    assert refusal(path).code == "E-CKPT-SIZE"


def test_a_compressed_archive_is_refused_even_where_that_saved_nothing(tmp_path: Path) -> None:
    content = saved({"w": torch.randint(0, 2**31, (20_000,), dtype=torch.int32)})
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(tmp_path / "m.pth", "w") as changed:
        for member in whole.namelist():
            kind = zipfile.ZIP_DEFLATED if member.endswith("data/0") else zipfile.ZIP_STORED
            changed.writestr(member, whole.read(member), kind)
    assert refusal(tmp_path / "m.pth").code == "E-CKPT-SIZE"


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_a_tensor_of_ten_billion_numbers_in_a_kilobyte_is_refused_at_once(tmp_path: Path, old: bool) -> None:
    begin = time.monotonic()
    error = refusal(tmp_path / "m.pth", saved({"model": {"w": torch.zeros(1).expand(200_000, 200_000)}}, old=old))
    assert time.monotonic() - begin < 2
    assert error.code == "E-CKPT-SIZE"
    assert "tensor w" in str(error)
    assert (tmp_path / "m.pth").stat().st_size < 2000


def test_many_names_for_the_same_bytes_are_refused(tmp_path: Path) -> None:
    value = torch.randn(100_000)
    content = {f"w{at}": value for at in range(50)}
    assert refusal(tmp_path / "m.pth", saved(content)).code == "E-CKPT-SIZE"


@pytest.mark.parametrize("claimed", [100, 10**9, 10**13])
def test_an_archive_whose_pickle_claims_more_than_its_member_holds_is_refused(tmp_path: Path, claimed: int) -> None:
    content = saved({"w": torch.zeros(4)})
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(tmp_path / "m.pth", "w") as changed:
        for member in whole.namelist():
            data = whole.read(member)
            if member.endswith("data.pkl"):
                assert data.count(b"K\x04") >= 2  # the numbers of the storage, and the shape
                data = data.replace(b"K\x04", b"\x8a\x08" + claimed.to_bytes(8, "little"))
            changed.writestr(member, data)
    assert refusal(tmp_path / "m.pth").code in ("E-CKPT-FORMAT", "E-CKPT-SIZE")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ["sparse", "rows", "meta", "quantized", "nested", "jagged"])
def test_a_tensor_that_is_not_dense_is_refused_by_name(tmp_path: Path, what: str) -> None:
    ragged = [torch.zeros(2), torch.zeros(3)]
    make: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "rows": lambda: torch.eye(3).to_sparse_csr(),
        "meta": lambda: torch.empty(10, 10, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor(ragged),
        "jagged": lambda: torch.nested.nested_tensor(ragged, layout=torch.jagged),
    }
    error = refusal(tmp_path / "m.pth", saved({"model": {"odd": make[what]()}}))
    assert error.code in ("E-CKPT-FORMAT", "E-CKPT-PICKLE")
    assert "odd" in str(error)


@pytest.mark.parametrize("value", [3, None, "weights", [1], {}, {"model": {}}, {"model": {"w": "x"}}], ids=str)
def test_a_file_of_torch_without_tensors_says_what_is_in_it(tmp_path: Path, value: object) -> None:
    assert "no tensors" in str(refusal(tmp_path / "m.pth", saved(value)))


def header(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "giant header": header("{}", length=2**62),
    "header of 200 MB": header("{}", bytes(100), length=200_000_000),
    "overlap": header(json.dumps({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}), bytes(12)),
    "hole": header(json.dumps({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}), bytes(12)),
    "behind the end": header(json.dumps({"a": entry("F32", [2], 0, 8)}), bytes(4)),
    "more than its shape": header(json.dumps({"a": entry("F32", [2], 0, 12)}), bytes(12)),
    "unknown dtype": header(json.dumps({"a": entry("F99", [2], 0, 8)}), bytes(8)),
    "shape of 2^64": header(json.dumps({"a": entry("F32", [2**32, 2**32], 0, 8)}), bytes(8)),
    "negative": header('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', bytes(8)),
    "same name twice": header('{"a":%s,"a":%s}' % ((json.dumps(entry("F32", [1], 0, 4)),) * 2), bytes(4) * 2),
    "no JSON": header("{nothing", bytes(8)),
    "bad UTF-8": header(b'{"\xff":1}', bytes(8)),
    "trailing data": header(json.dumps({"a": entry("F32", [1], 0, 4)}), bytes(400)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_safetensors_file_that_contradicts_itself_is_refused(tmp_path: Path, name: str) -> None:
    error = refusal(tmp_path / "m.safetensors", BROKEN[name])
    assert error.code == "E-CKPT-FORMAT"
    assert len(str(error)) < 1000


@pytest.mark.parametrize("dtype", ["F64", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "I64",
                                   "U64", "U16", "BOOL", "U8"])  # fmt: skip
def test_every_type_of_number_is_read_or_refused_by_tensor(tmp_path: Path, dtype: str) -> None:
    bits = {"F64": 64, "C64": 64, "I64": 64, "U64": 64, "BF16": 16, "F16": 16, "U16": 16, "F4": 4, "F6_E2M3": 6}
    tensors = named(tiny(), OFFICIAL)
    name, size = "blocks.0.mlp.fc1.bias", 96 * bits.get(dtype, 8) // 8
    path = tmp_path / "m.safetensors"
    content = safetensors.torch.save({n: t for n, t in tensors.items() if n != name})
    length = int.from_bytes(content[:8], "little")
    parts, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    parts[name] = entry(dtype, [96], len(data), len(data) + size)
    path.write_bytes(header(json.dumps(parts), data + bytes(size)))
    try:
        value = load_model(path, hints=HINTS).encoder.state_dict()[name]
    except MaekitError:
        error = refusal(path, read=lambda path: load_model(path, hints=HINTS))
        assert error.code == "E-CKPT-FORMAT" or name in str(error)
    else:
        assert dtype.startswith(("F", "BF"))
        assert value.isfinite().all()


# --- shards


def shards(folder: Path, places: object, **files: dict[str, Tensor]) -> Path:
    for name, tensors in files.items():
        (folder / f"{name}.safetensors").write_bytes(safetensors.torch.save(tensors))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shards_are_put_together_and_what_the_index_does_not_name_is_listed(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2)}, {"b": torch.zeros(3), "stray": torch.zeros(1)}
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=one, two=two)
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae"}')
    file = read_file(tmp_path)
    assert_read(file, {"a": torch.ones(2), "b": torch.zeros(3)})
    assert (file.container, file.beside, file.config) == ("sharded safetensors", ["stray"], {"model_type": "vit_mae"})
    assert_read(read_file(tmp_path / "model.safetensors.index.json"), file.tensors)


def test_shards_of_torch_save_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-1.bin").write_bytes(saved(SOME))
    index = {"weight_map": dict.fromkeys(SOME, "pytorch_model-1.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    file = read_file(tmp_path)
    assert_read(file, SOME)
    assert file.container == "sharded torch"


@pytest.mark.parametrize(
    "place",
    [
        "../secret.safetensors", "/etc/passwd", "..", ".", "", "sub/one.safetensors", "sub", "config.json",
        "model.safetensors.index.json", "absent.safetensors", "x" * 300, "a\0b", "\n\x1b[2J",
    ],
)  # fmt: skip
def test_an_index_names_only_files_of_weights_beside_it(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for other in (tmp_path / "secret.safetensors", folder / "sub" / "model.safetensors"):
        other.write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    shards(folder, {"a": place})
    assert refusal(folder).code in ("E-CKPT-FORMAT", "E-CKPT-MISSING")


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "lost": "one.safetensors"}, one={"a": torch.ones(2)})
    error = refusal(tmp_path)
    assert error.code == "E-CKPT-KEYS"
    assert "lost" in str(error)


@pytest.mark.parametrize("places", [None, [], {}, "x", {"a": 3}, {"a": ["one.safetensors"]}], ids=str)
def test_an_index_without_a_map_is_refused(tmp_path: Path, places: object) -> None:
    assert "weight_map" in str(refusal(shards(tmp_path, places)))


def test_a_shard_with_a_payload_is_refused(tmp_path: Path) -> None:
    sentinel = tmp_path / "it-ran"
    (tmp_path / "one.bin").write_bytes(saved({"a": Payload(os.mkdir, str(sentinel))}))
    assert refusal(shards(tmp_path, {"a": "one.bin"})).code == "E-CKPT-PICKLE"
    assert not sentinel.exists()


# --- numbers that are none


def named(model: MaskedAutoencoder, layout: Layout) -> dict[str, Tensor]:
    """Return the weights that a layout has a place for, under its names."""
    tensors: dict[str, Tensor] = {}
    for ours, value in model.state_dict().items():
        names = theirs(layout, ours)
        tensors |= {name: part.clone() for name, part in zip(names, value.chunk(max(1, len(names))), strict=False)}
    return tensors


@pytest.mark.parametrize("layout", [OFFICIAL, TIMM, TRANSFORMERS, DETECTRON2, TORCHVISION], ids=lambda one: one.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_tensor_in_each_layout(
    tmp_path: Path, layout: Layout, value: float
) -> None:
    path, tensors = tmp_path / "m.pth", named(tiny(), layout)
    hints = HINTS if theirs(layout, "decoder.mask_token") else HINTS._replace(decoder_heads=None)
    path.write_bytes(saved({"model": tensors}))
    load_model(path, hints=hints)
    (name,) = theirs(layout, "encoder.blocks.1.mlp.fc1.weight")
    tensors[name][3, 5] = value
    error = refusal(path, saved({"model": tensors}), read=lambda path: load_model(path, hints=hints))
    assert error.code == "E-CKPT-NAN"
    assert "blocks.1.mlp.fc1.weight" in str(error)


@pytest.mark.parametrize("number", ["7", "9999", "1" + "0" * 12, "9" * 5000], ids=len)
def test_a_block_of_any_number_costs_no_more_than_its_name(tmp_path: Path, number: str) -> None:
    tensors, name = named(tiny(), OFFICIAL), "blocks.1.mlp.fc1.weight"
    tensors[f"blocks.{number}.mlp.fc1.weight"] = tensors[name].clone()
    begin = time.monotonic()
    error = refusal(tmp_path / "m.pth", saved({"model": tensors}), read=lambda path: load_model(path, hints=HINTS))
    assert error.code == "E-CKPT-KEYS"
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "value", [torch.zeros(()), torch.zeros(1, 2), torch.zeros(24, 24).half()], ids=["0", "2", "half"]
)
def test_query_key_and_value_that_do_not_fit_together_are_refused(tmp_path: Path, value: Tensor) -> None:
    tensors = named(tiny(), TRANSFORMERS)
    tensors["vit.encoder.layer.0.attention.attention.key.weight"] = value
    error = refusal(tmp_path / "m.pth", saved({"model": tensors}), read=lambda path: load_model(path, hints=HINTS))
    assert error.code == "E-CKPT-SHAPE"
    assert "qkv" in str(error)


# --- the house


def test_the_yaml_loader_of_settings_makes_only_plain_values() -> None:
    for text in ("!!python/object/apply:os.mkdir [x]", "!!python/name:os.system", "!!python/object/new:set []"):
        assert not callable(yaml.load(text, Loader=config._Text))
    assert config._Text.yaml_constructors.keys() - yaml.BaseLoader.yaml_constructors.keys() == {config._NOTHING_TAG}
