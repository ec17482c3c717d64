"""The house: who may import whom, no cycles, no print, every setting read, every recipe valid, nothing left lying."""

import ast
import re
import subprocess
import sys
import sysconfig
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import maekit
from maekit import recipes, settings
from maekit.cli import VERBS
from maekit.config import resolve
from maekit.errors import MaekitError

REPO = Path(__file__).parents[1]
SRC = REPO / "src" / "maekit"
FILES = sorted(SRC.rglob("*.py"))

ROOMS = {"data", "model", "train"}
# What each part of the house may import, beside itself. The parts stand in the order in which they rest on each other.
DOORS: dict[str, set[str]] = {
    "errors": set(),
    "seeds": {"errors"},
    "failpoints": {"errors"},
    "disk": set(),
    "signals": set(),
    "floors": {"errors"},
    "settings": {"errors"},
    "recipes": {"errors", "settings"},
    "config": {"__init__", "errors", "settings", "recipes"},
    "data": {"errors", "settings", "seeds", "failpoints", "disk"},
    "model": {"errors", "settings", "seeds"},
    "train": {"errors", "settings", "seeds", "signals", "failpoints", "disk"},
    "scores": {"__init__", "errors", "settings", "seeds", "data", "model"},
    "interchange": {"__init__", "errors", "settings", "seeds", "disk", "config", *ROOMS},
    "report": {"__init__", "errors", "settings", "seeds", "disk", "config", *ROOMS, "scores"},
    "conformance": {"__init__", "errors", "settings", "seeds", "recipes", "config", *ROOMS, "scores", "interchange"},
    "soak": {"__init__", "errors", "settings", "seeds", "failpoints", "config", *ROOMS, "interchange"},
    "bench": {"__init__", "errors", "settings", "seeds", "config", *ROOMS, "conformance"},
    "tasks": {
        "__init__",
        "bench",
        "soak",
        "errors",
        "settings",
        "seeds",
        "signals",
        "failpoints",
        "disk",
        "recipes",
        "config",
        *ROOMS,
        "scores",
        "report",
        "interchange",
        "conformance",
    },
    "cli": {"__init__", "errors", "floors", "signals", "settings", "recipes", "config", "tasks"},
    "__main__": {"cli"},
    "zygote": {"cli", "failpoints"},
}


def module(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path): path for path in FILES}


def part(name: str) -> str:
    """Return the room or file right under the package that a module belongs to."""
    return name.split(".")[1] if "." in name else "__init__"


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Return the package's modules that a file imports; types alone do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {_home(name) for name in found if name.split(".")[0] == "maekit"}


def _home(name: str) -> str:
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_its_part_of_the_house_may(name: str) -> None:
    if name == "maekit":
        return
    here = part(name)
    assert here in DOORS, f"{here}: a new part of the house needs a line in DOORS"
    wrong = {other for other in imports(MODULES[name]) if part(other) not in DOORS[here] | {here}}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: imports(path, everywhere=False) - {name} for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_only_the_front_door_and_the_report_print(name: str) -> None:
    if part(name) in ("cli", "report"):
        return
    calls = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "misc", "helpers", "helper", "common", "manager", "tools"}
    assert not [str(path) for path in FILES + sorted(REPO.glob("tests/**/*.py")) if path.stem in drawers]


def test_every_setting_is_read_somewhere() -> None:
    read: set[str] = set()
    for path in FILES:
        if path.name == "settings.py" or "recipes" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    unread = {
        f"{verb}: {name}" for verb, entry in VERBS.items() for name in entry.settings.model_fields if name not in read
    }
    assert not unread


def test_every_setting_has_a_line_of_help_and_says_what_resume_makes_of_it() -> None:
    for entry in VERBS.values():
        for name, info in entry.settings.model_fields.items():
            assert info.description, name
            assert isinstance(info.json_schema_extra, dict)
            assert info.json_schema_extra["resume"] in ("same", "free"), name


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_builds_validates_and_is_described(name: str) -> None:
    entry = next(entry for entry in recipes.describe() if entry.name == name)
    chosen, sources = resolve(VERBS[entry.verb].settings, recipe=name)
    assert f"recipe {name}" in sources.values()
    built = recipes.RECIPES[name]().settings
    assert {field: getattr(chosen, field) for field in built.model_fields_set} == built.model_dump(exclude_unset=True)
    assert all([entry.purpose, entry.source, entry.cost, entry.expect])
    assert name.split("/")[1].startswith((entry.verb, "scratch"))


