"""Decide every setting from four layers, and say where each value came from.

    default < recipe < config file < flag

A config file is read as text: every plain scalar stays the string that stands there, as on the command line, and the
settings class is the only one that turns text into values. So YAML's traps (``no`` as false, ``010`` as 8, ``1e-4``
as a string, ``1:30`` as 90) cannot happen, and a flag and a file can never disagree about a spelling. Tags and anchors
are refused: a file holds data and nothing else. This module knows no setting by name.
"""

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError
from yaml.error import MarkedYAMLError

from maekit import __version__
from maekit.errors import MaekitError, clean
from maekit.recipes import find, is_known
from maekit.recipes.cited import Cited, Recipe
from maekit.settings import FORMAT, Settings

S = TypeVar("S", bound=Settings)

HEADER = ("format", "verb", "maekit", "resolved")
"""Keys that `dump_yaml` writes beside the settings; a config file may hold them, so that a run's own file is one."""

MAX_BYTES = 100_000
MAX_DEPTH = 8
NOTHING = ("none", "null", "~", "")
"""Spellings of "no value", in any case."""


def resolve(
    cls: type[S],
    *,
    recipe: str | None = None,
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
) -> tuple[S, dict[str, str]]:
    """Return the settings of a verb and the source of each value.

    Of two settings that replace each other (`Settings.one_of`) the one from the higher layer stays.

    Args:
        cls: the verb's settings.
        recipe: a name in `maekit.recipes.RECIPES`, with or without its group; a flag or a line of the file called
            ``recipe`` means the same where this is None.
        file: a YAML file, for example the ``config.yaml`` of a run.
        flags: what the command line says; strings are read as in a file.

    Returns:
        The settings, and for each name ``default``, ``recipe NAME``, ``config FILE`` or ``flag``.

    Raises:
        MaekitError: with every fault of all layers in one line.
    """
    values: dict[str, object] = {}
    sources = dict.fromkeys(cls.model_fields, "default")
    faults: list[_Fault] = []
    for source, layer in _layers(cls, recipe, file, flags or {}):
        faults += _unknown(cls, layer, source) + _both(cls, layer, source) + _code(cls, layer, source)
        for name, value in layer.items():
            if name in cls.model_fields:
                replaced = [*_rivals(cls, name), *cls.takes_along.get(name, ())]
                for rival in replaced if value is not None else ():
                    if layer.get(rival) is None:
                        values[rival], sources[rival] = None, source
                if value is not None or not _beaten(cls, name, layer):
                    values[name], sources[name] = value, source
    settings = _validate(cls, values, sources, faults)
    if settings is None or faults:
        raise _error(faults, cls)
    return settings, sources


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or an empty string where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class _Fault:
    code: str
    what: str
    found: object = None
    expected: str | None = None

    def line(self) -> str:
        facts = [f"found {clean(self.found, 60)}"] if self.found is not None else []
        facts += [f"expected {self.expected}"] if self.expected else []
        return self.what + (f": {', '.join(facts)}" if facts else "")


def _error(faults: list[_Fault], cls: type[Settings]) -> MaekitError:
    """Return one error for all faults."""
    hint = f"maekit {_verb(cls)} --help"
    if len(faults) == 1:
        fault = faults[0]
        return MaekitError(fault.code, fault.what, found=fault.found, expected=fault.expected, hint=hint)
    codes = {fault.code for fault in faults}
    lines = "; ".join(f"({number}) {fault.line()}" for number, fault in enumerate(faults, 1))
    return MaekitError(
        codes.pop() if len(codes) == 1 else "E-CONFIG-SETTINGS",
        f"{len(faults)} faults: {lines}",
        hint=hint,
    )


