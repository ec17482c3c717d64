"""Family 3.4: files of weights and checkpoints, by `maekit inspect`, which reads all that any verb reads of them."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from maekit.interchange.weights import metadata
from maekit.model.mae import MaskedAutoencoder, create_model
from maekit.train import checkpoint

from .case import SENTINEL, Case

TENSORS = {"a.weight": torch.arange(16.0).view(4, 4), "b": torch.tensor([1.0, 2.0]).half()}
Files = Mapping[str, bytes | str]


class Runs:
    """When unpickled, makes a folder; the way is named by the module's function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(value: object, **more: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **more)
    return stream.getvalue()


def header(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tiny() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=8,
        depth=1,
        num_heads=2,
        decoder_dim=8,
        decoder_depth=1,
        decoder_heads=2,
    )


def cases() -> list[Case]:
    """Return every case."""
    return [*nothing(), *strangers(), *programs(), *claims(), *headers(), *ours(), *shards(), *folders()]


def of(name: str, file: str, content: bytes | str, code: str, said: str = "", words: str = "") -> Case:
    return Case(name, {f"w/{file}": content}, f"inspect HERE/w/{file} {words}", code, said, 4)


def nothing() -> list[Case]:
    """Where nothing is."""
    return [
        Case("no file named", {}, "inspect", "E-USAGE-FILE", "no file named", 2),
        Case("weights that are not there", {}, "inspect HERE/none.pth", "E-CKPT-MISSING", "none.pth", 4),
        Case("a name of 300 letters", {}, f"inspect HERE/{'x' * 300}", "E-CKPT-MISSING", "too long", 4),
        Case("a name with NUL", {}, "inspect HERE/a\0b", "E-CKPT-MISSING", r"\\x00", 4),
        Case("a URL as weights", {}, "inspect https://example.org/x.pth", "E-CKPT-MISSING", "no weights at", 4),
        Case("a model of the hub as weights", {}, "inspect hf-hub:timm/vit", "E-CKPT-MISSING", "no weights at", 4),
        Case(
            "a pipe as weights",
            lambda here: os.mkfifo(here / "x.pth"),
            "inspect HERE/x.pth",
            "E-CKPT-FORMAT",
            "no regular file",
            4,
        ),
        Case(
            "a device as weights",
            lambda here: (here / "x.pth").symlink_to("/dev/zero"),
            "inspect HERE/x.pth",
            "E-CKPT-FORMAT",
            "no regular file",
            4,
        ),
        Case(
            "a link to itself as weights",
            lambda here: (here / "x.pth").symlink_to("x.pth"),
            "inspect HERE/x.pth",
            "E-CKPT-MISSING",
            "",
            4,
        ),
    ]


def strangers() -> list[Case]:
    """What lies under the name of weights and is none."""
    found = {
        "an empty file": (b"", "empty"),
        "a web page": (b"<!DOCTYPE html><html>", "web page"),
        "XML": (b"<?xml version='1.0'?>", "web page"),
        "JSON": (b'{"error": 404}', "JSON"),
        "a list": (b"[1, 2]", "JSON"),
        "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        "GGUF": (b"GGUF\3\0", "GGUF"),
        "a program": (b"\x7fELF\2\1", "ELF"),
        "a gzip": (b"\x1f\x8b\x08\0", "gzip"),
        "zeros": (bytes(999), "zeros"),
        "text": (b"hello, no weights\n" * 9, "no weights"),
        "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "no weights"),
        "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "no weights"),
        "npy": (b"\x93NUMPY\1\0" + bytes(99), "no weights"),
        "ones": (b"\xff" * 99, "no weights"),
        "one byte": (b"\x80", "damaged"),
        "half a zip": (b"PK\x03\x04", "damaged"),
        "terminal codes": (b"\x1b[31mred\x07\n" * 9, "no weights"),
        "a tar": (b"a" * 257 + b"ustar", "no weights"),
    }
    return [
        of(f"{what} as {file}", file, content, "E-CKPT-FORMAT", said)
        for what, (content, said) in found.items()
        for file in ("model.safetensors", "mae.pth")
    ]


