"""The front door: ``maekit VERB``. It reads the line, calls one task, prints what came out; it decides nothing.

The flags of a verb are its settings (`maekit.settings`), so this file names none of them. What a flag says stays text
until `maekit.config.resolve` judges it together with recipe and config file. Results go to stdout, everything else to
stderr. torch is imported by the tasks, so help, recipes and config answer at once, with or without torch installed.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from pydantic.fields import FieldInfo

from maekit import __version__, config, floors, recipes, settings, signals
from maekit.errors import MaekitError, clean
from maekit.recipes import cost, tables
from maekit.tasks import Result

log = logging.getLogger("maekit")

CRASHED, SYSTEM, INTERRUPTED, CLOSED = 1, 5, 130, 141
"""Exit codes of what is no `MaekitError`: a fault of ours, of the machine, ctrl-C, a reader that left."""


class Verb(NamedTuple):
    """A verb: its settings, the module and function of its task, two lines that show it."""

    settings: type[settings.Settings]
    module: str
    function: str
    examples: tuple[str, str]


VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        settings.Quickstart,
        "maekit.tasks.quickstart",
        "quickstart",
        ("maekit quickstart", "maekit quickstart --data my_photos --minutes 30"),
    ),
    "pretrain": Verb(
        settings.Pretrain,
        "maekit.tasks.pretrain",
        "pretrain",
        (
            "maekit pretrain --recipe builtin/pretrain-fashion --out runs/fashion",
            "maekit pretrain --data my_photos --out runs/a --epochs 100 --batch-size 256",
        ),
    ),
    "pca": Verb(
        settings.Pca,
        "maekit.tasks.pca",
        "pca",
        (
            "maekit pca --data my_photos --out runs/pca",
            "maekit pca --recipe small/pretrain-32 --data my_photos --components 24 --out runs/pca",
        ),
    ),
    "tokenizer": Verb(
        settings.Tokenizer,
        "maekit.tasks.tokenizer",
        "tokenizer",
        (
            "maekit tokenizer --recipe small/pretrain-32 --data my_photos --out runs/tokenizer",
            "maekit tokenizer --data my_photos --vocabulary 1024 --epochs 50 --out runs/tokenizer",
        ),
    ),
    "finetune": Verb(
        settings.Finetune,
        "maekit.tasks.finetune",
        "finetune",
        (
            "maekit finetune runs/a --data my_classes --labels 10/class --out runs/b",
            "maekit finetune --from-scratch --data my.csv --task regression --label-column age",
        ),
    ),
    "partial": Verb(
        settings.Partial,
        "maekit.tasks.partial",
        "partial",
        (
            "maekit partial runs/a --data my_classes --out runs/d",
            "maekit partial runs/a --data my_classes --tune-blocks 0 1 4 all --epochs 50 --json",
        ),
    ),
    "probe": Verb(
        settings.Probe,
        "maekit.tasks.probe",
        "probe",
        (
            "maekit probe runs/a --data my_classes",
            "maekit probe runs/a --data my_classes --layers all --pool mean,cls",
        ),
    ),
    "knn": Verb(
        settings.Knn,
        "maekit.tasks.knn",
        "knn",
        (
            "maekit knn runs/a --data my_classes",
            "maekit knn runs/a --data my_classes --k 1,5,20 --json",
        ),
    ),
    "lowshot": Verb(
        settings.Lowshot,
        "maekit.tasks.lowshot",
        "lowshot",
        ("maekit lowshot runs/a --data my_classes", "maekit lowshot runs/a --data my_classes --shots 1,5 --draws 100"),
    ),
    "retrieve": Verb(
        settings.Retrieve,
        "maekit.tasks.retrieve",
        "retrieve",
        ("maekit retrieve runs/a --data my_photos", "maekit retrieve runs/a --data my_photos --k 10 --out pictures"),
    ),
    "predict": Verb(
        settings.Predict,
        "maekit.tasks.predict",
        "predict",
        (
            "maekit predict runs/b --data my_photos --out predictions.parquet",
            "maekit predict runs/b --data my_photos --out predictions.csv --grid predictions.png",
        ),
    ),
    "robustness": Verb(
        settings.Robustness,
        "maekit.tasks.robustness",
        "robustness",
        (
            "maekit robustness runs/b --data my_classes --out runs/b-corrupted",
            "maekit robustness runs/b --data imagenet-a --protocol in-a --out runs/b-on-a",
        ),
    ),
    "evaluate": Verb(
        settings.Evaluate,
        "maekit.tasks.evaluate",
        "evaluate",
        (
            "maekit evaluate runs/a runs/b --data my_classes --out runs/table",
            "maekit evaluate mae=runs/a0 mae=runs/a1 --data my_classes --suite full --labels 1%,10%",
        ),
    ),
    "ablate": Verb(
        settings.Ablate,
        "maekit.tasks.ablate",
        "ablate",
        (
            "maekit ablate fig5-mask-ratio --data my_classes --dry-run",
            "maekit ablate table1d --data my_classes --seeds 3 --jobs 2 --out runs/targets",
        ),
    ),
    "compare": Verb(
        settings.Compare,
        "maekit.tasks.compare",
        "compare",
        ("maekit compare runs/b runs/c", "maekit compare runs/b0,runs/b1 runs/c0,runs/c1 --out runs/b-c"),
    ),
    "reconstruct": Verb(
        settings.Reconstruct,
        "maekit.tasks.reconstruct",
        "reconstruct",
        (
            "maekit reconstruct runs/a cat.jpg dog.jpg --out pictures",
            "maekit reconstruct runs/a --data my_photos --ratios 50 75 90 --out pictures",
        ),
    ),
    "gallery": Verb(
        settings.Gallery,
        "maekit.tasks.gallery",
        "gallery",
        (
            "maekit gallery runs/a --data my_photos --out pictures",
            "maekit gallery runs/a runs/b --data my_photos --only beside,failures --count 12",
        ),
    ),
    "embed": Verb(
        settings.Embed,
        "maekit.tasks.embed",
        "embed",
        (
            "maekit embed runs/a --data my_photos --out features.parquet",
            "maekit embed runs/a --data my_photos --pool tokens --out features.npy",
        ),
    ),
    "data": Verb(
        settings.Data, "maekit.tasks.data", "run", ("maekit data my_photos", "maekit data builtin:fashion --json")
    ),
    "pack": Verb(
        settings.Pack,
        "maekit.tasks.pack",
        "pack",
        (
            "maekit pack my_photos --out packed",
            "maekit pack my_small_images --format raw --short-side 32 --square --out packed",
        ),
    ),
    "convert": Verb(
        settings.Convert,
        "maekit.tasks.convert",
        "convert",
        (
            "maekit convert runs/a vit-timm --to timm",
            "maekit convert mae_pretrain_vit_base_full.pth mae-hf --to transformers --target pixel",
        ),
    ),
    "ckpt": Verb(
        settings.Ckpt,
        "maekit.tasks.ckpt",
        "ckpt",
        ("maekit ckpt list runs/a", "maekit ckpt prune runs/a --keep 1 --keep-every 1000 --dry-run"),
    ),
    "soak": Verb(
        settings.Soak,
        "maekit.tasks.soak",
        "soak",
        ("maekit soak --minutes 60", "maekit soak --minutes 5 --kinds kill,errno --seed 7 --json"),
    ),
    "bench": Verb(
        settings.Bench,
        "maekit.tasks.bench",
        "bench",
        (
            "maekit bench train --recipe builtin/pretrain-fashion",
            "maekit bench train --model vit_base_patch16_224 --vs transformers --json",
        ),
    ),
    "inspect": Verb(
        settings.Inspect,
        "maekit.tasks.inspect",
        "inspect",
        ("maekit inspect mae_pretrain_vit_base.pth", "maekit inspect runs/a --json"),
    ),
    "replay": Verb(
        settings.Replay,
        "maekit.tasks.replay",
        "replay",
        ("maekit replay runs/a/replay/step-120.safetensors", "maekit replay runs/a/replay/step-120.safetensors --json"),
    ),
    "doctor": Verb(
        settings.Doctor,
        "maekit.tasks.doctor",
        "doctor",
        ("maekit doctor", "maekit doctor --model transformers:vit-mae-base --json"),
    ),
}


@dataclass(frozen=True)
class Line:
    """What a command line says."""

    flags: dict[str, object]
    recipe: str | None
    config: Path | None


def command() -> NoReturn:
    """Be the process of a command: once its exit code is known, a signal to stop it changes that no more."""
    signals.of_command()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after ``maekit``; those of the process by default.
    """
    words = [clean_word(word) for word in (sys.argv[1:] if argv is None else argv)]
    options = words[: words.index("--")] if "--" in words else words
    as_json, debug = "--json" in options, "--debug" in options
    with _messages_on_stderr(debug):
        try:
            code = _print_result(_done(words), as_json)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            return _close_stdout()
        except Exception as error:
            return _report(error, as_json, debug)
        except KeyboardInterrupt:
            _say("maekit: interrupted")
            return INTERRUPTED
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else CRASHED


