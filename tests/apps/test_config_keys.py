"""What text means as the value of a config's key, whatever the type."""

import inspect
import re
import typing

import pytest

from jflow.apps import _keys


def config(
    *,
    either: bool | None = None,
    count: int = 3,
    implicit: int = None,
    number: "float" = 1.0,
    word: str = "a",
    maybe: typing.Optional[str] = None,  # noqa: UP045
    choice: typing.Literal["x", 3] = "x",
    widths: tuple = (8, 8),
    names: tuple[str, ...] = (),
    pair: tuple[int, float] = (1, 2.0),
    rates: list[float] | None = None,
    nested: tuple[tuple[int, ...], ...] = ((1,),),
    table: dict = {},  # noqa: B006
    mixed: int | bool | str = 0,
    function=print,
    steps: int = 0,  # its own meaning of 0
    batch: int = 8,
    seed: int = 0,
): ...


KEYS = inspect.signature(config).parameters
REFUSED = object()


def read(name, value):
    return _keys.read(name, value, _keys.kind_of("c.py", KEYS[name], globals()), KEYS[name].default)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (
            "either",
            {
                "false": False,
                "False": False,
                "no": False,
                "0": False,
                "YES": True,
                "1": True,
                "None": None,
            },
        ),
        ("either", {"": REFUSED, "nope": REFUSED, "2": REFUSED, "[]": REFUSED}),
        ("count", {"1e3": 1000, "1_000": 1000, "0x10": 16, "007": 7, "-2": -2, "4.0": 4}),
        (
            "count",
            {
                "4.5": REFUSED,
                "nan": REFUSED,
                "inf": REFUSED,
                "1e300": REFUSED,
                "true": REFUSED,
                "none": REFUSED,
            },
        ),
        ("implicit", {"none": None, "4": 4, "four": REFUSED}),
        (
            "number",
            {
                "1": 1.0,
                "1e-3": 1e-3,
                "nan": REFUSED,
                "inf": REFUSED,
                "1e999": REFUSED,
                "no": REFUSED,
            },
        ),
        ("word", {"none": "none", "1": "1", "a b": "a b"}),
        ("maybe", {"none": None, "1": "1"}),
        ("choice", {"x": "x", "3": 3, "y": REFUSED}),
        (
            "widths",
            {
                "64,64": (64, 64),
                "[4]": (4,),
                "4,": (4,),
                "1e3,8": (1000, 8),
                "4": REFUSED,
                "4,a": REFUSED,
            },
        ),
        ("names", {"a,b": ("a", "b"), "1, 2": ("1", "2"), "['a']": ("a",), "()": (), "a": ("a",)}),
        ("pair", {"1,2": (1, 2.0), "1": REFUSED, "1,2,3": REFUSED, "1.5,2": REFUSED}),
        ("rates", {"1,2.5": [1.0, 2.5], "none": None, "1,inf": REFUSED}),
        ("nested", {"((1,2),)": ((1, 2),), "1,2": REFUSED}),
        ("table", {"{'a': 1}": {"a": 1}, "a": REFUSED, "(1,)": REFUSED}),
        ("mixed", {"1": 1, "yes": True, "word": "word"}),
        ("function", {"len": REFUSED}),
        ("steps", {"-1": -1, "0": 0}),
        ("batch", {"0": REFUSED, "1": 1}),
        ("seed", {"-1": REFUSED, str(2**32): REFUSED, str(2**32 - 1): 2**32 - 1}),
    ],
)
def test_text_is_read_by_the_type_of_its_key_or_refused_by_name(name, given):
    for text, value in given.items():
        if value is REFUSED:
            with pytest.raises(
                ValueError, match=f"^key '{name}': expected .*, got {re.escape(repr(text))}"
            ):
                read(name, text)
        else:
            found = read(name, text)
            assert found == value and type(found) is type(value)


def test_python_values_keep_their_types():
    for name, value in {
        "count": 4,
        "number": 4,
        "widths": [4, 4],
        "either": False,
        "function": print,
    }.items():
        assert read(name, value) == (tuple(value) if name == "widths" else value)
    for name, value in {
        "count": 4.0,
        "number": float("nan"),
        "either": 0,
        "word": 3,
        "widths": [4.5],
    }.items():
        with pytest.raises(ValueError, match=f"key '{name}'"):
            read(name, value)


def test_words_are_joined_by_commas():
    """One alone needs none; a comma in a word needs quotes."""
    kind = tuple[str, ...]
    for text, value in (
        ("a", ("a",)),
        ("a,b c", ("a", "b c")),
        ("a,", ("a",)),
        ("", ()),
        ("('a,b',)", ("a,b",)),
    ):
        assert _keys.read("drop", text, kind, ()) == value