def programs() -> list[Case]:
    """Pickles, archives and graphs that run something when others load them."""
    system = f"{os.system.__module__}.system"
    payloads: dict[str, Any] = {
        "os.system": (Runs(os.system, f"mkdir {SENTINEL}"), system),
        "os.mkdir": (Runs(os.mkdir, SENTINEL), "mkdir"),
        "exec": (Runs(exec, f"import os; os.mkdir({SENTINEL!r})"), r"builtins\.exec"),
        "eval": (Runs(eval, f"__import__('os').mkdir({SENTINEL!r})"), r"builtins\.eval"),
        "a module of torch": (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        "a path": (Path("x"), r"pathlib"),
    }
    made = []
    for what, (value, said) in payloads.items():
        nested = {"model": {**TENSORS, "c": value}, "epoch": 3}
        beside = {"model": TENSORS, "optimizer": {"state": [{"x": (value,)}]}}
        made += [
            of(f"{what} in a .pt", "x.pt", saved(value), "E-CKPT-PICKLE", said),
            of(f"{what} among weights", "x.pth", saved(nested), "E-CKPT-PICKLE", said),
            of(f"{what} beside weights", "x.ckpt", saved(beside), "E-CKPT-PICKLE", said),
            of(
                f"{what} in the old format",
                "x.bin",
                saved(nested, _use_new_zipfile_serialization=False),
                "E-CKPT-PICKLE",
                said,
            ),
            of(f"{what} in a bare pickle", "x.pkl", pickle.dumps(nested, 4), "E-CKPT-PICKLE", said),
            of(f"{what} named safetensors", "model.safetensors", saved(value), "E-CKPT-PICKLE", said),
        ]
    twice = pickle.dumps([Runs(os.mkdir, SENTINEL)], 0)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs(os.mkdir, SENTINEL), 2))
        archive.writestr("archive/version", "3\n")
    graph = io.BytesIO()
    with zipfile.ZipFile(graph, "w") as archive:
        archive.writestr("m/constants.pkl", pickle.dumps(Runs(os.mkdir, SENTINEL), 2))
        archive.writestr("m/data.pkl", b"\x80\x02}.")
    exported = io.BytesIO()
    with zipfile.ZipFile(exported, "w") as archive:
        archive.writestr("m/models/model.json", "{}")
    return [
        *made,
        of("a pickle of protocol 0", "x.pth", twice, "E-CKPT-FORMAT", "no weights"),
        of("an archive made by hand", "x.pth", inner.getvalue(), "E-CKPT-PICKLE", "mkdir"),
        of(
            "a payload before sound weights",
            "x.pth",
            pickle.dumps(Runs(os.mkdir, SENTINEL)) + saved(TENSORS),
            "E-CKPT-",
            "",
        ),
        of("a program of TorchScript", "x.pt", graph.getvalue(), "E-CKPT-FORMAT", "a program"),
        of("a program of torch.export", "x.pt2", exported.getvalue(), "E-CKPT-FORMAT", "a program"),
        of("a graph of ONNX", "x.onnx", b"\x08\x07\x12\x07pytorch" + bytes(99), "E-CKPT-FORMAT", "ONNX"),
        of("a zip of something else", "x.pth", _zip({"readme.txt": b"hello"}), "E-CKPT-FORMAT", "without weights"),
        of("a zip that climbs", "x.pth", _zip({"../../it-ran": b"x", "a/data.pkl": b"\x80\x02}."}), "E-CKPT-", ""),
    ]


