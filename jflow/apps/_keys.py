"""The keys of a config: their types, how text is read as a value, and what --help says of them.
Needs no JAX."""

import ast
import contextlib
import inspect
import io
import math
import re
import tokenize
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

# Keys named as fields of an Experiment are checked as those are, before the config sees them. A
# config whose default is outside means something of its own by the key.
_COUNTS = (
    "steps",
    "batch",
    "log_every",
    "save_every",
    "eval_every",
    "patience",
    "max_to_keep",
    "inner",
    "accumulate",
)
BOUNDS = {
    **dict.fromkeys(_COUNTS, (1, math.inf)),
    "prefetch": (0, math.inf),
    "seed": (0, 2**32 - 1),
}
_BOOLS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_NONE = ("none", "null")
_FORMS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "a Python dict",
    types.NoneType: "none",
}


class Key(NamedTuple):
    """A key as the file has it: its type, default and meaning, "" where there is none."""

    name: str
    kind: str
    default: str
    about: str


def kind_of(where: str, parameter: inspect.Parameter, namespace: dict[str, Any]) -> Any:
    """The type of a key: its annotation, else that of its default; None for a key that has neither.

    A default of None may always be given. The entries of a tuple or list are of the type of the
    default's, if one.
    """
    kind, default = parameter.annotation, parameter.default
    if isinstance(kind, str):
        try:
            kind = eval(kind, namespace)
        except Exception as error:
            raise ValueError(
                f"{where}: key {parameter.name!r}: cannot read its type {kind!r}: {error}"
            ) from error
    if kind in (parameter.empty, Any, object):
        if default is None:
            return None
        kind = type(default)
    if (
        kind in (tuple, list)
        and default
        and len(entries := {type(value) for value in default}) == 1
    ):
        kind = types.GenericAlias(kind, (*entries, ...) if kind is tuple else (*entries,))
    return kind | None if default is None else kind


def read(name: str, value: Any, kind: Any, default: Any) -> Any:
    """The value of a key from text or from a Python value; ValueError, naming the key, for what is
    not of its type.

    For text, booleans are true, yes, on or 1 and false, no, off or 0, none is None, whole numbers
    may be written 1e3, and tuples and lists have commas between their entries. Numbers are finite.
    """
    if not isinstance(value, str) and repr(value) == repr(default):
        return value
    if kind is None:
        if isinstance(value, str):
            raise ValueError(
                f"key {name!r} has no type, so that {value!r} cannot be read: annotate it in the"
                f" config, e.g. {name}: float | None = None"
            )
        return value
    try:
        found = _convert(value, kind)
    except (ValueError, TypeError, SyntaxError):
        raise ValueError(
            f"key {name!r}: expected {_spelled(kind)} ({_form(kind)}), got {value!r}"
        ) from None
    least, most = BOUNDS.get(name, (-math.inf, math.inf))
    ours = default is None or type(default) is int and least <= default <= most
    if ours and type(found) is int and not least <= found <= most:
        bounds = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"key {name!r}: expected a whole number of {bounds}, got {value!r}")
    return found


def whole(text: str) -> int:
    """An int from 1000, 1_000, 0x3e8 or 1e3."""
    with contextlib.suppress(ValueError):
        return int(text, 0)
    value = float(text)
    if not (value.is_integer() and abs(value) <= 2**53):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def _convert(value: Any, kind: Any) -> Any:
    origin, among = typing.get_origin(kind), typing.get_args(kind)
    text = value if isinstance(value, str) else None
    if origin in (typing.Union, types.UnionType):
        for member in sorted(among, key=_readiness):
            with contextlib.suppress(ValueError, TypeError, SyntaxError):
                return _convert(value, member)
    elif origin is typing.Literal:
        for option in among:
            if text == str(option) or type(value) is type(option) and value == option:
                return option
    elif (origin or kind) in (tuple, list):
        return _sequence(value, origin or kind, among)
    elif kind is types.NoneType:
        if value is None or text is not None and text.strip().lower() in _NONE:
            return None
    elif kind is float:
        number = float(text) if text is not None else value
        if type(number) in (int, float) and math.isfinite(number):
            return float(number)
    else:
        kind = origin or kind
        if text is not None and kind is not str:
            readers = {
                bool: lambda text: _BOOLS.get(text.strip().lower()),
                int: whole,
                dict: ast.literal_eval,
            }
            value = readers[kind](text) if kind in readers else None
        if type(value) is kind:
            return value
    raise ValueError(f"{value!r} is not of type {kind}")


