"""A user's own converter: a function, named in the recipe, that turns a row into rows of a known schema.

    convert: my_package.my_module:to_messages

It is called with one row (a dict) and returns a row of any schema of schemas.py, a list of such rows (or yields them)
where one row becomes several, or None to pass the row over. The recipe's `columns` and `roles` apply to what it returns.
It runs in several processes at once and its results are cached, so that they may depend on nothing but the row and the
source code of its module, of the user's modules that it imports, and of this package.

It is the one way in which a recipe runs code, so each is named on the terminal, with its file, before it is imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import multiprocessing
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from hymba_align.data.reading.json_text import SHOWN, kind
from hymba_align.errors import ConverterError, DataError
from hymba_align.secrets import redact
from hymba_align.terminal import print_words

THIS_PACKAGE = __name__.partition(".")[0]  # whose code has a digest of its own
_named: set[tuple[str, str]] = set()  # converters that this process has named aloud, and their files
_loaded_from: dict[str, str] = {}  # converters' modules that this process has imported, and their source's digest then


@dataclass(frozen=True)
class Converter:
    """A user's function; calling it gives the rows that a row becomes, none where the function returns None."""

    name: str
    function: Callable[[dict[str, Any]], Any]

    def __call__(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Raises: DataError naming the function, where it fails or returns something else than rows."""
        try:
            result = self.function(dict(row))
            if isinstance(result, Iterable) and not isinstance(result, (Mapping, str, bytes)):
                result = list(result)  # a generator's errors are the function's own
        except (Exception, SystemExit) as error:  # a user's code may raise anything, and may call sys.exit
            raise ConverterError(
                f"the converter {self.name} failed with {_short(error)}; correct it, or let it return None for rows that "
                "it cannot use"
            ) from error
        rows = [] if result is None else result if isinstance(result, list) else [result]
        for converted in rows:
            if not isinstance(converted, Mapping):
                raise ConverterError(
                    f"the converter {self.name} returned {kind(result)}"
                    + (f" with {kind(converted)} in it" if converted is not result else "")
                    + "; let it return a row (a dict), a list of rows, or None"
                )
        return [dict(converted) for converted in rows]

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, so that another process imports the function as this one did."""
        return load_converter, (self.name,)


def load_converter(name: str) -> Converter:
    """The function `package.module:name`, from the installed packages or else from below the current directory.

    A function whose source has changed since this process imported it is imported anew.
    Raises: DataError where it cannot be imported or is no function.
    """
    module, _ = _current_module(name)
    attribute = name.partition(":")[2]
    function = getattr(module, attribute, None)
    if function is None:
        raise ConverterError(
            f"convert is {name}, and {module.__name__} ({module.__file__}) has no {attribute!r}; name a function of it"
        )
    if not callable(function):
        raise ConverterError(f"convert is {name}, which is {kind(function)} and no function; name a function")
    return Converter(name, function)


def converter_digest(name: str) -> str:
    """A sha256 of the converter's module and of the user's modules that it imports, directly or not.

    The user's are those of the same package and all that lie outside of installed libraries, wherever Python finds
    them. What is imported in other ways than by an `import` statement, or read from files, is not seen.
    Raises: DataError where the converter's module cannot be imported.
    """
    return hashlib.sha256(f"{name}\0{_current_module(name)[1]}".encode()).hexdigest()


def _current_module(name: str) -> tuple[ModuleType, str]:
    """The converter's module as its source is now, and the digest of that source."""
    module = _import(name)
    digest = _digest(module)
    if _loaded_from.setdefault(module.__name__, digest) != digest:
        for changed, _ in _module_files(module):
            sys.modules.pop(changed, None)
        module = _import(name)
        _loaded_from[module.__name__] = digest
    return module, digest


def _digest(module: ModuleType) -> str:
    digest = hashlib.sha256()
    for key, path in sorted(_module_files(module)):
        content = path.read_bytes()
        digest.update(f"\0{key}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _import(name: str) -> ModuleType:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConverterError(f"convert is {name!r}; write it as package.module:function")
    here = os.getcwd()
    importlib.invalidate_caches()
    _name_aloud(name, module_name, attribute)
    try:
        return _import_from_source(module_name)
    except ModuleNotFoundError as error:
        if here in sys.path:
            raise _import_error(name, error) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything, and may call sys.exit
        raise _import_error(name, error) from error
    # Last, so that a user's file cannot take the place of a library; it stays, for what the converter imports later.
    sys.path.append(here)
    try:
        return _import_from_source(module_name)
    except (Exception, SystemExit) as error:
        sys.path.remove(here)
        raise _import_error(name, error) from error


def _name_aloud(name: str, module: str, function: str) -> None:
    """Prints which code is about to run, once per process and file; processes that another one started leave it to that.

    Raises: DataError for Python's own modules: what they do with a row is decided by the row.
    """
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ConverterError(
            f"convert is {name}, and {module.partition('.')[0]} is a part of Python and no converter; name a function of a "
            "module of your own"
        )
    file = _origin(module)
    if file is None or (name, file) in _named:
        return  # or importing it will say that it is not there
    _named.add((name, file))
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        from hymba_align.data.inspection.preview import visible

        print_words(f"convert runs code: {function} of the module {module}, from {visible(file)}")


def _origin(module: str) -> str | None:
    """The file that importing a module, by `_import`, would run; found without running anything."""
    specs: dict[str, ModuleSpec | None] = {}
    if _spec(module.partition(".")[0], specs) is None:
        top = module.partition(".")[0]
        specs[top] = PathFinder.find_spec(top, [os.getcwd()])
    spec = _spec(module, specs)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ())
    return spec.origin if spec.origin not in (None, "namespace") else (places[0] if places else None)


def _import_from_source(module_name: str) -> ModuleType:
    """Imports without writing bytecode, which Python takes for current if the source changes within the same second."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return importlib.import_module(module_name)
    finally:
        sys.dont_write_bytecode = before


def _import_error(name: str, error: BaseException) -> DataError:
    return ConverterError(
        f"convert is {name}, and importing {name.partition(':')[0]} failed with {_short(error)}; run from the folder that "
        "holds it, or install it"
    )


def _short(error: BaseException) -> str:
    text = redact(str(error).strip().split("\n")[0].rstrip("."))
    text = text if len(text) <= 3 * SHOWN else text[: 3 * SHOWN] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _module_files(module: ModuleType) -> list[tuple[str, Path]]:
    """The modules whose source decides what the converter does, with their files."""
    own = module.__name__.partition(".")[0]
    specs: dict[str, ModuleSpec | None] = {}
    found: dict[str, Path] = {}
    waiting = [module.__name__]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in found or top == THIS_PACKAGE:
            continue
        path = _file_of(name, specs)
        if path is None or (top != own and _is_library(path)):
            continue
        found[name] = path
        waiting += _parents(name)
        waiting += _imported(path.read_bytes(), name if path.name == "__init__.py" else name.rpartition(".")[0])
    return list(found.items())


def _file_of(name: str, specs: dict[str, ModuleSpec | None]) -> Path | None:
    """The source file of a module that can be imported; None for a name of something else."""
    origin = getattr(_spec(name, specs), "origin", None)
    return Path(origin).resolve() if origin and origin.endswith(".py") else None


def _spec(name: str, specs: dict[str, ModuleSpec | None]) -> ModuleSpec | None:
    """Where Python finds a module; unlike `importlib.util.find_spec` it does not import the packages that hold it."""
    if name not in specs:
        parent = name.rpartition(".")[0]
        try:
            if not parent:
                specs[name] = importlib.util.find_spec(name)
            else:
                folders = getattr(_spec(parent, specs), "submodule_search_locations", None)
                specs[name] = PathFinder.find_spec(name, list(folders)) if folders else None
        except (ImportError, ValueError):  # of a name that can be no module, or a module without a file
            specs[name] = None
    return specs[name]


def _is_library(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package, whose versions are not the converter's concern."""
    standard = (Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib"))
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or any(map(path.is_relative_to, standard))


def _parents(name: str) -> Iterator[str]:
    """The packages that hold a module: importing it runs them."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Names that may be modules, of all import statements anywhere in a source; `package` is what "." means in it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # its bytes count all the same
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                yield from _parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base
            yield from _parents(base)
            for alias in node.names:
                yield f"{base}.{alias.name}"
