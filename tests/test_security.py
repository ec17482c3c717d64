"""What the threat model of SECURITY.md promises, T1 to T15, as far as other files do not test it.

Payloads in pickles: also tests/interchange/test_files.py, test_weights.py, tests/badinput/checkpoints.py.
"""

import ast
import importlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maekit import floors
from maekit.cli import main
from maekit.data.bad_images import BadImages
from maekit.errors import MaekitError
from maekit.interchange.files import read_file
from maekit.interchange.targets import load_target
from maekit.interchange.weights import load_classifier, load_model, read_weights
from maekit.report.page import Section, write_report
from maekit.train import checkpoint
from maekit.train.log import Log

REPO = Path(__file__).parents[1]
SRC = REPO / "src" / "maekit"


# ------------------------------------------------------------------------------------------- what stands in the code


def uses(tree: ast.AST) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every name that is called, imported or mentioned with its module, and the keywords of calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield f"{ast.unparse(node.func)}()", {word.arg or "**": ast.unparse(word.value) for word in node.keywords}
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), {}
        elif isinstance(node, ast.Import):
            yield from ((f"import {alias.name}", {}) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"import {node.module}", {}
            yield from ((f"{node.module}.{alias.name}", {}) for alias in node.names)
        elif isinstance(node, ast.Name):
            yield node.id, {}


USES = {path.relative_to(SRC).as_posix(): list(uses(ast.parse(path.read_text()))) for path in sorted(SRC.rglob("*.py"))}
"""What each file of the package uses."""


def holders(*patterns: str) -> set[str]:
    """Return the files in which a name matches one of the patterns."""
    wanted = re.compile("|".join(patterns))
    return {file for file, used in USES.items() if any(wanted.fullmatch(name) for name, _ in used)}


def test_pickles_are_opened_in_the_gate_only() -> None:
    """T1, T2, T6; T4: no scanner is asked whether a file may be trusted; T5: nothing is ever unpacked onto the disk."""
    assert holders(r"import pickle(tools)?", r"pickle\..*", r"torch\.load", r"(import )?torch\.serialization.*") == {
        "interchange/files.py"
    }
    gate = [words for name, words in USES["interchange/files.py"] if name == "torch.load()"]
    assert {"weights_only": "True", "map_location": "'cpu'"} in gate
    assert not holders(
        r"(import )?(picklescan|modelscan|fickling|safepickle)(\..*)?",
        r"(import )?(joblib|dill|cloudpickle|shelve|marshal|codeop|runpy|tarfile|shutil\.unpack_archive)(\..*)?",
        r".*\.(extractall|unpack_archive)",
        r"torch\.(jit|hub|package)\.load.*",
        r"(import )?torch\.distributed\.checkpoint.*",
        r"pa\.deserialize",
        r"numpy\.load",
        r".*\.read_pickle",
    )
    assert holders(r"torch\.export\.load") == {"interchange/export.py"}  # proves what was just written
    for file, used in USES.items():
        for name, words in used:
            assert words.get("allow_pickle") in (None, "False"), file
            assert name != "np.load()" or words.get("allow_pickle") == "False", file
            assert words.get("weights_only") in (None, "True"), file


def test_no_text_becomes_code() -> None:  # T3
    assert not holders(
        r"(eval|exec|compile|__import__)\(\)", r"builtins\..*", r"types\.FunctionType", r"ast\.literal_eval"
    )
    assert not holders(
        r"yaml\.(unsafe_load|full_load|load_all|Loader|UnsafeLoader|FullLoader)", r".*trust_remote_code.*"
    )
    assert holders(r"yaml\.load") == {"config.py"}
    # names of modules come from our own tables, from extras that are asked for by us, or from the command line
    importers = {
        "__init__.py",
        "cli.py",
        "tasks/parts.py",
        "data/corrupt.py",
        "interchange/export.py",
        "conformance/adapter.py",
        "conformance/peers.py",
        "interchange/proof.py",
        "zygote.py",
    }
    assert holders("import_module", r"importlib\.import_module") <= importers


def test_no_shell_is_started_and_programs_only_where_parts_are_run() -> None:
    assert not holders(
        r"os\.(system|popen|exec.*|spawn.*)", r"pty\..*", r"subprocess\.(call|run|getoutput|check_output)"
    )
    assert holders(r"subprocess\.Popen", "import subprocess") <= {
        "tasks/parts.py",
        "soak/children.py",
    }
    assert not [file for file, used in USES.items() for _, words in used if words.get("shell") == "True"]


def test_no_objects_travel_between_processes_and_nothing_speaks_to_a_network() -> None:  # T11, T12
    assert not holders(
        r".*(all_gather_object|broadcast_object_list|gather_object|scatter_object_list|send_object_list)"
    )
    assert not holders(
        r"(import )?(urllib|urllib3|requests|http|httpx|ftplib|smtplib|webbrowser|asyncio)(\..*)?",
        r".*(hf_hub_download|snapshot_download|load_state_dict_from_url|download_url.*)",
        r".*\.from_url",
    )
    assert holders("import socket", r"socket\..*") <= {"tasks/run_folder.py"}  # the lock's host
    for file, used in USES.items():  # a library's weights are never fetched: the proof reads what was just written
        for name, words in used:
            assert (
                not name.endswith("create_model()")
                or words.get("pretrained") != "True"
                or file == "interchange/proof.py"
            )


def test_images_are_decoded_behind_one_door() -> None:
    decoders = (
        r"(import )?simplejpeg.*",
        r"Image\.open",
        r"PIL\..*Plugin.*",
        r"(np|numpy|torch)\.frombuffer",
        r".*\.(decode_image|decode_jpeg)",
        r"import (cv2|imageio|skimage|torchcodec|torchvision\.io).*",
        r"torchvision\.io.*",
    )
    # report/scored.py: matplotlib's own drawing, made a moment before; tasks/same_data.py: sums of its own;
    # data/packing.py encodes; data/columns.py, data/decoded.py: numbers of their own, out of shared memory;
    # bench/data.py: the way of the authors' code, to be measured
    own = {"report/scored.py", "tasks/same_data.py", "data/columns.py", "data/decoded.py", "bench/data.py"}
    assert holders(*decoders) == {"data/image.py", "data/packing.py"} | own
    found = {name for name, _ in USES["data/packing.py"] if any(re.fullmatch(one, name) for one in decoders)}
    assert found == {"import simplejpeg", "simplejpeg", "simplejpeg.encode_jpeg", "simplejpeg.encode_jpeg()"}
    # and all that look at images come through it: training, evaluation, embed, reconstruct, predict, maekit data
    assert holders(r"maekit\.data\.image\.read_image") >= {
        "data/samples.py",
        "data/check.py",
        "data/masks.py",
        "tasks/reconstruct.py",
        "tasks/training.py",
        "interchange/classifier.py",
    }


# --------------------------------------------------------------------------------------------------------- payloads


class Runs:
    """When unpickled, makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.place,))


@pytest.mark.parametrize(
    "name", ["x.pt", "x.pth", "x.ckpt", "x.bin", "x.safetensors", "pytorch_model.bin", "config.yaml"]
)
def test_no_door_runs_a_payload(name: str, tmp_path: Path) -> None:  # T1
    sentinel, file = tmp_path / "it-ran", tmp_path / "w" / name
    file.parent.mkdir()
    torch.save({"model": {"a": torch.ones(2)}, "more": Runs(sentinel)}, file)
    (file.parent / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"})
    )
    (file.parent / "evil.py").write_text(f"import os; os.mkdir({str(sentinel)!r})")
    doors = (read_file, read_weights, load_model, load_classifier, load_target, checkpoint.load)
    for door in doors:
        for place in (file, file.parent):
            with pytest.raises(MaekitError, match=r"error\[E-C"):
                door(place)
    if name not in ("x.pth", "config.yaml"):
        assert not sentinel.exists()
        return
    for words in (
        "inspect FILE",
        "config show FILE",
        f"convert FILE {tmp_path}/new --to timm",
        f"pretrain --data builtin:fashion --out {tmp_path}/new --init FILE --device cpu",
        "finetune --config FILE",
    ):
        assert main([word.replace("FILE", str(file)) for word in words.split()]) in (2, 4)
    assert not sentinel.exists() and not (tmp_path / "new").exists()


def test_a_folder_of_torchs_distributed_checkpoints_never_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # T2
    sentinel, folder = tmp_path / "it-ran", tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(sentinel)))
    torch.save({"w": torch.ones(2), "more": Runs(sentinel)}, folder / "__0_0.distcp")
    for place in (folder, folder / ".metadata", folder / "__0_0.distcp"):
        for words in (
            "inspect PLACE",
            f"convert PLACE {tmp_path}/new --to timm",
            f"pretrain --data builtin:fashion --out {tmp_path}/new --init PLACE --device cpu",
        ):
            assert main([word.replace("PLACE", str(place)) for word in words.split()]) in (2, 4), words
            said = capfd.readouterr().err
            assert "error[E-C" in said and "Traceback" not in said, said
    assert not sentinel.exists() and not (tmp_path / "new").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert sentinel.exists()  # so the payload works


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    ["inspect FILE", "convert FILE new --to timm", "knn FOLDER --data builtin:fashion", "finetune --config FILE"],
)
def test_no_command_runs_a_payload(words: str, tmp_path: Path) -> None:
    """T1: the real command over a pickle that is planted under every name it could have."""
    sentinel, folder = tmp_path / "it-ran", tmp_path / "w"
    folder.mkdir()
    for name in ("x.pth", "pytorch_model.bin", "encoder.safetensors", "config.yaml"):
        torch.save({"model": {"a": torch.ones(2)}, "more": Runs(sentinel)}, folder / name)
    argv = words.replace("FILE", str(folder / "x.pth")).replace("FOLDER", str(folder)).split()
    done = subprocess.run(
        [sys.executable, "-m", "maekit", *argv], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode in (2, 4) and done.stderr.count("error[E-C") == 1, done.stderr
    assert "Traceback" not in done.stderr and not sentinel.exists() and sorted(tmp_path.iterdir()) == [folder]


def test_a_file_cannot_say_which_code_to_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:  # T3
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('it-ran')\n")
    (tmp_path / "c.yaml").write_text("module: evil:make\n")
    assert main(["doctor", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "E-CONFIG-CODE" in capfd.readouterr().err and "evil" not in sys.modules


# ------------------------------------------------------------------------------------------------------------- leaks


def test_a_report_names_the_users_folder_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # T14
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    words = f"maekit embed {home}/runs/a --data '{home}/my pictures' --out /data{home}/x"
    write_report(
        tmp_path / "report.html", title="Run", sections=[Section("Next", text=[f"in {home}/runs"], commands=[words])]
    )
    html = (tmp_path / "report.html").read_text()
    assert "embed ~/runs/a --data ~/&#39;my pictures&#39;" in html and "in ~/runs" in html
    assert f"/data{home}/x" in html and html.count("alice") == 1  # another place that ends alike


@pytest.mark.slow
def test_no_network_and_no_names_of_user_or_machine_in_what_is_shared(tmp_path: Path) -> None:  # T11, T14
    """A whole life of an encoder, every socket shut but the loopback's; then a search through its files."""
    home = tmp_path / "home" / "alicelogin"
    rng = np.random.default_rng(0)
    for number in range(24):
        file = home / "pictures" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x013B] = "alicelogin"
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, exif=exif)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SHUT)
    tiny = (
        "--model vit_tiny_patch16_224 --img-size 16 --patch-size 8 --embed-dim 8 --depth 1 --num-heads 2 "
        "--decoder-dim 8 --decoder-depth 1 --decoder-heads 2 --batch-size 4 --steps 2 --workers 2"
    )
    data, runs = f"--data {home}/pictures --device cpu", home / "runs"
    lines = [
        f"pretrain {data} --out {runs}/a {tiny}",
        f"finetune {runs}/a {data} --out {runs}/b --batch-size 4 --steps 2 --workers 0",
        f"embed {runs}/a {data} --out {runs}/features.parquet --workers 0",
        f"predict {runs}/b {data} --out {runs}/p.csv --workers 0",
        f"convert {runs}/a {runs}/timm --to timm",
        f"knn {runs}/a {data} --workers 0",
        f"reconstruct {runs}/a {data} --out {runs}/pictures",
    ]
    program = f"from maekit.cli import main\nfor line in {lines!r}:\n    assert main(line.split()) == 0, line\n"
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HOME": str(home), "USER": "alicelogin", "LOGNAME": "alicelogin", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr
    private = {"config.yaml", "result.json"}  # as SECURITY.md says
    host = socket.gethostname()
    for file in sorted(runs.rglob("*")):
        if file.is_file() and file.name not in private:
            content = file.read_bytes()
            assert b"alicelogin" not in content, file
            assert len(host) < 6 or host.encode() not in content, file
    assert not list(runs.rglob(".lock")) or not (runs / "a" / ".lock").read_text()