def clean_word(word: str) -> str:
    """Return a flag as this program spells it: ``--mask_ratio=0.5`` is ``--mask-ratio=0.5``."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--\w[\w-]*", name) else word


def _done(words: list[str]) -> Result:
    """Run; what it came to is decided then, and a signal that comes while it is printed changes it no more."""
    try:
        return _run(words)
    finally:
        signals.settled()


def _run(words: list[str]) -> Result:
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        return Result({}, _overview())
    if first in ("-V", "--version"):
        return Result({"version": __version__}, f"maekit {__version__}")
    if first == "recipes":
        return _recipes(words[1:])
    if first == "config":
        return _config(words[1:])
    verb = _known(first)
    line = _parse(verb, words[1:])
    chosen, _ = config.resolve(VERBS[verb].settings, recipe=line.recipe, file=line.config, flags=line.flags)
    floors.check()
    return getattr(import_module(VERBS[verb].module), VERBS[verb].function)(chosen)


def _known(verb: str) -> str:
    if verb in VERBS:
        return verb
    near = config.suggest(verb, [*VERBS, "recipes", "config"])
    raise MaekitError("E-USAGE-VERB", f"unknown verb {clean(verb, 60)!r}{near}", hint="maekit --help")


# ------------------------------------------------------------------------------------------ reading the line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MaekitError("E-USAGE-FLAG", message, hint=f"{self.prog} --help")


class _Wrapped(argparse.HelpFormatter):
    """Help between 60 and 100 columns, whatever the terminal says of itself."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(max(shutil.get_terminal_size().columns, 60), 100) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def _parse(verb: str, words: list[str], *, prog: str = "") -> Line:
    """Read the flags of a verb, and what stands without a flag, as text."""
    cls = VERBS[verb].settings
    rest = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    parser = _parser(verb, prog or f"maekit {verb}")
    known, extra = parser.parse_known_args(words)
    said = vars(known)
    _refuse_unknown([word for word in extra if _is_flag(word)], parser)
    free = [word for word in extra if not _is_flag(word)]
    flags = {name: value for name, value in said.items() if name in cls.model_fields}
    for name, value in flags.items():
        length = _length(cls.model_fields[name])
        if length and len(value) > length:  # ``--img-size 28 28 RUN``
            flags[name], free = value[:length], value[length:] + free
    flags |= _in_order(cls, free + rest, flags, parser.prog)
    return Line(flags, said.get("--recipe"), said.get("--config"))


