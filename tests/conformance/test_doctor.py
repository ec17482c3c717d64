"""`maekit doctor` as users meet it: this installation, peers, files of weights, a model of one's own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maekit.config import resolve
from maekit.conformance import suite
from maekit.conformance.adapter import load_adapter
from maekit.conformance.check import DEVIATES, NOT_SHOWN, OK, audit
from maekit.conformance.own import File, Own
from maekit.conformance.peers import peer
from maekit.errors import MaekitError
from maekit.interchange.weights import save_encoder, save_model
from maekit.model.mae import create_model
from maekit.settings import Doctor
from maekit.tasks.convert import convert
from maekit.tasks.doctor import doctor

AUDIT = (Path(__file__).parents[2] / "docs/audit.md").read_text("utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", AUDIT, re.S)

MODEL = '''
"""A model under the authors' names, for the example."""
import torch
from torch import nn
from maekit.conformance.own import Own


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Own().build(torch.initial_seed())

    def named_parameters(self, *args, **kwargs):
        return iter(Own().tensors(self.inner).items())

    def forward(self, images, noise, mask_ratio):
        out = self.inner(images, mask_ratio, noise=noise)
        return out.loss, out.pred, out.mask, out.ids_restore, out.latent

    def features(self, images):
        return self.inner.features(images, pool="tokens")