SHUT = """
import sys

def shut(event, told):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        name = told[0] if event != "socket.sendto" else told[1]
        if name not in ("localhost", "127.0.0.1", "::1", None):
            raise RuntimeError(f"network: {event} {told}")
    near = ("127.0.0.1", "::1", "localhost")
    if event in ("socket.connect", "socket.bind") and isinstance(told[1], tuple) and told[1][0] not in near:
        raise RuntimeError(f"network: {event} {told}")

sys.addaudithook(shut)
"""


# ------------------------------------------------------------------------------------------------------------ floors


def test_the_floors_are_those_of_the_package_and_hold_here() -> None:  # T7, T13
    wanted = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = dict(one.split(">=") for one in wanted)
    assert {name: declared[name] for name in floors.FLOORS} == floors.FLOORS
    floors.check()


def test_a_library_below_its_floor_is_refused_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, version in (("pillow", "12.3.0"), ("torch", "2.9.1+cpu")):
        place = tmp_path / f"{name}-{version}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert main(["data", "builtin:fashion"]) == 5
    said = capfd.readouterr().err
    assert "error[E-ENV-VERSION]" in said and "torch 2.9.1+cpu, pillow 12.3.0" in said
    assert "pip install 'torch>=2.11' 'pillow>=13'" in said and said.count("\n") == 1
    assert main(["--help"]) == 0


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.11.0+cpu", (2, 11, 0, 0)), ("13", (13, 0, 0, 0)), ("x", (0, 0, 0, 0)), ("2.15.0a0", (2, 15, 0, 0))],
)
def test_versions_are_compared_by_their_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert floors._number(version) == numbers