def _is_flag(word: str) -> bool:
    return word.startswith(("-", "–", "—", "−")) and len(word) > 1  # noqa: RUF001


def _refuse_unknown(flags: list[str], parser: argparse.ArgumentParser) -> None:
    """Name every flag that the verb has not; typographic dashes come from text that was copied."""
    if not flags:
        return
    known = [option for action in parser._actions for option in action.option_strings]
    faults = []
    for flag in flags:
        name = "--" + re.sub(r"^\W+", "", flag).partition("=")[0].replace("_", "-")
        faults.append(f"unknown flag {clean(flag, 60)!r}{config.suggest(name, known)}")
    raise MaekitError("E-USAGE-FLAG", "; ".join(faults), hint=f"{parser.prog} --help")


def _in_order(
    cls: type[settings.Settings], free: list[str], flags: Mapping[str, object], prog: str
) -> dict[str, object]:
    """Give the words that stand without a flag to the settings that take them, in order."""
    found: dict[str, object] = {}
    words = list(free)
    for name in cls.positional:
        if words and name not in flags:
            info = cls.model_fields[name]
            many = typing.get_origin(info.annotation) is list and not _at_commas(info)
            found[name], words = (words, []) if many else (words[0], words[1:])
    if words:
        raise MaekitError("E-USAGE-WORD", f"unexpected word {clean(words[0], 60)!r}", hint=f"{prog} --help")
    return found


