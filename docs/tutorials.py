"""Runs the tutorials and writes them as pages of the site, with their output and figures.

    pip install jupytext nbconvert ipykernel
    python docs/tutorials.py                                    # all of them
    python docs/tutorials.py experiments/tutorials/density.py   # some

A tutorial is a script in cells (`# %%`); its page in docs/pages/tutorials is committed, so that the
site builds without running it.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs/pages/tutorials"
HEAD = "---\nhide: [toc]\n---\n"
FOOT = "\n\n*`python experiments/tutorials/{name}.py`, {seconds:.0f} s on {cores} CPU cores.*\n"


def write(script: Path) -> None:
    notebook, start = jupytext.read(script), time.time()
    ExecutePreprocessor(timeout=900, kernel_name="python3").preprocess(notebook)
    seconds = time.time() - start
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    for i, (name, picture) in enumerate(sorted(resources["outputs"].items()), 1):
        (PAGES / f"{script.stem}_{i}.png").write_bytes(picture)
        body = body.replace(f"![png]({name})", f"![figure {i}]({script.stem}_{i}.png)")
    (PAGES / f"{script.stem}.md").write_text(
        HEAD + body.strip() + FOOT.format(name=script.stem, seconds=seconds, cores=os.cpu_count())
    )
    print(f"{script.stem}: {seconds:.0f} s", flush=True)


def main() -> None:
    scripts = [Path(p) for p in sys.argv[1:]] or sorted(ROOT.glob("experiments/tutorials/*.py"))
    for script in scripts:
        write(script)


if __name__ == "__main__":
    main()
