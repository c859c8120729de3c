"""Data: rows as dicts of numpy arrays, batches with a saved position, preprocessing, toy sets, images and tables."""

from jflow.data.batches import Batches, batches
from jflow.data.images import cifar_jpegs, cifar_sheets, digits, mnist
from jflow.data.pictures import image_grid
from jflow.data.placement import place, share
from jflow.data.prefetch import prefetch
from jflow.data.preprocess import Preprocess, chain_preprocess, dequantize, identity, logit, scale, standardise
from jflow.data.schema import (
    Column,
    add_noise,
    decode,
    encode,
    find_lattice,
    find_schema,
    log_mass_unit,
    steps,
    to_text,
)
from jflow.data.splits import Splits, count, split, stratified_split, take
from jflow.data.tables import Table, read_table, take_rows
from jflow.data.toy import checkerboard, eight_gaussians, moons

__all__ = [
    "Batches",
    "Column",
    "Preprocess",
    "Splits",
    "Table",
    "add_noise",
    "batches",
    "chain_preprocess",
    "checkerboard",
    "cifar_jpegs",
    "cifar_sheets",
    "count",
    "decode",
    "dequantize",
    "digits",
    "eight_gaussians",
    "encode",
    "find_lattice",
    "find_schema",
    "identity",
    "image_grid",
    "log_mass_unit",
    "logit",
    "mnist",
    "moons",
    "place",
    "prefetch",
    "read_table",
    "scale",
    "share",
    "split",
    "standardise",
    "steps",
    "stratified_split",
    "take",
    "take_rows",
    "to_text",
]
