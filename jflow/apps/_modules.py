"""A config file as a module, which may import the files beside it.

Its folder is not put on sys.path, where a file of another config's folder could have the same name:
the config is a package of a name of its own, and what it imports from its folder are modules of
that package.
"""

import ast
import builtins
import importlib
import importlib.util
import sys
import uuid
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

PREFIX = "jflow_config_"
STORED = "config_imports"  # beside the config of a workdir: copies of what it imports


def load_module(path: Path) -> ModuleType:
    """Run a config file as a module of a new name. Nothing is left beside it (no __pycache__).

    Raises ImportError, naming the file, where it imports what is not there.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    importlib.invalidate_caches()  # its folder may have files that were written a moment ago
    module = ModuleType(PREFIX + uuid.uuid4().hex)
    module.__file__, module.__package__, module.__path__ = (
        str(path),
        module.__name__,
        [str(folder_of(path))],
    )
    module.__dict__["__builtins__"] = {
        **builtins.__dict__,
        "__import__": _import_of(module.__name__, folder_of(path)),
    }
    sys.modules[module.__name__] = (
        module  # where dataclasses, and so Linen modules, look their annotations up
    )
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except ImportError as error:
        raise ImportError(f"{path}: {error}", name=error.name) from error
    return module


def folder_of(path: Path) -> Path:
    """Where a config looks for the files that it imports: its folder, or what a workdir keeps of
    it."""
    path = path.absolute()
    return path.parent / STORED if (path.parent / STORED).is_dir() else path.parent


def files_beside(path: Path) -> dict[str, bytes]:
    """The Python files of its folder that a config imports, and that these import, by their paths
    from there."""
    folder, found, waiting = folder_of(path), {}, [path.read_bytes()]
    while waiting:
        for head in _imported(waiting.pop()):
            spec = _beside(head, folder)
            whole = (
                []
                if spec is None
                else spec.submodule_search_locations or [o for o in (spec.origin,) if o]
            )
            for file in (
                file for where in map(Path, whole) for file in sorted({where, *where.rglob("*.py")})
            ):
                name = file.relative_to(folder).as_posix()
                if file.suffix == ".py" and name not in found:
                    found[name] = file.read_bytes()
                    waiting.append(found[name])
    return found


def _imported(source: bytes) -> set[str]:
    """The first names of all that Python text imports, inside functions too."""
    heads: set[str] = set()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return heads  # a file of a package that nobody imports, or an error that importing it tells
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            heads |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            heads |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in heads}


def _beside(head: str, folder: Path) -> ModuleSpec | None:
    """The module or package `head` in a folder; None where a program that starts there would find
    another one."""
    spec = PathFinder.find_spec(head, [str(folder)])
    if spec is None or head in (*sys.builtin_module_names, "jflow"):
        return None
    if spec.origin is None:  # a folder without __init__.py comes after all that is installed
        return spec if head not in sys.modules and PathFinder.find_spec(head) is None else None
    known = sys.modules.get(head)
    return None if getattr(known, "__file__", None) == spec.origin else spec


def _import_of(package: str, folder: Path):
    """`__import__` for the modules of a config: names of its folder first."""

    def import_(name, globals=None, locals=None, fromlist=(), level=0):
        head = name.partition(".")[0]
        if level or _beside(head, folder) is None:
            return builtins.__import__(name, globals, locals, fromlist, level)
        found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or ("",), 0)
        return found if fromlist else sys.modules[f"{package}.{head}"]

    return import_


class _Finder:
    """Finds the modules of a config's package, and lets them import as the config does."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = sys.modules[module.__name__.partition(".")[0]].__dict__[
            "__builtins__"
        ]
        super().exec_module(module)

    def set_data(self, path, data, *, _mode=0o666) -> None:
        """No __pycache__."""
