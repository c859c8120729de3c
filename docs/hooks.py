"""What the site has beside the pages that are written by hand: the API reference, the pictures and
READMEs of the experiments, formulas as MathML, and links from names in code to their pages."""

import html
import json
import os
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"(<(?:a|pre|h\d)\b.*?</(?:a|pre|h\d)>)|<code>([\w.]+)</code>", re.DOTALL)


def public_modules():
    """The public modules of jflow, each with its public functions and classes, read from source."""
    package = griffe.load("jflow", search_paths=[str(ROOT)], docstring_parser="google")

    def walk(module):
        members, inner = [], []
        for name in module.exports or ():
            member = module.members[str(name)]
            target = member.final_target if member.is_alias else member
            if target.is_module:
                inner.append(target)
            elif target.is_function or target.is_class:
                members.append((str(name), target))
        known = {m.path for m in inner}
        inner += [
            m
            for n, m in module.members.items()
            if not m.is_alias and m.is_module and not n.startswith("_") and m.path not in known
        ]
        if module.path != "jflow" and module.exports:  # without __all__ it is nobody's to call
            yield module, members
        for m in sorted(inner, key=lambda m: m.path):
            yield from walk(m)

    return list(walk(package))


def short(path: str) -> str:
    return path.removeprefix("jflow.")


MODULES = public_modules()
NAMED = {  # 'losses.mean_flow' -> what griffe read of it
    f"{short(module.path)}.{name}": target
    for module, members in MODULES
    for name, target in members
}
PAGES = {name: f"api/{name.replace('.', '/')}.md" for name in NAMED}
PAGES |= {
    short(module.path): f"api/{short(module.path).replace('.', '/')}/index.md"
    for module, _ in MODULES
}

FUNCTION = """---
title: {name}
tags: {tags}
---
[`jflow.{home}`](index.md)

::: jflow.{name}
    options:
      heading: {name}
"""


ALSO = re.compile(r"Also known as:\s+(.*?)\.?\s*(?:\n\s*\n|\Z)", re.DOTALL)


def other_names(docstring) -> list[str]:
    """What else people call it, which the search ranks first: `Also known as: CFG, guidance
    scale.`"""
    found = ALSO.search(docstring.value) if docstring else None
    return [" ".join(name.split()) for name in found[1].split(",")] if found else []


def first_sentence(docstring) -> str:
    text = " ".join(docstring.value.strip().split("\n\n")[0].split()) if docstring else ""
    return re.split(r"(?<=[.!?])\s", text)[0]


def module_page(module, members) -> str:
    """A module's page: its docstring, and a table a file, in the order of `__all__`."""
    lines = [f"# `{module.path}`", "", module.docstring.value if module.docstring else "", ""]
    by_file = {module: []}  # what comes from elsewhere stands first, without a heading
    for name, target in members:
        inside = target.module.path.startswith(module.path)
        by_file.setdefault(target.module if inside else module, []).append((name, target))
    by_file = {file: rows for file, rows in by_file.items() if rows}
    for file, rows in by_file.items():
        if file is not module and len(by_file) > 1:
            lines += [f"## {first_sentence(file.docstring).rstrip('.')}", ""]
        lines += ["| name | |", "|---|---|"]
        for name, target in rows:
            said = first_sentence(target.docstring).replace("|", "\\|")
            lines.append(f"| [`{name}`]({name}.md) | {said} |")
        lines.append("")
    return "\n".join(lines)


def on_config(config):
    pages = [{short(module.path): PAGES[short(module.path)]} for module, _ in MODULES]
    config.nav.append({"API": ["api/index.md", *pages]})
    return config


def on_files(files, *, config):
    def add(uri, content):
        files.append(File.generated(config, uri, content=content))

    lines = ["# API reference", "", "Everything public, by the noun that it is or makes.", ""]
    lines += ["| package | |", "|---|---|"]
    for module, members in MODULES:
        page, said = PAGES[short(module.path)], first_sentence(module.docstring)
        said = said.replace("|", "\\|")
        lines.append(f"| [`{module.path}`]({page.removeprefix('api/')}) | {said} |")
        add(page, module_page(module, members))
    for name, target in NAMED.items():
        tags, home = json.dumps(other_names(target.docstring)), name.rpartition(".")[0]
        add(PAGES[name], FUNCTION.format(name=name, home=home, tags=tags))
    add("api/index.md", "\n".join(lines))
    for path in sorted(ROOT.glob("experiments/**/*")) + [ROOT / "benchmarks/README.md"]:
        if path.name == "README.md" or path.suffix == ".png":
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_content(content, *, page, config, files):
    content = FORMULA.sub(lambda m: mathml(m[2], block=m[1] == "div"), content)

    here = page.file.src_uri.removeprefix("api/").rpartition("/")[0]
    home = here.replace("/", ".")  # names of the same module go without it

    def linked(match):
        name = short(match[2] or "")
        uri = PAGES.get(name if "." in name else f"{home}.{name}")
        if not uri or uri == page.file.src_uri:
            return match[0]
        target = files.get_file_from_path(uri).url
        link = os.path.relpath(target, page.url or ".")
        return f'<a href="{link}/"><code>{match[2]}</code></a>'

    return CODE.sub(linked, content)


def mathml(latex: str, block: bool) -> str:
    return convert(html.unescape(latex), display="block" if block else "inline")