# ------------------------------------------------------------------------------------------------- temporary files


def test_temporary_files_have_names_that_cannot_be_guessed_and_are_opened_exclusively() -> None:  # T15
    assert not holders(r"(import )?tempfile(\.mktemp)?") - {
        "conformance/own.py",
        "conformance/peers.py",
        "data/columns.py",  # a file without a name
        "soak/fuzz.py",
        "soak/originals.py",
        "tasks/bench.py",  # a folder made exclusively
        "tasks/soak.py",
        "train/device.py",  # where the processes of a run meet
    }
    for file in USES:
        for line in (SRC / file).read_text().splitlines():
            if ".tmp-" in line and "glob" not in line and "startswith" not in line:
                assert "uuid4" in line or line.lstrip().startswith(("#", '"')), f"{file}: {line}"


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uuid

    from maekit.report.files import write_whole

    precious = tmp_path / "precious"
    precious.write_text("mine")
    fixed = uuid.uuid4()
    monkeypatch.setattr(uuid, "uuid4", lambda: fixed)
    (tmp_path / f".tmp-{fixed.hex}").symlink_to(precious)
    with pytest.raises(MaekitError, match="E-ENV-OUT"):
        write_whole(tmp_path / "report.html", b"ours")
    assert precious.read_text() == "mine"