def _layers(
    cls: type[Settings], recipe: str | None, file: Path | None, flags: Mapping[str, object]
) -> list[tuple[str, dict[str, Any]]]:
    said = {name: _from_text(cls, name, value) for name, value in flags.items()}
    written, is_a_run = _from_file(cls, file) if file is not None else ({}, False)
    # a run's own file holds every value: its recipe is only remembered, where a newer maekit still has it
    if is_a_run and not is_known(str(written.get("recipe"))):
        written["recipe"] = None
    name = recipe or said.get("recipe") or (None if is_a_run else written.get("recipe"))
    layers = [(f"config {file}", written), ("flag", said)]
    if isinstance(name, str):
        name, chosen = _recipe_for(cls, name)
        layers.insert(0, (f"recipe {name}", {"recipe": name} | _decided(cls, chosen)))
        for layer in (written, said):
            layer.pop("recipe", None)
    return layers


def _recipe_for(cls: type[Settings], word: str) -> tuple[str, Recipe[Any]]:
    name, chosen = find(word)
    if not isinstance(chosen.settings, (cls, *cls.takes_recipes_of)):
        raise MaekitError(
            "E-CONFIG-RECIPE",
            f"recipe {name}",
            found=f"a recipe for {_verb(type(chosen.settings))}",
            expected=f"one for {_verb(cls)}",
            hint="maekit recipes",
        )
    return name, chosen


def _decided(cls: type[Settings], chosen: Recipe[Any]) -> dict[str, Any]:
    return {name: getattr(chosen.settings, name) for name in _cited(cls, chosen)}


def _cited(cls: type[Settings], chosen: Recipe[Any]) -> dict[str, Cited]:
    """Return what a recipe decides for this verb: of another verb's only what both have in common."""
    return {name: cited for name, cited in chosen.cited.items() if not cls.takes_only or name in cls.takes_only}


def _from_file(cls: type[Settings], path: Path) -> tuple[dict[str, Any], bool]:
    """Return the settings in a file, and whether it is the config.yaml of a run."""
    values = load_yaml(path)
    header = {key: values.pop(key) for key in HEADER if key in values}
    verb = header.get("verb")
    if verb is not None and verb != _verb(cls):
        raise MaekitError("E-CONFIG-VERB", f"config {path}", found=f"settings of {verb}", expected=f"of {_verb(cls)}")
    return values, "resolved" in header


def _from_text(cls: type[Settings], name: str, value: object) -> object:
    """Read the word none as no value where a setting can be without one."""
    field = cls.model_fields.get(name)
    optional = field is not None and type(None) in typing.get_args(field.annotation)
    return None if optional and isinstance(value, str) and value.lower() in NOTHING else value


def _unknown(cls: type[Settings], layer: Mapping[str, object], source: str) -> list[_Fault]:
    return [
        _Fault("E-CONFIG-KEY", f"{source}: unknown setting {clean(name, 60)!r}{suggest(name, cls.model_fields)}")
        for name in layer
        if name not in cls.model_fields
    ]


def _code(cls: type[Settings], layer: Mapping[str, object], source: str) -> list[_Fault]:
    """Refuse to learn from a file which code to run."""
    named = [name for name in cls.only_flags if layer.get(name) is not None and source != "flag"]
    return [
        _Fault("E-CONFIG-CODE", f"setting {name} ({source})", layer[name], f"--{name} as a flag: it runs code")
        for name in named
    ]


def _both(cls: type[Settings], layer: Mapping[str, object], source: str) -> list[_Fault]:
    given = [[name for name in names if layer.get(name) is not None] for names in cls.one_of]
    return [
        _Fault("E-CONFIG-BOTH", f"settings {' and '.join(names)} ({source})", expected="one of them")
        for names in given
        if len(names) > 1
    ]


def _rivals(cls: type[Settings], name: str) -> list[str]:
    return [rival for names in cls.one_of if name in names for rival in names if rival != name]


def _beaten(cls: type[Settings], name: str, layer: Mapping[str, object]) -> bool:
    """Say whether the same layer sets what replaces `name`."""
    return any(layer.get(rival) is not None for rival in _rivals(cls, name))