def _zip(members: Mapping[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def claims() -> list[Case]:
    """Files that claim more than they hold, and files that hold no dense tensors."""
    sound = saved(TENSORS)
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    huge = torch.zeros(1).expand(200_000, 200_000)
    kinds = {
        "sparse": torch.eye(3).to_sparse(),
        "without values": torch.zeros(3, device="meta"),
    }
    values: dict[str, object] = {
        "a number": 3,
        "nothing": None,
        "a word": "weights",
        "a list": [1],
        "an empty dict": {},
        "an empty model": {"model": {}},
        "words for weights": {"model": {"w": "x"}},
        "one tensor": torch.zeros(3),
    }
    return [
        of("40 billion numbers in a kilobyte", "x.pth", saved({"model": {"a": huge}}), "E-CKPT-SIZE", "bytes claimed"),
        of(
            "the same in the old format",
            "x.pth",
            saved({"a": huge}, _use_new_zipfile_serialization=False),
            "E-CKPT-SIZE",
            "bytes claimed",
        ),
        of("a deflated archive", "x.pth", _zip(members, zipfile.ZIP_DEFLATED), "E-CKPT-SIZE", "a compressed archive"),
        of(
            "a bomb of an archive",
            "x.pth",
            _zip({**members, "archive/data/9": bytes(10**7)}, zipfile.ZIP_DEFLATED),
            "E-CKPT-SIZE",
            "a compressed archive",
        ),
        *(
            of(f"weights cut at {n} %", "x.pth", sound[: len(sound) * n // 100], "E-CKPT-FORMAT", "damaged")
            for n in (10, 50, 99)
        ),
        *(
            of(f"a tensor that is {kind}", "x.pth", saved({"a": value}), "E-CKPT-FORMAT", kind.split()[0])
            for kind, value in kinds.items()
        ),
        *(
            of(f"a file of {what}", "x.pth", saved(value), "E-CKPT-FORMAT", "no tensors")
            for what, value in values.items()
        ),
        of("tensors of no model", "x.pth", sound, "E-CKPT-LAYOUT", "no whole layout"),
    ]


def headers() -> list[Case]:
    """Headers of safetensors that lie."""
    lies = {
        "a giant header": header("{}", length=2**62),
        "a header of 200 MB": header("{}", bytes(100), length=200_000_000),
        "tensors that overlap": header(
            json.dumps({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}), bytes(12)
        ),
        "a hole": header(json.dumps({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}), bytes(12)),
        "a tensor behind the end": header(json.dumps({"a": entry("F32", [2], 0, 8)}), bytes(4)),
        "more than its shape": header(json.dumps({"a": entry("F32", [2], 0, 12)}), bytes(12)),
        "an unknown type": header(json.dumps({"a": entry("F99", [2], 0, 8)}), bytes(8)),
        "a shape of 2^64": header(json.dumps({"a": entry("F32", [2**32, 2**32], 0, 8)}), bytes(8)),
        "a negative shape": header('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', bytes(8)),
        "a name twice": header('{"a":%s,"a":%s}' % ((json.dumps(entry("F32", [1], 0, 4)),) * 2), bytes(8)),
        "no JSON": header("{nothing", bytes(8)),
        "bad UTF-8": header(b'{"\xff":1}', bytes(8)),
        "data behind it": header(json.dumps({"a": entry("F32", [1], 0, 4)}), bytes(400)),
        "100,000 brackets": header('{"a":' + "[" * 100_000, bytes(8)),
        "nothing after its length": struct.pack("<Q", 2) + b"{",
    }
    return [of(f"a header with {what}", "model.safetensors", data, "E-CKPT-FORMAT", "") for what, data in lies.items()]


def ours() -> list[Case]:
    """Our own files, changed."""
    model = tiny()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    said = metadata(model)["maekit"]
    sound = safetensors.torch.save(state, {"maekit": said})

    def about(**change: Any) -> bytes:
        return safetensors.torch.save(state, {"maekit": json.dumps({**json.loads(said), **change})})

    def spec(**change: Any) -> bytes:
        return about(spec={**json.loads(said)["spec"], **change})

    def weights(**change: torch.Tensor) -> bytes:
        return safetensors.torch.save({**state, **change}, {"maekit": said})

    name = next(iter(state))
    first = {name: state[name] * float("nan")}
    without = {key: value for key, value in state.items() if key != name}
    wrong: dict[str, tuple[bytes, str]] = {
        "of a newer format": (about(format=99), "E-CKPT-FORMAT"),
        "of no format": (about(format="1"), "E-CKPT-FORMAT"),
        "of an unknown kind": (about(kind="os.system"), "E-CKPT-FORMAT"),
        "with a field more": (about(hook="x"), "E-CKPT-FORMAT"),
        "of a model that is code": (spec(name="os.system"), "E-"),
        "of a model of the hub": (spec(name="hf-hub:x/y"), "E-"),
        "of a name of 10,000 letters": (spec(name="x" * 10_000), "E-CKPT-FORMAT"),
        "of width 0": (spec(embed_dim=0), "E-CKPT-FORMAT"),
        "of width 10^9": (spec(embed_dim=10**9), "E-CKPT-FORMAT"),
        "of depth 10^9": (spec(depth=10**9), "E-CKPT-FORMAT"),
        "of depth 1024": (spec(depth=1024), "E-CKPT-KEYS"),
        "of 3 heads": (spec(num_heads=3), "E-"),
        "of an image of 65536": (spec(img_size=[65536, 65536]), "E-"),
        "of an image of words": (spec(img_size="x"), "E-CKPT-FORMAT"),
        "of channels of 65536": (spec(in_chans=65536), "E-"),
        "of another target": (spec(target="os.system"), "E-"),
        "of a mean of NaN": (spec(mean=[float("nan")]), "E-CKPT-FORMAT"),
        "of a deviation of 0": (spec(std=[0.0]), "E-"),
        "whose header is no JSON": (safetensors.torch.save(state, {"maekit": "{"}), "E-CKPT-FORMAT"),
        "whose header is a list": (safetensors.torch.save(state, {"maekit": "[]"}), "E-CKPT-FORMAT"),
        "whose header is deep": (safetensors.torch.save(state, {"maekit": "[" * 100_000}), "E-CKPT-FORMAT"),
        "with NaN": (safetensors.torch.save({**state, **first}, {"maekit": said}), "E-CKPT-NAN"),
        "with a weight missing": (safetensors.torch.save(without, {"maekit": said}), "E-CKPT-KEYS"),
        "with a weight more": (weights(more=torch.zeros(3)), "E-CKPT-KEYS"),
        "with a weight of another shape": (weights(**{name: torch.zeros(7)}), "E-CKPT-SHAPE"),
        "with another digest": (about(sha256="0" * 64), "E-CKPT-DAMAGED"),
        "cut by a byte": (sound[:-1], "E-CKPT-FORMAT"),
    }
    evil = metadata(model, classes=["\x1b[31m<script>", "b"], pool="mean")["maekit"]
    return [
        *(of(f"our weights {what}", "encoder.safetensors", data, code) for what, (data, code) in wrong.items()),
        Case(
            "our weights with classes of terminal codes",
            {"w/x.safetensors": safetensors.torch.save(state, {"maekit": evil})},
            "inspect HERE/w/x.safetensors",
            "E-CKPT-",
            "",
            4,
        ),
        Case(
            "our weights as they are",
            {"w/x.safetensors": sound},
            "inspect HERE/w/x.safetensors",
            "",
            "masked autoencoder",
        ),
        Case(
            "a hint against our weights",
            {"w/x.safetensors": sound},
            "inspect HERE/w/x.safetensors --num-heads 4",
            "E-CONFIG-HINT",
            "num_heads",
            2,
        ),
    ]


def shards() -> list[Case]:
    """An index of shards that names what it must not."""
    one = safetensors.torch.save(TENSORS)
    maps: dict[str, tuple[Any, str, str]] = {
        "upwards": ({"a": "../x.safetensors"}, "E-CKPT-FORMAT", "shard"),
        "absolute": ({"a": "/etc/passwd"}, "E-CKPT-FORMAT", "shard"),
        "itself": ({"a": "model.safetensors.index.json"}, "E-CKPT-FORMAT", "shard"),
        "nothing": ({"a": ""}, "E-CKPT-FORMAT", "shard"),
        "a folder": ({"a": "."}, "E-CKPT-FORMAT", "shard"),
        "a URL": ({"a": "http://x/y"}, "E-CKPT-FORMAT", "shard"),
        "a shard that is not there": ({"a": "two.safetensors"}, "E-CKPT-MISSING", "two"),
        "a number": ({"a": 3}, "E-CKPT-FORMAT", "weight_map"),
        "a tensor that is not there": ({"zz": "one.safetensors"}, "E-CKPT-KEYS", "zz"),
        "a payload": ({"a": "p.bin"}, "E-CKPT-PICKLE", "mkdir"),
        "no map": (None, "E-CKPT-FORMAT", "weight_map"),
        "an empty map": ({}, "E-CKPT-FORMAT", "weight_map"),
        "a list": ([], "E-CKPT-FORMAT", "weight_map"),
    }
    return [
        Case(
            f"an index that names {what}",
            {
                "w/model.safetensors.index.json": json.dumps({"weight_map": places}),
                "w/one.safetensors": one,
                "w/p.bin": saved(Runs(os.mkdir, SENTINEL)),
            },
            "inspect HERE/w",
            code,
            said,
            4,
        )
        for what, (places, code, said) in maps.items()
    ]


def folders() -> list[Case]:
    """Folders of other libraries and of our runs, changed."""

    def run(change: Callable[[Path], object]) -> Callable[[Path], None]:
        def lay(here: Path) -> None:
            model = tiny()
            folder = checkpoint.save(
                here / "run/checkpoints",
                5,
                {"model": dict(model.state_dict())},
                {"window": [], "loss": 1.0, "scaler": {}},
                metadata=metadata(model),
                keep=1,
            )
            change(folder)

        return lay

    def vouched(name: str, data: bytes) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / name).write_bytes(data)
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(manifest))

        return change

    def write(name: str, data: bytes | str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    def manifest(text: str) -> Callable[[Path], object]:
        return write("manifest.json", text)

    climbing = (
        '{"format":1,"step":5,"files":{"../../../x":{"bytes":0,"sha256":""},"model.safetensors":{},"state.json":{}}}'
    )
    payload = saved(Runs(os.mkdir, SENTINEL))
    changes: dict[str, Callable[[Path], object]] = {
        "without its weights": lambda folder: (folder / "model.safetensors").unlink(),
        "without its state": lambda folder: (folder / "state.json").unlink(),
        "with an empty manifest": manifest(""),
        "with a manifest of a list": manifest("[]"),
        "with a manifest of brackets": manifest("[" * 100_000),
        "with a manifest of nothing": manifest("{}"),
        "with a manifest that climbs": manifest(climbing),
        "with a manifest of a newer format": manifest('{"format":99,"step":5,"files":{}}'),
        "with a manifest of no files": manifest('{"format":1,"step":5,"files":{}}'),
        "with files that are a number": manifest('{"format":1,"step":5,"files":3}'),
        "with a file that is a number": manifest('{"format":1,"step":5,"files":{"a":3}}'),
        "with a step of 5000 digits": manifest('{"format":1,"step":' + "9" * 5000 + ',"files":{}}'),
        "with a payload for weights": write("model.safetensors", payload),
        "that vouches for a payload": vouched("model.safetensors", payload),
        "that vouches for a state of words": vouched("state.json", b'"x"'),
        "that vouches for another step": vouched("state.json", b'{"step":6,"window":[],"loss":1,"scaler":{}}'),
        "that vouches for cut weights": vouched("model.safetensors", b"\x08"),
        "with a flipped bit": write("state.json", '{"step":5,"window":[],"loss":2.0,"scaler":{}}'),
    }
    hub = {
        "no JSON": "{",
        "a list": "[]",
        "brackets": "[" * 100_000,
        "code": json.dumps({"auto_map": {"AutoModel": "evil.Model"}, "architectures": ["Evil"]}),
    }
    return [
        *(
            Case(f"a checkpoint {what}", run(change), "inspect HERE/run/checkpoints/step-5", "E-CKPT-", "", 4)
            for what, change in changes.items()
        ),
        Case("an empty folder as weights", {"w/": ""}, "inspect HERE/w", "E-CKPT-MISSING", "found nothing", 4),
        Case(
            "a folder of other files",
            {"w/a.txt": "x", "w/evil.py": "import os; os.mkdir('it-ran')"},
            "inspect HERE/w",
            "E-CKPT-MISSING",
            "a.txt",
            4,
        ),
        Case(
            "a folder with a payload", {"w/pytorch_model.bin": payload}, "inspect HERE/w", "E-CKPT-PICKLE", "mkdir", 4
        ),
        *(
            Case(
                f"a folder whose config is {what}",
                {
                    "w/config.json": text,
                    "w/model.safetensors": safetensors.torch.save(TENSORS),
                    "w/evil.py": "import os; os.mkdir('it-ran')",
                },
                "inspect HERE/w",
                "E-CKPT-",
                "",
                4,
            )
            for what, text in hub.items()
        ),
    ]