def _parser(verb: str, prog: str) -> argparse.ArgumentParser:
    """Build the parser of a verb from its settings, in the groups that declare them."""
    cls, examples = VERBS[verb].settings, VERBS[verb].examples
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *(f"[{_metavar(cls, name)}]" for name in cls.positional), "[--setting VALUE ...]"]),
        description=cls.__doc__,
        epilog="examples:\n  " + "\n  ".join(examples),
        formatter_class=_Wrapped,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, names in config.groups(cls).items():
        group = parser.add_argument_group(title)
        for name in names:
            _add(group, cls, name)
    group = parser.add_argument_group("Command")
    group.add_argument("--recipe", dest="--recipe", metavar="NAME", help="a named run, see maekit recipes")
    group.add_argument("--config", dest="--config", metavar="FILE", type=Path, help="settings from a YAML file")
    group.add_argument("--json", dest="--json", action="store_true", help="last line of stdout: one JSON object")
    group.add_argument("--debug", dest="--debug", action="store_true", help="tracebacks and details")
    group.add_argument("-h", "--help", action=_Help, nargs=0, help="this text")
    return parser


class _Help(argparse.Action):
    """Print help with `print`, so that a closed pipe is noticed in `main`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(parser.format_help(), end="", flush=True)
        parser.exit()


def _add(group: Any, cls: type[settings.Settings], name: str) -> None:
    info = cls.model_fields[name]
    text = (info.description or "").replace("%%", "%")
    if name in cls.positional:
        text += f" (or {_metavar(cls, name)} without the flag)"
    if info.default is not None and info.default != [] and "default:" not in text:
        text += f" [{config.spell(info.default)}]"
    options: dict[str, Any] = {"dest": name, "help": text.replace("%", "%%")}
    flag = "--" + name.replace("_", "-")
    if bool in _parts(info.annotation):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        group.add_argument(flag, metavar=_metavar(cls, name), nargs=_count(info), **options)


def _count(info: FieldInfo) -> str | int | None:
    """Return how many words a flag takes: as many as a tuple has, any number for a list, otherwise one."""
    if _at_commas(info):
        return None
    if any(typing.get_origin(part) is list for part in _parts(info.annotation)):
        return "+"
    # a pair that a validator completes may also be given as one number
    completed = "BeforeValidator" in f"{info.annotation}{info.metadata}"
    return "+" if _length(info) and completed else _length(info)


def _at_commas(info: FieldInfo) -> bool:
    """Tell whether several values are one word: 1,5,20."""
    return "_at_commas" in f"{info.annotation}{info.metadata}"


def _length(info: FieldInfo) -> int | None:
    """Return how many values a tuple has, None for anything else."""
    sizes = [len(typing.get_args(part)) for part in _parts(info.annotation) if typing.get_origin(part) is tuple]
    return sizes[0] if sizes else None


def _parts(annotation: Any) -> list[Any]:
    """Return the members of a union without their annotations."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [part for member in typing.get_args(annotation) for part in _parts(member)]
    return [annotation]


def _metavar(cls: type[settings.Settings], name: str) -> str:
    words: list[str] = []
    for part in _parts(cls.model_fields[name].annotation):
        inner = [_parts(one)[0] for one in typing.get_args(part)] or [part]
        if typing.get_origin(part) is Literal:
            words += map(str, inner)
        else:
            words += ["N" if inner[0] is int else "X"] * (inner[0] in (int, float))
    if not words and name not in cls.positional and Path in _parts(cls.model_fields[name].annotation):
        return "PATH"
    return "|".join(dict.fromkeys(words)) or name.rpartition("_")[2].upper()


# --------------------------------------------------------------------------------- verbs that need no task


