"""Carries Python and Markdown files from old names of jflow to today's, by the table in
renames.tsv.

    python docs/rename.py config.py notes.md experiments/

A line of the table is `old <tab> new`, both as a reader of the documentation would write them:
`jflow.fewstep.mean_flow`, or `jflow.flows.tarflow(layers)` for an argument, with the function's old
name. The longest old name that fits counts. A new name may be empty: what it was, a name or an
argument, is gone, and each of its uses is reported.

Names are followed through the imports of each file (`from jflow import fewstep as fs`), and a local
variable that happens to be called like a package is left alone. In comments, in strings and in the
text of Markdown only dotted names are replaced. Files are changed in place; what could not be
carried over is printed, one line each, and makes the exit status 1.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

DOTTED = re.compile(r"(?<![\w./-])[a-z_]\w*(?:\.\w+)+")
BLOCK = re.compile(r"(```python\n)(.*?)(^```)", re.DOTALL | re.MULTILINE)


def read_table(path: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Names, and the renamed arguments of each function by its old name."""
    names, arguments = {}, {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        old, new = line.split("\t")
        if old.endswith(")"):
            function, argument = old[:-1].split("(")
            arguments.setdefault(function, {})[argument] = new[:-1].split("(")[-1]
        else:
            names[old] = new
    return names, arguments


def renamed(names: dict[str, str], full: str) -> str | None:
    """Today's name of `full`; None where it is gone."""
    parts = full.split(".")
    for k in range(len(parts), 0, -1):
        new = names.get(".".join(parts[:k]))
        if new is not None:
            return ".".join([new, *parts[k:]]) if new else None
    return full


class File:
    """One file's imports, the uses of what they bring, and the edits that follow."""

    def __init__(self, source: str, names: dict[str, str], arguments: dict[str, dict[str, str]]):
        self.source, self.names, self.arguments = source, names, arguments
        self.lines = [line.encode() for line in source.splitlines(keepends=True)]
        self.tree = ast.parse(source)
        self.edits, self.problems, self.needed = [], [], set()
        self.imports = [
            node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        self.bound = {}  # local name -> old full name
        for node in self.imports:
            for alias in node.names:
                if (
                    isinstance(node, ast.ImportFrom)
                    and node.module
                    and node.module.split(".")[0] == "jflow"
                ):
                    self.bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif isinstance(node, ast.Import) and alias.name.split(".")[0] == "jflow":
                    self.bound[alias.asname or "jflow"] = alias.name if alias.asname else "jflow"
        self.explicit = {
            alias.asname for node in self.imports for alias in node.names if alias.asname
        }

    def rewritten(self) -> str:
        self.visit(self.tree, [])
        for node in self.imports:
            self.rewrite_import(node)
        lines = list(self.lines)
        for (row, start), (end_row, end), text in sorted(self.edits, reverse=True):
            tail = lines[end_row][end:]
            lines[row : end_row + 1] = [lines[row][:start] + text.encode() + tail]
        source = b"".join(lines).decode()
        return self.with_imports(source)

    def edit(self, node, text: str) -> None:
        self.edits.append(
            ((node.lineno - 1, node.col_offset), (node.end_lineno - 1, node.end_col_offset), text)
        )

    def visit(self, node, scopes: list[set[str]]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for inner in [
                *getattr(node, "decorator_list", []),
                *node.args.defaults,
                *filter(None, node.args.kw_defaults),
            ]:
                self.visit(inner, scopes)
            scopes = [*scopes, local_names(node)]
            body = node.body if isinstance(node.body, list) else [node.body]
            for inner in [*annotations(node), *body]:
                self.visit(inner, scopes)
            return
        if isinstance(node, ast.JoinedStr) and sys.version_info < (3, 12):
            return  # its parts have no places of their own yet: it is carried over as text
        if isinstance(node, ast.Call):
            self.rename_arguments(node, scopes)
        if isinstance(node, ast.Attribute | ast.Name):
            full = self.full_name(node, scopes)
            if full is not None:
                self.rename_use(node, *full)
                return
        for inner in ast.iter_child_nodes(node):
            self.visit(inner, scopes)

    def full_name(self, node, scopes) -> tuple[str, list[str]] | None:
        """(the name that is bound, the attributes after it), where `node` is such a chain."""
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if (
            not isinstance(node, ast.Name)
            or node.id not in self.bound
            or any(node.id in scope for scope in scopes)
        ):
            return None
        return node.id, attributes[::-1]

    def rename_use(self, node, root: str, attributes: list[str]) -> None:
        old = ".".join([self.bound[root], *attributes])
        new = renamed(self.names, old)
        if new is None:
            self.problems.append(f"line {node.lineno}: {old} is gone")
            return
        if new == old:
            return
        of_root = renamed(self.names, self.bound[root])
        if (
            of_root is not None
            and (root in self.explicit or root == "jflow")
            and f"{new}.".startswith(f"{of_root}.")
        ):
            text = root + new[len(of_root) :]
        else:
            parts = new.split(".")
            text = ".".join(parts[-len(attributes) - 1 :])
            self.needed.add((".".join(parts[: -len(attributes) - 1]), parts[-len(attributes) - 1]))
        self.edit(node, text)

    def rename_arguments(self, node: ast.Call, scopes) -> None:
        found = self.full_name(node.func, scopes)
        table = found and self.arguments.get(".".join([self.bound[found[0]], *found[1]]))
        for keyword in node.keywords if table else ():
            if table.get(keyword.arg) == "":
                old = ".".join([self.bound[found[0]], *found[1]])
                self.problems.append(
                    f"line {keyword.lineno}: the argument {keyword.arg} of {old} is gone"
                )
            elif keyword.arg in table:
                row, start = keyword.lineno - 1, keyword.col_offset
                self.edits.append(
                    ((row, start), (row, start + len(keyword.arg)), table[keyword.arg])
                )

    def rewrite_import(self, node) -> None:
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module is None or module.split(".")[0] != "jflow":
            return
        kept, changed = {}, False
        for alias in node.names:
            old = f"{module}.{alias.name}"
            new = renamed(self.names, old)
            changed |= new != old
            if new is None:
                continue
            where, _, name = new.rpartition(".")
            asname = alias.asname and (name if alias.asname == alias.name else alias.asname)
            kept.setdefault(where, []).append(f"{name} as {asname}" if asname else name)
        if changed:
            indent = " " * node.col_offset
            lines = [f"from {where} import {', '.join(names)}" for where, names in kept.items()]
            self.edit(node, f"\n{indent}".join(lines) or "pass")

    def with_imports(self, source: str) -> str:
        """`source` with an import of each package that its uses need now."""
        tree, have = ast.parse(source), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                have |= {(node.module, alias.asname or alias.name) for alias in node.names}
        missing = sorted(self.needed - have)
        if not missing:
            return source
        tops = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        ours = [
            n
            for n in tops
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("jflow")
        ]
        after = (ours or tops)[-1].end_lineno if tops else 0
        lines = source.splitlines(keepends=True)
        lines[after:after] = [f"from {where} import {name}\n" for where, name in missing]
        return "".join(lines)


def annotations(function) -> list:
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    return [a.annotation for a in every if a and a.annotation] + [
        r for r in [getattr(function, "returns", None)] if r
    ]


def local_names(function) -> set[str]:
    """What a function binds itself: its arguments and the targets of assignments, but not what it
    imports."""
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    found = {a.arg for a in every if a}

    def walk(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            return
        if isinstance(node, ast.Lambda):
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        for inner in ast.iter_child_nodes(node):
            walk(inner)

    for inner in function.body if isinstance(function.body, list) else [function.body]:
        walk(inner)
    return found


def in_text(text: str, names: dict[str, str]) -> str:
    """`text` with its dotted names carried over, written with or without the leading `jflow.` as
    they were."""

    def carried(match):
        word = match.group()
        bare = not word.startswith("jflow.")
        old = f"jflow.{word}" if bare else word
        new = renamed(names, old)
        if new is None or new == old:
            return word
        return new.removeprefix("jflow.") if bare else new

    return DOTTED.sub(carried, text)


def carry_python(source: str, table) -> tuple[str, list[str]]:
    file = File(source, *table)
    source = file.rewritten()
    lines = source.splitlines(keepends=True)
    kinds = {
        tokenize.COMMENT,
        tokenize.STRING,
        getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
    }
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type in kinds]
    for token in reversed(tokens):
        (row, start), (end_row, end) = token.start, token.end
        text = "".join(lines[row - 1 : end_row])
        before, after = lines[row - 1][:start], lines[end_row - 1][end:]
        middle = text[len(before) : len(text) - len(after)]
        lines[row - 1 : end_row] = (before + in_text(middle, table[0]) + after).splitlines(
            keepends=True
        )
    return "".join(lines), file.problems


def carry_markdown(text: str, table) -> tuple[str, list[str]]:
    problems, parts, at = [], [], 0
    for block in BLOCK.finditer(text):
        parts.append(in_text(text[at : block.start()], table[0]))
        try:
            code, found = carry_python(block[2], table)
        except SyntaxError:
            code, found = in_text(block[2], table[0]), []
        problems += found
        parts += [block[1], code, block[3]]
        at = block.end()
    return "".join([*parts, in_text(text[at:], table[0])]), problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="files and folders")
    parser.add_argument(
        "--table",
        type=Path,
        default=Path(__file__).with_name("renames.tsv"),
        help="default: %(default)s",
    )
    options = parser.parse_args()
    table, status = read_table(options.table), 0
    files = [
        f
        for p in options.paths
        for f in (sorted(p.rglob("*")) if p.is_dir() else [p])
        if f.suffix in (".py", ".md")
    ]
    for path in files:
        old = path.read_text()
        new, problems = (carry_python if path.suffix == ".py" else carry_markdown)(old, table)
        if new != old:
            path.write_text(new)
            print(f"{path}: changed")
        for problem in problems:
            print(f"{path}: {problem}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
