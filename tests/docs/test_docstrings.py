"""Docstrings as the site's tools read them: arguments, results and sources of every public name."""

import re

import pytest

pytest.importorskip("griffe")
from site_hooks import NAMED


def arguments(target) -> set[str]:
    """Parameters of a function; fields of a class, or what it is made with and what `fit` sets."""
    if target.is_function:
        return {parameter.name.lstrip("*") for parameter in target.parameters}
    if "__init__" in target.members:
        made_with = {parameter.name for parameter in target.members["__init__"].parameters}
        fitted = set(re.findall(r"self\.([a-z]\w*_)\b", target.source))
        return made_with - {"self"} | fitted
    return {
        name
        for name, member in target.members.items()
        if member.is_attribute
        and member.annotation is not None
        and "property" not in member.labels
        and not name.startswith("_")
    }


def documented(target) -> set[str]:
    sections = target.docstring.parse("google") if target.docstring else []
    lists = [s.value for s in sections if s.kind.value in ("parameters", "attributes")]
    return {entry.name.lstrip("*") for entries in lists for entry in entries}


def test_arguments_are_documented():
    """At least 95 in 100, and nothing is documented that is not there."""
    missing, count = [], 0
    for name, target in NAMED.items():
        of = arguments(target)
        count += len(of)
        missing += [f"{name}({argument})" for argument in sorted(of - documented(target))]
        assert documented(target) <= of, f"{name}: {documented(target) - of} is no argument"
    assert len(missing) <= 0.05 * count, f"{len(missing)} of {count} arguments: {missing}"


def test_names_begin_with_a_sentence():
    """A stranger reads the first line alone, in a table: it ends there."""
    bad = []
    for name, target in NAMED.items():
        first = target.docstring.value.strip().splitlines()[0] if target.docstring else ""
        if not first.rstrip(":").rstrip() or not first.rstrip().endswith((".", ":")):
            bad.append(f"{name}: {first!r}")
    assert not bad, "\n".join(bad)


def test_functions_say_what_they_return():
    def returns(target):
        sections = target.docstring.parse("google") if target.docstring else []
        return any(section.kind.value in ("returns", "yields") for section in sections)

    functions = [n for n, t in NAMED.items() if t.is_function and str(t.returns) != "None"]
    bad = [name for name in functions if not returns(NAMED[name])]
    assert len(bad) <= 0.05 * len(functions), bad
