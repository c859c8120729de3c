"""The order of the packages: who imports whom, read from the source."""

import ast
from functools import cache
from pathlib import Path

import jflow

ROOT = Path(jflow.__file__).parent


@cache
def imports():
    """[(module, what it imports, a module or a name)], both without the leading `jflow.`."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jflow":
                found += [
                    (module, f"{node.module}.{alias.name}".removeprefix("jflow."))
                    for alias in node.names
                ]
    return found


def package(name):
    return name.split(".")[0]


@cache
def below():
    """The packages that each package imports."""
    found = {}
    for module, name in imports():
        found.setdefault(package(module), set()).add(package(name))
    return {name: others - {name} for name, others in found.items()}


def chains(name, above=()):
    assert name not in above, f"a circle: {' -> '.join([*above, name])}"
    longest = [chains(other, (*above, name)) for other in sorted(below().get(name, ()))]
    return [name, *max(longest, key=len, default=[])]


def test_packages_have_an_order_and_few_levels():
    longest = max(map(chains, below()), key=len)
    assert len(longest) <= 8, longest


def test_no_package_imports_a_private_name_of_another():
    private = {
        (module, name.rpartition(".")[0])
        for module, name in imports()
        if package(module) != package(name) != "_core"
        and any(part.startswith("_") for part in name.split(".")[1:])
    }
    assert not private


def test_nothing_imports_the_apps():
    assert not [module for module, name in imports() if package(name) == "apps" != package(module)]