@pytest.mark.parametrize("name", [n for n in recipes.RECIPES if "/probe" not in n and n[:4] != "own/"])
def test_every_recipe_has_patches_that_fill_the_image_and_heads_that_divide_the_width(name: str) -> None:
    built = recipes.RECIPES[name]().settings
    assert isinstance(built, settings.Pretrain | settings.Finetune)
    assert built.img_size is not None
    in_name = re.search(r"patch(\d+)", built.model or "")
    assert in_name is not None
    patch = built.patch_size or int(in_name[1])
    assert [side % patch for side in built.img_size] == [0, 0]
    if built.embed_dim and built.num_heads:
        assert built.embed_dim % built.num_heads == 0
    if isinstance(built, settings.Pretrain):
        assert built.decoder_dim % built.decoder_heads == 0


def test_recipes_that_belong_together_have_the_same_encoder() -> None:
    for pretrain, finetune in (
        ("builtin/pretrain-fashion", "builtin/finetune-fashion"),
        ("small/pretrain-32", "small/finetune-32"),
    ):
        one, other = recipes.RECIPES[pretrain]().settings, recipes.RECIPES[finetune]().settings
        for name in (*settings.Architecture.model_fields, "img_size", "channels"):
            assert getattr(one, name) == getattr(other, name), name


def test_the_public_api_is_what_it_says_and_loads() -> None:
    for name in maekit.__all__:
        assert getattr(maekit, name) is not None, name
    assert set(maekit.__all__) == set(dir(maekit))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        maekit.nothing  # noqa: B018
    assert maekit.MaekitError is MaekitError


def test_no_file_names_a_machine_or_an_index() -> None:
    # spelled in pieces, so that this file does not name them either
    banned = [
        "/wo" + "rk/",
        "/tm" + "p/w/",
        "/ro" + "ot/",
        "pypi" + ".org",
        "pytho" + "nhosted",
        "index" + "-url",
        "trusted" + "-host",
    ]
    files = [
        REPO / name
        for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run", "README.md", "CONTRIBUTING.md")
    ]
    files += (
        FILES
        + sorted(REPO.glob("tests/**/*.py"))
        + sorted(REPO.glob("docs/**/*.md"))
        + sorted(REPO.glob("scripts/**/*"))
    )
    found = [(str(path), word) for path in files if path.is_file() for word in banned if word in path.read_text()]
    assert not found


def test_makefile_help_lists_every_target() -> None:
    text = (REPO / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    shown = subprocess.run(["make", "-C", str(REPO), "help"], capture_output=True, text=True, check=True).stdout
    assert {"help", "install", "quickstart", "test", "test-slow", "lint", "types", "format", "build", "clean"} <= set(
        targets
    )
    for target in set(targets) - {"test", "quickstart"}:
        assert f"make {target} " in shown


def test_make_names_what_is_missing(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((REPO / name).read_bytes())
    run = subprocess.run(["make", "-C", str(tmp_path), "install", "PYTHON=nowhere"], capture_output=True, text=True)
    assert run.returncode != 0
    assert "python3-venv" in run.stderr
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    bare.chmod(0o755)
    run = subprocess.run(["make", "-C", str(tmp_path), "install", f"PYTHON={bare}"], capture_output=True, text=True)
    assert run.returncode != 0
    assert "apt-get install python3-venv" in run.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_the_wheel_holds_everything_and_its_command_runs_in_an_empty_environment(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(REPO)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("maekit-*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {path.relative_to(SRC.parent).as_posix() for path in SRC.rglob("*") if path.is_file()}
    inside = {name for name in inside if "__pycache__" not in name}
    assert not inside - names
    assert any(name.endswith(".parquet") for name in names)
    assert any(name.endswith("LICENSE") for name in names)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(tmp_path / "env")}))
    # without torch and the rest: what the command itself rests on is enough for --version and --help
    install = [str(scripts / "python"), "-m", "pip", "install", "--quiet", "-c", str(REPO / "constraints.txt")]
    subprocess.run([*install, "pydantic", "pyyaml"], check=True, capture_output=True)
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, capture_output=True)
    for words in (["--version"], ["pretrain", "--help"], ["recipes", "--json"]):
        run = subprocess.run([str(scripts / "maekit"), *words], capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    assert run.stdout.startswith('{"recipes"')
