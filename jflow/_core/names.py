"""What else people call a public name: the error for a name that a package does not have says what
it is called here."""

import importlib
import importlib.util
import re
import sys
from types import ModuleType

_ALSO = re.compile(r"Also known as:\s+(.*?)\.?\s*(?:\n\s*\n|\Z)", re.DOTALL)


def explain_unknown(package: str) -> None:
    """Let a package answer unknown names by `unknown`. A type checker sees nothing of it, and goes
    on to find names that are not there.

    Args:
        package: its `__name__`, in its own file, once its `__all__` is there.
    """

    def answer(name: str):
        raise unknown(package, name)

    vars(sys.modules[package])["__getattr__"] = answer


def unknown(package: str, name: str) -> AttributeError:
    """The error for a name that a package does not have: with the names that docstrings declare the
    same by `Also known as:`, in the package, or else anywhere in jflow.

    Python asks packages for names with an underscore in front, and for modules that it is about to
    import: those are not looked up.

    Args:
        package: its `__name__`.
        name: what was asked for.

    Returns:
        AttributeError: to be raised.
    """
    module = sys.modules[package]
    message = f"module {package!r} has no attribute {name!r}"
    if not (
        name.startswith("_")
        or not name.isidentifier()
        or getattr(module.__spec__, "_initializing", False)
        or (hasattr(module, "__path__") and importlib.util.find_spec(f"{package}.{name}"))
    ):
        if here := called(module, name):
            message += f"; it is called {' or '.join(here)} here"
        elif there := called(importlib.import_module("jflow"), name):
            message += f"; it is {' or '.join(f'jflow.{found}' for found in there)}"
    return AttributeError(message, name=name, obj=module)


def called(module: ModuleType, name: str) -> list[str]:
    """The public names that people call `name`, case and what is no letter or digit aside.

    Args:
        module: where to look, and in the modules of its `__all__`.
        name: such as 'minibatch_OT'.

    Returns:
        list of str: as they are written after the module and a dot.
    """
    found = []
    for own in module.__all__:
        value = getattr(module, own)
        if isinstance(value, ModuleType):
            found += [f"{own}.{inner}" for inner in called(value, name)]
            continue
        said = value.__doc__ or ""
        also = _ALSO.search(said if said != type(value).__doc__ else "")
        names = [own, *(also[1].split(",") if also else ())]
        if _plain(name) in map(_plain, names):
            found.append(own)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
