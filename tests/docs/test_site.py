"""The site builds strictly, asks no other host for anything, and its search finds what people
type."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("lunr")
from lunr.builder import Builder
from lunr.query import Query
from lunr.stop_word_filter import WORDS

ROOT = Path(__file__).parents[2]

SEARCHES = {  # page under api/: what people type for it
    "couplings/optimal_transport": [
        "OT coupling",
        "minibatch optimal transport",
        "OT-CFM",
        "optimal transport pairing",
    ],
    "losses/mean_flow": ["MeanFlow", "mean flow loss", "average velocity", "one-step MeanFlow"],
    "guidance/cfg": ["guidance", "classifier-free guidance", "CFG", "guidance scale"],
    "solvers/log_prob": [
        "CNF log-density",
        "CNF log-likelihood",
        "instantaneous change of variables",
        "likelihood of an ODE",
    ],
    "train/ema/update": [
        "EMA",
        "exponential moving average",
        "averaged params",
        "Polyak averaging",
    ],
    "flows/glow": [
        "Glow",
        "multi-scale flow",
        "Glow recipe",
        "generative flow with invertible 1x1 convolutions",
    ],
    "bijectors/log_dets/neumann": [
        "Neumann log-det",
        "Neumann series",
        "power series log-determinant",
        "i-ResNet log-det",
    ],
    "data/dequantize": [
        "dequantization",
        "dequantize",
        "uniform dequantization",
        "dequantize pixels",
    ],
    "losses/consistency_training": ["consistency training", "consistency models", "iCT", "ECT"],
    "losses/distribution_matching": [
        "DMD",
        "distribution matching distillation",
        "distribution matching",
        "reverse KL distillation",
    ],
    "solvers/sample_sde": [
        "SDE sampling",
        "stochastic sampling",
        "sample SDE",
        "Euler-Maruyama sampler",
    ],
    "data/generate_reflow_pairs": [
        "reflow",
        "rectified flow pairs",
        "2-rectified flow",
        "generate pairs for reflow",
    ],
    "paths/parameterizations/from_noise": [
        "noise prediction",
        "epsilon prediction",
        "eps prediction",
        "predict noise",
    ],
    "bijectors/invertible_conv_1x1": [
        "invertible 1x1 convolution",
        "1x1 convolution",
        "conv1x1",
        "invertible convolution Glow",
    ],
    "metrics/frechet_distance": [
        "FID",
        "Frechet inception distance",
        "Frechet distance",
        "Inception distance",
    ],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", "docs/mkdocs.yml", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_ask_no_other_host(site):
    """Scripts, styles, fonts and pictures come from the site itself; links to read may go out."""
    asked = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="?(https?:)?//|<link[^>]+rel="?(?:stylesheet|preconnect|preload)'
        r'[^>]+href="?(https?:)?//|url\(["\']?(https?:)?//|@import'
    )
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = asked.search(path.read_text())
        assert not found, f"{path.relative_to(site)}: {found[0]}"


@pytest.fixture(scope="module")
def search(site):
    """Pages for a query, best first, as the script of the theme ranks them: any word that a query's
    word begins, and the more of the query's words, the better."""
    index = json.loads((site / "search/search_index.json").read_text())
    entries = {entry["location"]: entry for entry in index["docs"]}
    config = index["config"]
    separator, fields = re.compile(config["separator"]), config["fields"]

    def words(text: str) -> list[str]:
        text = html.unescape(re.sub("<[^>]+>", " ", text)).lower()
        return [word for word in separator.split(text) if word and word not in WORDS]

    builder = Builder()
    builder.b(0)
    builder.ref("location")
    for name, field in fields.items():

        def of(entry, name=name):
            value = entry.get(name, "")
            return words(value if isinstance(value, str) else " ".join(value))

        builder.field(name, field["boost"], of)
    for entry in entries.values():
        builder.add(entry)
    built = builder.build()

    def pages(query: str) -> list[str]:
        asked = built.create_query()
        for word in words(query):
            asked.term(word, wildcard=Query.WILDCARD_TRAILING, use_pipeline=False)
        best = {}
        for result in built.query(asked):
            found = result["match_data"].metadata
            share = sum(any(f.startswith(w) for f in found) for w in words(query))
            share /= len(words(query))
            location = result["ref"]
            score = result["score"] * (1 + (("#" not in location) + share) ** 2)
            page = location.split("#")[0].strip("/")
            best[page] = max(best.get(page, 0), score)
        return sorted(best, key=best.get, reverse=True)

    return pages


@pytest.mark.parametrize("page", SEARCHES)
def test_search_finds(page, search):
    for query in SEARCHES[page]:
        first = search(query)[:3]
        assert f"api/{page}" in first, f"{query!r} finds {first}"