def _overview() -> str:
    verbs = {verb: (entry.settings.__doc__ or "").partition("\n")[0] for verb, entry in VERBS.items()}
    verbs |= {"recipes": "List the named runs, or show one with the source of each value."}
    verbs |= {"config": "Show settings and sources; tell two runs or recipes apart."}
    return "\n".join(
        [
            "usage: maekit VERB [--setting VALUE ...]",
            "",
            "Masked autoencoders: from a folder of images to an encoder and its scores.",
            "",
            "verbs:",
            *(f"  {verb:<12} {text}" for verb, text in verbs.items()),
            "",
            "All take --help, --json and --debug; those with settings also --recipe NAME and",
            "--config FILE.yaml. A value is decided by: default < recipe < file < flag.",
            "",
            "examples:",
            *(f"  {line}" for line in VERBS["quickstart"].examples),
        ]
    )


RECIPES_HELP = """usage: maekit recipes [WORD] [--json]
       maekit recipes show NAME [--config FILE] [--setting VALUE ...] [--json]

List the named runs, or those with WORD in their name; of a table of the paper its
rows, with the paper's figures and GPU-hours. Take one with --recipe; the group before
the first slash may be left out. maekit ablate runs a whole table.
show: every value of one, who published it, and what settings beside the name change
of it. The output is a config file.

examples:
  maekit recipes
  maekit recipes paper/finetune
  maekit recipes table1a
  maekit recipes show finetune-vit-b16-paper
  maekit recipes show pretrain-vit-b16 --base-lr 1e-3"""

CONFIG_HELP = """usage: maekit config show RUN
       maekit config show --verb VERB [--recipe NAME] [--config FILE]
                          [--setting VALUE ...]
       maekit config diff A B

show: the settings of a run, or those that a command line would have, as YAML with
the source of each value. The output is a config file.
diff: what differs between A and B (not counting --out). Each is a run folder, a config
file or a recipe. Exit code 0: nothing does, 1: something does.

examples:
  maekit config show runs/a
  maekit config show --verb pretrain --recipe pretrain-vit-b16 --mask-ratio 0.6
  maekit config diff finetune-vit-b16-paper finetune-vit-b16-repo
  maekit config diff runs/a runs/b"""


def _recipes(words: list[str]) -> Result:
    if "-h" in words or "--help" in words:
        return Result({}, RECIPES_HELP)
    if words[:1] == ["show"]:
        return _recipe(words[1:])
    wanted = _only_words(words, "maekit recipes", at_most=1)
    entries = [entry for entry in recipes.describe() if all(word in entry.name for word in wanted)]
    found = [table for name, table in tables.TABLES.items() if all(word in f"paper/{name}" for word in wanted)]
    if not entries and not found:
        recipes.find(wanted[0])  # refused, with the nearest name
    rows = {table.name: _rows(table) for table in found} if wanted else {}
    shown = [
        *map(_described, entries),
        *(_tabled(table, rows.get(table.name) if len(found) == 1 else None) for table in found),
    ]
    metrics: dict[str, object] = {"recipes": [asdict(entry) for entry in entries]}
    metrics["tables"] = [
        {
            "name": table.name,
            "title": table.title,
            "source": table.source,
            "rows": rows.get(table.name, [row.name for row in table.rows]),
        }
        for table in found
    ]
    return Result(metrics, "\n\n".join(shown))


def _rows(table: tables.Table) -> list[dict[str, object]]:
    """Return what is known of each row: figures of the paper, and GPU-hours where it can be trained."""
    return [
        {
            "name": row.name, "label": row.label, "paper": dict(row.paper), "refused": row.refused,
            "gpu_hours": {} if row.refused or table.refused else tables.hours(table, row), "note": row.note,
        }
        for row in table.rows
    ]  # fmt: skip