def _validate(cls: type[S], values: dict[str, object], sources: Mapping[str, str], faults: list[_Fault]) -> S | None:
    """Build the settings, adding to `faults` what is wrong with them."""
    faults += _wrong_bools(cls, values, sources)
    for names in cls.one_of:  # two of them in one layer are among the faults already
        for extra in [name for name in names if values.get(name) is not None][1:]:
            values[extra] = None
    try:
        settings = cls.model_validate(values)
    except ValidationError as error:
        seen = {fault.what for fault in faults}
        faults += [fault for fault in _explain(cls, error, sources) if fault.what not in seen]
        return None
    for names in cls.one_of:
        needed = any(cls.model_fields[name].default is not None for name in names)
        if needed and all(getattr(settings, name) is None for name in names):
            faults.append(_Fault("E-CONFIG-VALUE", f"settings {' and '.join(names)}", "none", "one of them"))
    return settings


def _wrong_bools(cls: type[Settings], values: Mapping[str, object], sources: Mapping[str, str]) -> list[_Fault]:
    """Refuse true and false given for numbers: pydantic would read them as 1 and 0."""
    return [
        _Fault("E-CONFIG-VALUE", _named(name, sources), value, "a value that is not true or false")
        for name, value in values.items()
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[name].annotation)
    ]


def _named(name: str, sources: Mapping[str, str]) -> str:
    return f"setting {name} ({sources[name]})"


def _explain(cls: type[Settings], error: ValidationError, sources: Mapping[str, str]) -> list[_Fault]:
    """Return one fault per setting; a union that nothing fits lists all that it expected."""
    faults: list[_Fault] = []
    by_name: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_name.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
    for name, details in by_name.items():
        own = details[0].get("ctx", {}).get("error")
        if isinstance(own, MaekitError):
            faults.append(_Fault(own.code, str(own.args[0])))
        elif name not in cls.model_fields:
            faults.append(_Fault("E-CONFIG-VALUE", clean(details[0]["msg"].removeprefix("Value error, "))))
        else:
            expected = " or ".join(dict.fromkeys(_plain(detail["msg"]) for detail in details))
            found = details[0]["input"] if len(details) == 1 else _input(details)
            faults.append(_Fault("E-CONFIG-VALUE", _named(name, sources), repr(found), expected))
    return faults


def _input(details: list[Any]) -> object:
    """Return what was given: of several complaints the one about the whole value, if there is one."""
    return min(details, key=lambda detail: len(detail["loc"]))["input"]


def _plain(message: str) -> str:
    """Return what pydantic expected, in its words: ``a valid number``, ``less than 1``."""
    message = re.sub(r"^(Input should be|Value error,|(Tuple|List) should have) ", "", message)
    return re.sub(r"(, (unable to|got a number|but got)| after validation,).*$", "", message)


def _verb(cls: type[Settings]) -> str:
    return cls.__name__.lower()


# ------------------------------------------------------------------------------------------------ what differs


@dataclass(frozen=True)
class Deviation:
    """A setting that is not what its recipe says.

    Attributes:
        name: of the setting.
        source: who published the recipe's value: ``paper T8``.
        theirs: the recipe's value, in JSON's types.
        yours: the value used; ``steps 40`` where another setting has taken its place.
    """

    name: str
    source: str
    theirs: Any
    yours: Any

    def __str__(self) -> str:
        return f"{self.name} {self.source} {spell(self.theirs)}, yours {spell(self.yours)}"


def deviations(recipe: str, settings: Settings) -> list[Deviation]:
    """Return what differs in `settings` from the recipe, of all that the recipe decides.

    Raises:
        MaekitError: E-CONFIG-RECIPE for an unknown name or a recipe of another verb.
    """
    _, chosen = _recipe_for(type(settings), recipe)
    theirs, mine = chosen.settings.model_dump(mode="json"), settings.model_dump(mode="json")
    return [
        Deviation(name, cited.source, theirs[name], _in_place_of(name, type(settings), mine))
        for name, cited in _cited(type(settings), chosen).items()
        if mine[name] != theirs[name]
    ]


