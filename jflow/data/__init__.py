"""Data: rows as dicts of numpy arrays, batches, preprocessing, images and tables."""

from jflow._core.names import explain_unknown
from jflow.data._batches import Batches, batches
from jflow.data._frames import to_frame
from jflow.data._images import cifar_jpegs, cifar_sheets, digits, mnist
from jflow.data._latents import latents, pool_layout, pool_mask, standardize_latents
from jflow.data._marginals import (
    Marginal,
    find_marginals,
    from_codes_and_numbers,
    from_normal,
    log_slopes,
    to_codes_and_numbers,
    to_normal,
)
from jflow.data._pairs import (
    Source,
    generate_reflow_pairs,
    generate_reflow_trajectories,
    normal_source,
    rows_source,
    truncate_pairs,
)
from jflow.data._pictures import image_grid
from jflow.data._placement import place, share
from jflow.data._prefetch import prefetch
from jflow.data._preprocess import (
    Preprocess,
    chain_preprocess,
    dequantize,
    identity,
    logit,
    scale,
    standardize,
)
from jflow.data._recognize import find_lattice, find_schema, spikes
from jflow.data._schema import (
    Column,
    add_noise,
    decode,
    encode,
    log_mass_unit,
    steps,
    to_text,
)
from jflow.data._shards import read_shards, write_shards
from jflow.data._splits import Splits, count, split, stratified_split, take
from jflow.data._tables import Table, missing_cells, read_table, take_rows
from jflow.data._tokens import check_tokens
from jflow.data._toy import checkerboard, eight_gaussians, moons
from jflow.data._values import encode_value, value_text

__all__ = [
    "Batches",
    "Column",
    "Marginal",
    "Preprocess",
    "Source",
    "Splits",
    "Table",
    "add_noise",
    "batches",
    "chain_preprocess",
    "check_tokens",
    "checkerboard",
    "cifar_jpegs",
    "cifar_sheets",
    "count",
    "decode",
    "dequantize",
    "digits",
    "eight_gaussians",
    "encode",
    "encode_value",
    "find_lattice",
    "find_marginals",
    "find_schema",
    "from_codes_and_numbers",
    "from_normal",
    "generate_reflow_pairs",
    "generate_reflow_trajectories",
    "identity",
    "image_grid",
    "latents",
    "log_mass_unit",
    "log_slopes",
    "logit",
    "missing_cells",
    "mnist",
    "moons",
    "normal_source",
    "place",
    "pool_layout",
    "pool_mask",
    "prefetch",
    "read_shards",
    "read_table",
    "rows_source",
    "scale",
    "share",
    "spikes",
    "split",
    "standardize",
    "standardize_latents",
    "steps",
    "stratified_split",
    "take",
    "take_rows",
    "to_codes_and_numbers",
    "to_frame",
    "to_normal",
    "to_text",
    "truncate_pairs",
    "value_text",
    "write_shards",
]

explain_unknown(__name__)