def _tabled(table: tables.Table, rows: list[dict[str, Any]] | None) -> str:
    """Return a line on a table and the names of its rows, or its rows themselves."""
    verb = "no training of its own" if table.refused else "maekit ablate"
    head = f"paper/{table.name}/ROW   ({verb})\n  {table.title}.\n  source: {table.source}"
    if rows is None:
        names = [row.name for row in table.rows]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return f"{head}\n  rows:   {', '.join(names[:10])}{more}"
    measures = list(dict.fromkeys(measure for row in rows for measure in row["paper"]))
    lines = [
        [
            "row",
            "",
            *(f"{measure} (paper)" for measure in measures),
            "command" if table.refused else f"{cost.GPU}-hours",
        ]
    ]
    for row in rows:
        figures = [f"{row['paper'][measure]:g}" if measure in row["paper"] else "-" for measure in measures]
        hours = " + ".join(f"{hours:,.0f} {verb}" for verb, hours in row["gpu_hours"].items())
        lines.append([row["name"], row["label"], *figures, hours or row["refused"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    notes = [f"  {row['name']}: {row['note']}" for row in rows if row["note"]]
    estimate = (
        f"  hours: estimated from operations at {cost.MFU:.0%} of {cost.GPU_FLOPS / 1e12:g} TFLOP/s, on the images of "
        "ImageNet-1K"
    )
    return "\n".join([head, *told, *notes, *([] if table.refused else [estimate])])


def _described(entry: recipes.Entry) -> str:
    return (
        f"{entry.name}   (maekit {entry.verb})\n"
        f"  {entry.purpose}.\n  source: {entry.source}\n  cost:   {entry.cost}\n  expect: {entry.expect}"
    )


def _recipe(words: list[str]) -> Result:
    """Show one recipe as a config file, with the source of each value and what the words after its name change."""
    if not words or _is_flag(words[0]):
        raise MaekitError("E-USAGE-WORD", "maekit recipes show", expected="a name first", hint="maekit recipes")
    name, _ = recipes.find(words[0])
    entry = recipes.entry(name)
    line = _parse(entry.verb, words[1:], prog=f"maekit recipes show {name}")
    if line.recipe is not None:
        raise MaekitError("E-USAGE-FLAG", "maekit recipes show", found=f"{words[0]} and --recipe", expected="one name")
    shown = _shown(entry.verb, Line(line.flags, name, line.config))
    head = "".join(f"# {part}\n" for part in _described(entry).splitlines())
    return Result({"recipe": asdict(entry), **shown.metrics}, head + shown.text)


def _config(words: list[str]) -> Result:
    if not words or words[0] in ("-h", "--help") or words[1:2] in (["-h"], ["--help"]):
        return Result({}, CONFIG_HELP)
    if words[0] == "diff":
        return _diff(words[1:])
    if words[0] != "show":
        near = config.suggest(words[0], ["show", "diff"])
        what = f"maekit config: unexpected word {clean(words[0], 60)!r}{near}"
        raise MaekitError("E-USAGE-WORD", what, expected="show or diff", hint="maekit config --help")
    words = [part for word in words[1:] for part in (word.split("=", 1) if word.startswith("--verb=") else [word])]
    if "--verb" not in words:
        return _stored(_only_words(words, "maekit config show", at_most=1))
    at = words.index("--verb")
    verb = words[at + 1] if at + 1 < len(words) else "--verb"
    if verb in ("recipes", "config"):
        raise MaekitError("E-USAGE-VERB", f"maekit config show --verb {verb}", found="a verb without settings")
    verb = _known(verb)
    return _shown(verb, _parse(verb, words[:at] + words[at + 2 :], prog=f"maekit config show --verb {verb}"))


def _shown(verb: str, line: Line) -> Result:
    """Return the settings of a command line as YAML, with the source of each value."""
    chosen, sources = config.resolve(VERBS[verb].settings, recipe=line.recipe, file=line.config, flags=line.flags)
    origins = config.origins(chosen, sources)
    found = config.deviations(chosen.recipe, chosen) if chosen.recipe else []
    metrics: dict[str, object] = {"settings": chosen.model_dump(mode="json"), "sources": sources, "origins": origins}
    metrics["deviations"] = [asdict(deviation) for deviation in found]
    return Result(metrics, config.explain_yaml(chosen, origins).rstrip())


def _diff(words: list[str]) -> Result:
    """Compare two runs, config files or recipes: exit code 1 where something differs."""
    words = _only_words(words, "maekit config diff", at_most=2)
    if len(words) < 2:
        what = "a run folder, a config file or a recipe, twice"
        raise MaekitError("E-USAGE-WORD", "maekit config diff", expected=what, hint="maekit config --help")
    one, other = map(_side, words)
    found = config.differences(one, other)
    rows = [["", *words]] + [[name, *map(config.spell, pair)] for name, pair in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    metrics: dict[str, object] = {"a": words[0], "b": words[1], "differences": found}
    return Result(metrics, "\n".join(lines) if found else "no differences", exit_code=int(bool(found)))


def _side(word: str) -> settings.Settings:
    """Return the settings of a run folder, a config file or a recipe."""
    path = Path(word)
    if not path.exists():
        with contextlib.suppress(MaekitError):
            return recipes.find(word)[1].settings
        what = f"no run, config file or recipe {clean(word, 60)!r}{recipes.nearest(word)}"
        raise MaekitError("E-CONFIG-RECIPE", what, hint="maekit recipes, or the path of a run")
    path = path / "config.yaml" if path.is_dir() else path
    verb = config.load_yaml(path).get("verb")
    if verb not in VERBS:
        raise MaekitError("E-CONFIG-VERB", f"config {path}", found=verb, expected="a line such as 'verb: pretrain'")
    return config.resolve(VERBS[verb].settings, file=path)[0]


def _stored(words: list[str]) -> Result:
    """Return the config.yaml of a run."""
    if not words:
        raise MaekitError("E-USAGE-WORD", "maekit config show", expected="RUN or --verb", hint="maekit config --help")
    path = Path(words[0])
    path = path / "config.yaml" if path.is_dir() else path
    values = config.load_yaml(path)
    return Result({"settings": values}, path.read_text("utf-8-sig").rstrip())


def _only_words(words: list[str], prog: str, at_most: int) -> list[str]:
    """Return the words of a verb without settings; it has no flags but those of every verb."""
    words = [word for word in words if word not in ("--json", "--debug")]
    wrong = [word for word in words if _is_flag(word)] + words[at_most:]
    if wrong:
        near = config.suggest(wrong[0], ["--json", "--debug", "--help", "--verb"])
        what = f"{prog}: unexpected word {clean(wrong[0], 60)!r}{near}"
        raise MaekitError("E-USAGE-WORD", what, hint=f"{prog.partition(' show')[0]} --help")
    return words


# ------------------------------------------------------------------------------------------------ what goes out


def plain(value: object) -> object:
    """Return `value` in JSON's own types; NaN and infinity, which JSON has not, become null."""
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    tolist = getattr(value, "tolist", None)  # arrays and tensors, also those of no dimension
    return plain(tolist()) if callable(tolist) else str(value)


def _print_result(result: Result, as_json: bool) -> int:
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
        text = json.dumps(plain(result.metrics), allow_nan=False) if as_json else result.text
        if text:
            print(text)
    return result.exit_code


def _report(error: Exception, as_json: bool, debug: bool) -> int:
    """Print one line for an error, and its JSON object, and return the exit code."""
    if debug:
        _say("".join(traceback.format_exception(error)).rstrip())
    code, line, exit_code = _judge(error, debug)
    _say(f"maekit: {line}")
    with contextlib.suppress(OSError, ValueError):
        if as_json:
            print(json.dumps({"error": code, "message": line, "exit_code": exit_code}))
        sys.stdout.flush()
        return exit_code
    _close_stdout()
    return exit_code


def _judge(error: Exception, debug: bool) -> tuple[str, str, int]:
    """Return code, line and exit code: of ours as they are, of the machine as E-ENV, of anything else as a bug."""
    if isinstance(error, MaekitError):
        return error.code, str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("maekit"):
        missing = MaekitError("E-ENV-IMPORT", f"package {error.name} is not installed", hint="pip install maekit")
        return missing.code, str(missing), missing.exit_code
    code, exit_code = ("E-ENV-SYSTEM", SYSTEM) if isinstance(error, OSError) else ("E-BUG", CRASHED)
    more = "" if debug else ". Try: --debug shows the traceback"
    return code, f"error[{code}]: {type(error).__name__}: {clean(error, 400)}{more}", exit_code


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _close_stdout() -> int:
    """Point stdout at nothing, so that the interpreter does not complain again when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = clean(super().format(record), 1000) if not record.exc_info else super().format(record)
        return line if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {line}"


class _Once(logging.Filter):
    """Lets a skipped image be named once in a command, whoever meets it: the look before, training, pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.named: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.getMessage()
        if not line.startswith("skipped: "):
            return True
        known = line in self.named
        self.named.add(line)
        return not known


@contextlib.contextmanager
def _messages_on_stderr(debug: bool) -> Iterator[None]:
    """Show the package's messages on stderr while a command runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format())
    handler.addFilter(_Once())
    before = log.level
    log.addHandler(handler)
    quiet = os.environ.get("RANK", "0") != "0"  # under torchrun one process speaks
    log.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