def _in_place_of(name: str, cls: type[Settings], values: Mapping[str, Any]) -> Any:
    """Return the value of a setting, or name and value of the rival that stands in for it."""
    given = [rival for rival in _rivals(cls, name) if values[rival] is not None]
    return f"{given[0]} {spell(values[given[0]])}" if values[name] is None and given else values[name]


def differences(one: Settings, other: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ between two settings of a verb, in JSON's types, by name.

    Their names are left out: ``recipe`` and ``out`` say which settings they are, not what they are.

    Raises:
        MaekitError: E-CONFIG-VERB for settings of two verbs.
    """
    if type(one) is not type(other):
        raise MaekitError(
            "E-CONFIG-VERB",
            "two sets of settings",
            found=f"those of {_verb(type(one))} and of {_verb(type(other))}",
            expected="two of the same verb",
            hint="maekit recipes shows the verb of each",
        )
    mine, theirs = one.model_dump(mode="json"), other.model_dump(mode="json")
    return {
        name: (mine[name], theirs[name])
        for name in mine
        if name not in ("recipe", "out") and mine[name] != theirs[name]
    }


def origins(settings: Settings, sources: Mapping[str, str]) -> dict[str, str]:
    """Return a line on each setting: who published it, what others say, and the value used where it differs.

    As in ``paper T8``, ``paper T9: 0.001; repo: 0.0005``, ``paper T8: 0.00015; yours: 0.001 (flag)``, ``default``.
    """
    if settings.recipe is None:
        return dict(sources)
    _, chosen = _recipe_for(type(settings), settings.recipe)
    theirs = chosen.settings.model_dump(mode="json")
    decided = _cited(type(settings), chosen)
    lines = {name: _published(cited, theirs[name]) for name, cited in decided.items()}
    for found in deviations(settings.recipe, settings):
        if not decided[found.name].others:
            lines[found.name] += f": {spell(found.theirs)}"
        lines[found.name] += f"; yours: {spell(found.yours)} ({sources[found.name]})"
    return {name: lines.get(name, source) for name, source in sources.items()}


def _published(cited: Cited, value: Any) -> str:
    if not cited.others:
        return cited.source
    return "; ".join(f"{source}: {spell(said)}" for source, said in {cited.source: value, **cited.others}.items())


def spell(value: object) -> str:
    """Return a value as people write it on a command line: ``0.9 0.95``, ``none``, ``1600``."""
    if isinstance(value, list | tuple):
        return " ".join(map(spell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return "none" if value is None else str(value)


# ---------------------------------------------------------------------------------------------------- YAML


class _Text(yaml.BaseLoader):
    """YAML in which a plain scalar is text or nothing, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise ConstructorError(None, None, "a key is not a word", key.start_mark)
            if name in seen:
                raise ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Text` reads: the word none is quoted, as null already is; a list stands on one line."""


_NOTHING_TAG = "tag:yaml.org,2002:null"
_NOTHING_WORD = re.compile(r"^(none|null|~|)$", re.IGNORECASE)
_LIST_TAG = "tag:yaml.org,2002:seq"
_Text.add_implicit_resolver(_NOTHING_TAG, _NOTHING_WORD, None)
_Text.add_constructor(_NOTHING_TAG, lambda loader, node: None)
_Dumper.add_implicit_resolver(_NOTHING_TAG, _NOTHING_WORD, None)
_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence(_LIST_TAG, value, flow_style=True))


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the settings and header keys of a config file; values are text, nothing, lists or mappings of them.

    Raises:
        MaekitError: E-CONFIG-FILE for a file that cannot be read, E-CONFIG-YAML for one that is no plain mapping,
            E-CONFIG-FORMAT for one of a newer maekit.
    """
    text = _read(path)
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_Text)
    except yaml.YAMLError as error:
        raise MaekitError("E-CONFIG-YAML", f"config {path}", found=_where(error), expected="plain YAML") from error
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise MaekitError("E-CONFIG-YAML", f"config {path}", found=found, expected="lines such as 'mask_ratio: 0.75'")
    _check_format(value.get("format"), path)
    return value


def dump_yaml(settings: Settings, extra: Mapping[str, object] | None = None) -> str:
    """Return settings as the text of a config file; `extra` stands under the key ``resolved``, for people and resume.

    `load_yaml` and `resolve` read it back to equal settings.
    """
    header: dict[str, object] = {"format": FORMAT, "verb": _verb(type(settings)), "maekit": __version__}
    values = header | settings.model_dump(mode="json") | ({"resolved": dict(extra)} if extra else {})
    return "".join(_dump_line(name, value) for name, value in values.items())


def explain_yaml(settings: Settings, sources: Mapping[str, str]) -> str:
    """Return settings as the text of a config file, in the groups of the help, with the source of each value."""
    lines = {name: _dump_line(name, value)[:-1] for name, value in settings.model_dump(mode="json").items()}
    width = min(44, max(map(len, lines.values())))
    text = f"format: {FORMAT}\nverb: {_verb(type(settings))}\n" + (lines["recipe"] + "\n" if settings.recipe else "")
    for title, names in groups(type(settings)).items():
        text += f"\n# {title}\n" + "".join(f"{lines[name]:<{width}}  # {clean(sources[name])}\n" for name in names)
    return text


def groups(cls: type[Settings]) -> dict[str, list[str]]:
    """Return the names of a verb's settings by the title of the class that declares them, its own first."""
    found: dict[str, list[str]] = {}
    bases = [base for base in cls.__mro__ if issubclass(base, Settings) and base is not Settings]
    for base in bases:
        title = _verb(cls).capitalize() if base is cls else (base.__doc__ or "").partition("\n")[0].rstrip(".")
        above = bases[bases.index(base) + 1 :]
        for name in base.__annotations__:
            if name in cls.model_fields and not any(name in other.__annotations__ for other in above):
                found.setdefault(title, []).append(name)
    return found


def _dump_line(name: str, value: object) -> str:
    return yaml.dump({name: value}, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, width=10**6)


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            found = "no regular file" if path.exists() else "no such file"
            raise MaekitError("E-CONFIG-FILE", f"config {path}", found=found, expected="a YAML file")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, MaekitError):
            raise
        raise MaekitError("E-CONFIG-FILE", f"config {path}", found=error) from error
    if len(raw) > MAX_BYTES:
        raise MaekitError("E-CONFIG-FILE", f"config {path}", expected=f"at most {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MaekitError("E-CONFIG-YAML", f"config {path}", found=error.reason, expected="UTF-8 text") from error


def _check_events(text: str) -> None:
    """Refuse tags, anchors and depth before anything is built from them."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        faults = {
            "an anchor or alias": getattr(event, "anchor", None),
            "a tag": getattr(event, "tag", None),
            f"more than {MAX_DEPTH} levels": depth > MAX_DEPTH,
        }
        for fault in (fault for fault, there in faults.items() if there):
            raise MarkedYAMLError(problem=fault, problem_mark=event.start_mark)


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} in line {mark.line + 1}" if mark is not None else problem


def _check_format(found: object, path: Path) -> None:
    if found is None:
        return
    if not (isinstance(found, str) and found.isdecimal() and int(found) <= FORMAT):
        raise MaekitError(
            "E-CONFIG-FORMAT",
            f"config {path}",
            found=f"format {found}",
            expected=f"at most {FORMAT}",
            hint="a newer maekit",
        )