'''


def command(*words: str, where: Path, more: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(more)] if more else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "maekit", "doctor", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=where, timeout=300, env=env)


@pytest.mark.slow
def test_this_installation_is_clean() -> None:
    result = doctor(Doctor())
    assert result.exit_code == 0
    assert result.metrics["counts"] == {"ok": len(suite.CHECKS), "deviates": 0, "not shown": 0, "crashed": 0}


def test_the_command_prints_a_table_and_exits_with_0_when_all_is_right(tmp_path: Path) -> None:
    done = command("--only", "positions-encoder", "loss", "target-variance", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ok +target-variance +unbiased$", done.stdout, re.M)
    assert done.stdout.rstrip().endswith("3 checks: 3 ok")


def test_your_own_model_by_the_example_of_the_docs(tmp_path: Path) -> None:
    (tmp_path / "my_mae.py").write_text(MODEL)
    (tmp_path / "mine.py").write_text(EXAMPLE)
    names = (
        "init-qkv",
        "positions-decoder",
        "mask-noise",
        "encoder",
        "decoder",
        "loss",
        "features-unmasked",
        "layer-decay",
    )
    done = command("--module", "mine:Adapter", "--json", "--only", *names, where=tmp_path, more=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "importing mine: this runs its code" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {record["check"]: record["status"] for record in found["checks"]} == {
        name: NOT_SHOWN if name == "layer-decay" else OK for name in names
    }
    keys = {"check", "status", "found", "expected", "title", "tolerance", "reason", "consequence", "source", "rows"}
    assert all(set(record) == keys for record in found["checks"])


def test_a_model_that_deviates_ends_with_exit_code_1_and_says_what_it_means(tmp_path: Path) -> None:
    (tmp_path / "my_mae.py").write_text(MODEL)
    (tmp_path / "mine.py").write_text(EXAMPLE + (
        "\n    def tensors(self, model):\n"
        "        found = dict(model.named_parameters())\n"
        "        found['decoder_pos_embed'].data.zero_()\n"
        "        return found\n"
    ))  # fmt: skip
    done = command("--module", "mine:Adapter", "--only", "positions-decoder", "predictions-differ", where=tmp_path,
                   more=tmp_path)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert re.search(r"^deviates +positions-decoder +all zero", done.stdout, re.M)
    assert re.search(r"^ +means +zeros, frozen", done.stdout, re.M)
    assert "D1, D2" in done.stdout


@pytest.mark.parametrize(
    ("code", "place", "says"),
    [
        ("E-USAGE-MODULE", "nowhere", "package.module:factory"),
        ("E-USAGE-MODULE", "no_such_module:Adapter", "no module no_such_module"),
        ("E-USAGE-MODULE", "json:Adapter", "no function or class Adapter"),
        ("E-USAGE-ADAPTER", "collections:Counter", "no build, no tensors, no forward, no features"),
    ],
)
def test_a_module_that_is_no_adapter_is_one_line(code: str, place: str, says: str) -> None:
    with pytest.raises(MaekitError) as caught:
        load_adapter(place)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_a_package_that_the_module_wants_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wanting.py").write_text("import no_such_package_xyz\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MaekitError, match="pip install no_such_package_xyz") as caught:
        load_adapter("wanting:Adapter")
    assert caught.value.code == "E-ENV-IMPORT"


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("E-CONFIG-PEER", {"model": "transfomers:vit-mae-base"}),
        ("E-CONFIG-PEER", {"model": "lightly:base"}),
        ("E-CONFIG-MODEL", {"model": "transformers:vit-mae-bas"}),
        ("E-CONFIG-MODEL", {"model": "timm:no_such_model"}),
        ("E-CONFIG-CHECK", {"only": ["positions-encodr"]}),
        ("E-CKPT-MISSING", {"checkpoint": Path("nowhere")}),
    ],
)
def test_what_is_not_there_is_one_line(code: str, settings: dict[str, Any]) -> None:
    with pytest.raises(MaekitError) as caught:
        doctor(Doctor(**settings))
    assert caught.value.code == code


def test_two_subjects_are_one_too_many() -> None:
    with pytest.raises(MaekitError) as caught:
        resolve(Doctor, flags={"model": "lightly", "module": "a:b"})
    assert caught.value.code == "E-CONFIG-BOTH"


def test_a_library_that_is_missing_is_one_line_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(MaekitError, match="pip install lightly") as caught:
        peer("lightly")
    assert (caught.value.code, caught.value.exit_code) == ("E-ENV-IMPORT", 5)


def test_weights_of_a_file_are_asked_what_trained_weights_can_answer(tmp_path: Path) -> None:
    model = Own().build(0)
    with torch.no_grad():
        model.encoder.blocks[0].mlp.fc1.weight.mul_(2)  # type: ignore[union-attr]
    save_model(model, tmp_path / "right.safetensors")
    result = doctor(Doctor(checkpoint=tmp_path / "right.safetensors"))
    assert result.exit_code == 0, result.text
    model.decoder.pos_embed.data.zero_()
    save_model(model, tmp_path / "blank.safetensors")
    found = {f.check.name: f.status for f in audit(File(tmp_path / "blank.safetensors"), suite.OF_A_FILE)}
    assert {name for name, status in found.items() if status == DEVIATES} == {"positions-decoder", "predictions-differ"}


@pytest.mark.parametrize("to", ["official", "transformers"])
def test_a_file_of_another_library_is_audited_as_well(tmp_path: Path, to: str) -> None:
    save_model(Own().build(0), tmp_path / "ours.safetensors")
    theirs = tmp_path / ("theirs.pth" if to == "official" else "theirs")
    convert({"src": tmp_path / "ours.safetensors", "dst": theirs, "to": to})
    result = doctor({"checkpoint": theirs})
    assert result.exit_code == 0, result.text


def test_a_file_without_decoder_is_not_judged_by_one_that_was_drawn(tmp_path: Path) -> None:
    save_encoder(Own().build(0), tmp_path / "encoder.safetensors")
    found = {f.check.name: f for f in audit(File(tmp_path / "encoder.safetensors"), suite.OF_A_FILE)}
    assert found["encoder"].status == OK
    for name in ("positions-decoder", "decoder", "predictions-differ", "positions-resized"):
        assert found[name].status == NOT_SHOWN, name


def test_a_grid_that_is_not_square_is_read_off_the_file(tmp_path: Path) -> None:
    wide = create_model("vit_tiny_patch16_224", img_size=(32, 64), patch_size=8, depth=1, decoder_dim=64,
                        decoder_depth=1, decoder_heads=4)  # fmt: skip
    save_model(wide, tmp_path / "wide.safetensors")
    result = doctor(Doctor(checkpoint=tmp_path / "wide.safetensors"))
    assert result.exit_code == 0, result.text


PEERS: dict[str, dict[str, str]] = {
    "transformers:vit-mae-base": {
        "positions-decoder": DEVIATES, "init-mask-token": DEVIATES, "norm-eps": DEVIATES, "init-linear": DEVIATES,
    },
    "lightly": {
        "layer-decay": DEVIATES, "drop-path": DEVIATES, "finetune-groups": DEVIATES, "positions-encoder": OK,
        "init-qkv": OK,
    },
    "timm:vit_base_patch16_224.mae": {"decoder": NOT_SHOWN, "layer-decay": OK, "positions-encoder": DEVIATES},
}  # fmt: skip


@pytest.mark.parametrize("place", PEERS)
def test_an_installed_peer_shows_its_defects_by_running(place: str) -> None:
    pytest.importorskip(place.split(":")[0])
    expected = PEERS[place]
    found = {finding.check.name: finding.status for finding in audit(peer(place), suite.chosen(list(expected)))}
    assert found == expected