def _readiness(kind: Any) -> int:
    """In which order the members of a union are tried: numbers before yes and no, text last."""
    order = (types.NoneType, int, float, bool)
    return order.index(kind) if kind in order else len(order) + (kind is str)


def _sequence(value: Any, of: type, kinds: tuple) -> tuple | list:
    if isinstance(value, str):
        text = value.strip()
        if kinds and text[:1] not in ("(", "["):
            alone = kinds == (
                str,
                Ellipsis,
            )  # a word is a sequence of one, and nothing an empty one
            several = "," in text or alone
            value = (
                text.removesuffix(",").split(",") if several and text else () if alone else value
            )
        else:
            value = ast.literal_eval(text)
    if type(value) not in (tuple, list):
        raise ValueError(f"{value!r} is not a {of.__name__}")
    if not kinds:
        return of(value)
    if of is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    pairs = zip(value, kinds, strict=True)  # of another length: ValueError
    return of(
        _convert(entry.strip() if isinstance(entry, str) else entry, kind) for entry, kind in pairs
    )


def _spelled(kind: Any) -> str:
    among = (
        typing.get_args(kind)
        if typing.get_origin(kind) in (typing.Union, types.UnionType)
        else (kind,)
    )
    return " | ".join(
        "None" if member is types.NoneType else inspect.formatannotation(member) for member in among
    )


def _form(kind: Any) -> str:
    """How a value of a type is written."""
    origin, among = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(_form, sorted(among, key=lambda member: member is types.NoneType)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, among))}"
    if (origin or kind) in (tuple, list):
        joined = "joined by commas"
        joined += "" if among[:1] == (str,) else ", one alone with a comma after it"
        return f"each {_form(among[0])}, {joined}" if among else "such as (1, 2)"
    return _FORMS.get(origin or kind, "which cannot be given as text")


def listed(path: Path) -> list[Key]:
    """The keys of a config file, read without running it.

    The meaning of one is its entry in the `Args:` of config's docstring, or else the comment behind
    it.
    """
    with tokenize.open(path) as file:
        source = file.read()
    tree = ast.parse(source, str(path))
    functions = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "config"
    )
    if (config := next(functions, None)) is None:
        raise ValueError(f"{path} has no function config(*, key=default, ...)")
    meanings, comments = _meanings(ast.get_docstring(config) or ""), _comments(source)
    keys = []
    for key, default in zip(config.args.kwonlyargs, config.args.kw_defaults, strict=True):
        kind = ast.unparse(key.annotation) if key.annotation else ""
        if not kind and isinstance(default, ast.Constant) and default.value is not None:
            kind = type(default.value).__name__
        written = ast.get_source_segment(source, default) if default else None
        about = meanings.get(key.arg, comments.get((default or key).end_lineno or 0, ""))
        keys.append(Key(key.arg, kind, " ".join((written or "").split()), about))
    return keys


def _comments(source: str) -> dict[int, str]:
    """The comments of Python text, by their lines."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _meanings(doc: str) -> dict[str, str]:
    """The entries of the section `Args:` of a docstring in Google style."""
    found, margin, name = {}, None, None
    for line in f"\n{doc}".partition("\nArgs:\n")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and not indent:
            break  # the next section
        margin = indent if margin is None else margin
        if indent == margin and (entry := re.match(r"(\w+)(?: *\([^)]*\))?: *(.*)", line.strip())):
            name, found[entry[1]] = entry[1], entry[2]
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found
