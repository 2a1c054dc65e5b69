"""From YAML and overrides to a validated section, with every complaint as one sentence.

YAML here is the JSON-like core of YAML 1.2: `5e-5` is a number and `no` a word (YAML 1.1, PyYAML's default, has them
the other way round), and a key that stands twice is an error instead of the last one winning.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from hymba_align import secrets
from hymba_align.errors import RecipeError

KeyPath = tuple[str, ...]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


SectionType = TypeVar("SectionType", bound=Section)


class _CoreLoader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  as in the base class


class _CoreDumper(yaml.SafeDumper):
    """A safe dumper that quotes whatever YAML 1.1 or 1.2 would take for something other than a word."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text with line breaks (Unicode's too) in double quotes: read back from any other style they become spaces."""
        style = '"' if len(data.splitlines()) > 1 or data != data.rstrip("\n\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_CoreDumper.add_representer(str, _CoreDumper.represent_str)

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
    _CoreDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


@dataclass
class _Source:
    """Plain values, and for each key path the place that a complaint about it should name."""

    name: str
    kind: str = "recipe"
    """What its keys are keys of"""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where `path`, or else its nearest enclosing section, was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML of plain values, tuples as lists, in the order given; `load_section` reads the same values back."""
    return yaml.dump(values, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=120)


def load_section(
    section: type[SectionType],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    prefix: str = "",
    *,
    what: str = "the recipe",
    keys: str = "name, base",
) -> SectionType:
    """A validated `section` from a YAML file (None: from nothing) and `key.path=value` overrides.

    `prefix` stands before key paths in messages, for a section that is part of a recipe; `what` the file is, and some of
    its `keys`, are told where it is no mapping at all.

    Raises:
        RecipeError: the file is missing or not YAML, or a key or value is invalid.
    """
    source = _read(Path(path), what, keys) if path is not None else _Source("overrides")
    secrets.remember(source.values)  # before anything about them can be said
    for override in overrides:
        _apply_override(section, source, override, prefix)
    secrets.remember(source.values)
    try:
        text = json.dumps(source.values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{source.name}: {error}; write plain numbers, words, lists and sections") from error
    try:
        # Through JSON, because strict validation of Python values refuses a list for a tuple.
        return section.model_validate_json(text)
    except ValidationError as error:
        raise RecipeError(_complaint(section, source, error, prefix)) from None


def _read(path: Path, what: str, keys: str) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such {what.removeprefix('the ')} file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; name a recipe file in it{_nearest_file(path / '*')}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {what} cannot be read: {error}") from error
    source = _Source(str(path), what.removeprefix("the "))
    values = _parse(text, source)
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: {what} is {_shown(values)}; it must be a mapping with the keys {keys}, ...")
    source.values = values
    return source


def _nearest_file(path: Path) -> str:
    """The beginning of a hint: recipe files in the same folder, where there are any."""
    found = sorted(str(file) for file in path.parent.glob("*.yaml"))[:3]
    return f"; there is {', '.join(found)}" if found else ""


def _parse(text: str, source: _Source, at: KeyPath = (), place: str | None = None) -> Any:
    """The value of a YAML text; the places of its keys go into `source`, below the path `at`."""
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        value = _build(loader, node, source, at, place) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place or (f"{source.name}:{mark.line + 1}" if mark else source.name)
        remedy = _remedy(error, text) if place is None else ""
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}{remedy}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{place or source.name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{place or source.name}: a YAML alias refers to itself; remove it") from None
    finally:
        loader.dispose()
    return value


def _remedy(error: yaml.MarkedYAMLError, text: str) -> str:
    """A hint on what to correct in a file, with its semicolon; empty where the cause is not plain."""
    problem, opened = error.problem or "", error.context_mark
    if error.problem_mark is None:
        return ""
    if "found character '\\t'" in problem:
        return "; indent with spaces, not with tabs"
    lines, here = text.splitlines(), error.problem_mark.line
    above = [number for number, line in enumerate(lines[:here]) if line.strip() and not line.strip().startswith("#")]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    deeper = bool(above) and here < len(lines) and indents[here] > indents[above[-1]]
    if above and (re.fullmatch(r"expected <block end>, but found '(<block \w+ start>|-)'", problem) or deeper):
        return f"; check the indentation of lines {above[-1] + 1} and {here + 1}"
    if problem == "mapping values are not allowed here" and above and ":" not in lines[above[-1]]:
        return f"; put a colon behind the key in line {above[-1] + 1}"
    if problem == "mapping values are not allowed here":
        return "; put a value that holds a colon and a space in quotes"
    if opened is not None and problem == "could not find expected ':'":
        return f"; put a colon behind the key in line {opened.line + 1}"
    if opened is not None and error.context == "while scanning a quoted scalar":
        return f"; close the quotes that open in line {opened.line + 1}"
    if opened is not None and error.context in ("while parsing a flow sequence", "while parsing a flow mapping"):
        return f"; close the bracket that opens in line {opened.line + 1}"
    return ""


def _build(loader: _CoreLoader, node: yaml.Node, source: _Source, path: KeyPath, place: str | None) -> Any:
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        return loader.construct_object(node)  # a scalar; other tags (!!python/...) are refused here
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, source, (*path, str(i)), place) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen and key != "<<":
            where = place or f"{source.name}:{line}"
            dotted = ".".join((*path, key))
            raise RecipeError(f"{where}: {dotted} stands twice, first in line {seen[key]}; remove one of them")
        seen[key] = line
    loader.flatten_mapping(node)
    mapping = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        source.places[(*path, key)] = place or f"{source.name}:{key_node.start_mark.line + 1}"
        mapping[key] = _build(loader, value_node, source, (*path, key), place)
    return mapping


def _apply_override(section: type[BaseModel], source: _Source, override: str, prefix: str) -> None:
    place = f"override '{override}'"
    dotted, equals, text = override.partition("=")
    path = tuple(dotted.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(f"{place} is not of the form key.path=value, for instance sft.max_length=1024")
    _check_path(section, path, place, prefix)
    values = source.values
    for depth, key in enumerate(path[:-1], start=1):
        child = values.get(key)
        if child is None:
            child = values[key] = {}
        elif not isinstance(child, dict):
            above = prefix + ".".join(path[:depth])
            raise RecipeError(f"{place}: {above} is {_shown(child)}, which has no keys; override {above} itself")
        values = child
    source.places = {known: where for known, where in source.places.items() if known[: len(path)] != path}
    source.places[path] = place
    value = _parse(text, source, path, place)
    secrets.remember({path[-1]: value} if "storage_options" not in path else {"storage_options": {path[-1]: value}})
    values[path[-1]] = value


def _check_path(section: type[BaseModel], path: KeyPath, place: str, prefix: str) -> None:
    """Raises RecipeError where the schema has no such key; below a free mapping (`trainer`, `config`) all are valid."""
    before: type[BaseModel] | None = None
    inner: type[BaseModel] | None = section
    for depth, key in enumerate(path):
        above = prefix + ".".join(path[:depth])
        if depth and before is not None and _is_list(before, path[depth - 1]):
            item = f"{{{next(iter(inner.model_fields))}: ...}}" if inner is not None else "value"
            raise RecipeError(f"{place}: {above} is a list and is given whole, as in {above}=[{item}, ...]")
        if inner is None:
            raise RecipeError(f"{place}: {above} is a value and has no keys; write {above}=value")
        if key not in inner.model_fields:
            raise RecipeError(f"{place}: {_unknown_key(section, path[: depth + 1], prefix, 'recipe')}")
        before = inner
        inner, free = _section_below(inner, key)
        if free:
            return


def _is_list(section: type[BaseModel], key: str) -> bool:
    """Whether the field `key` holds a list."""
    annotation = section.model_fields[key].annotation
    return any(get_origin(choice) in (tuple, list) for choice in (annotation, *get_args(annotation)))


def _section_below(section: type[BaseModel], key: str) -> tuple[type[BaseModel] | None, bool]:
    """The section that the field `key` holds, if any, and whether it is a free mapping instead."""
    annotation = section.model_fields[key].annotation
    choices = get_args(annotation) or (annotation,)
    for choice in (annotation, *choices):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice, False
        if getattr(choice, "__origin__", None) is dict:
            return None, True
    return None, False


def _key_paths(section: type[BaseModel], above: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key path of a section, depth first."""
    for key in section.model_fields:
        yield (*above, key)
        inner, _ = _section_below(section, key)
        if inner is not None:
            yield from _key_paths(inner, (*above, key))


def _unknown_key(section: type[BaseModel], path: KeyPath, prefix: str, kind: str) -> str:
    """A sentence about an unknown key: the nearest key of the same section, or else of the whole schema."""
    known = [".".join(candidate) for candidate in _key_paths(section)]
    above = ".".join(key for key in path[:-1] if not key.isdigit())  # an item of a list has the keys of its kind
    siblings = [dotted for dotted in known if dotted.rpartition(".")[0] == above]
    unknown = ".".join(path)
    near = difflib.get_close_matches(path[-1], [dotted.rpartition(".")[2] for dotted in siblings], n=1)
    if near:
        hint = f"the nearest is {prefix}{'.'.join((*path[:-1], near[0]))}"
    else:
        outermost_first = sorted(known, key=lambda dotted: dotted.count("."))
        same_name = [dotted for dotted in outermost_first if dotted.rpartition(".")[2] == path[-1]]
        same_name.sort(key=lambda dotted: dotted.count("."))
        anywhere = same_name or difflib.get_close_matches(unknown, known, n=1, cutoff=0.75)
        valid = ", ".join(dotted.rpartition(".")[2] for dotted in siblings)
        elsewhere = anywhere and anywhere[0] != above  # the section it stands in is no help
        hint = f"the nearest is {prefix}{anywhere[0]}" if elsewhere else f"valid here: {valid}"
    return f"{prefix}{unknown} is not a key of a {kind}; {hint}"


def _complaint(section: type[BaseModel], source: _Source, error: ValidationError, prefix: str) -> str:
    """The first problem as one sentence, and how many more there are."""
    problems = error.errors(include_url=False)
    # A list with a wrong item is also reported as too short.
    problems = [one for one in problems if not any(_inside(other["loc"], one["loc"]) for other in problems)]
    # An unknown key is often the cause of another problem (a required key misspelt), so it comes first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first, more = problems[0], len(problems) - 1
    path = tuple(str(part) for part in first["loc"])
    rest = f" ({more} more problem{'s' if more > 1 else ''} in this {source.kind})" if more else ""
    return f"{source.place(path)}: {_problem(section, first, path, prefix, source.kind)}{rest}"


def _inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _problem(section: type[BaseModel], error: ErrorDetails, path: KeyPath, prefix: str, kind: str) -> str:
    dotted = prefix + ".".join(path)
    if secrets.is_secret(path):
        error = {**error, "input": secrets.MASK}
    message = re.sub(r"^(Input|Value) should ", "must ", error["msg"])
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(section, path, prefix, kind)
        case "missing":
            return f"{dotted} is missing; add it"
        case "value_error":
            reason = error["msg"].removeprefix("Value error, ")
            return f"{dotted}: {reason}" if path else reason
        case "model_type":
            return f"{dotted} is {_shown(error['input'])}; it must be a section with keys of its own"
        case "list_type" | "tuple_type":
            item = error["input"] if isinstance(error["input"], str) else "a, b"
            return f"{dotted} is {_shown(error['input'])}; it must be a list, such as [{item}]"
        case "string_pattern_mismatch" if dotted == "name":
            return f"{dotted} is {_shown(error['input'])}; use letters, digits, '.', '_' and '-', with a letter or digit first"
        case "string_pattern_mismatch" if path and path[-1] == "convert":
            return f"{dotted} is {_shown(error['input'])}; write MODULE:FUNCTION, such as my_data:to_messages"
        case "string_type" if not isinstance(error["input"], (dict, list)):
            return f"{dotted} is {_shown(error['input'])}; it must be a string, so put it in quotes"
    nearest = _nearest_choice(error)
    return f"{dotted} is {_shown(error['input'])}; it {message}{nearest}"


def _nearest_choice(error: ErrorDetails) -> str:
    choices = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
    if error["type"] != "literal_error" or len(choices) < 2:
        return ""
    near = difflib.get_close_matches(str(error["input"]), choices, n=1)
    return f"; the nearest is '{near[0]}'" if near else ""


def _shown(value: Any) -> str:
    """A value as a message shows it: like YAML, and not endless."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