# ------------------------------------------------------------------------------------------------- planted files


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_what_is_planted_as_the_lock_is_refused_unread(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # T15
    precious, out = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine and secret")
    out.mkdir()
    plant(kind, out / ".lock", precious)
    assert main(["pretrain", "--data", "builtin:fashion", "--out", str(out), "--device", "cpu", "--steps", "1"]) == 5
    said = capfd.readouterr().err
    assert "error[E-ENV-OUT]: cannot lock" in said and "secret" not in said
    assert precious.read_text() == "mine and secret"
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_is_planted_as_a_file_of_a_run_is_not_written_through(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # T15
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("metrics.jsonl", "bad_files.jsonl"):
        plant(kind, tmp_path / name, precious)
    account = BadImages(["a.png", "b.png"], file=tmp_path / "bad_files.jsonl")
    account.begin(0, 0)
    account.book([(1, "b.png: broken")], 2)
    with Log(tmp_path, start=0, total=2, batch_size=1) as records:
        plant(kind, tmp_path / "metrics.jsonl", precious)  # once more, after the file was taken up
        records.record(1, {"loss": 1.0})
        records.record(2, {"loss": 1.0})
    assert caplog.text.count("metrics are not written any more") == 1
    assert precious.read_text() == "mine"


def plant(kind: str, place: Path, target: Path) -> None:
    place.unlink(missing_ok=True)
    if kind == "link":
        place.symlink_to(target)
    else:
        os.mkfifo(place) if kind == "fifo" else place.mkdir()
