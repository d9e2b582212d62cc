"""The text of a TARGET."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.capture.arguments import TargetText, convert, nearest
from plait.errors import TargetError


def test_split_at_the_first_question_mark_and_equals_sign():
    """Values may hold colons, question marks and equals signs."""
    target = TargetText.parse("examples/a.py:job?path=C:/x?y&formula=a=b&n=1")

    assert target.place == "examples/a.py:job"
    assert target.arguments == {"path": "C:/x?y", "formula": "a=b", "n": "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.py:job?layers", "not name=value"),
        ("a.py:job?=3", "not name=value"),
        ("a:b?n=1&n=2", "twice"),
    ],
)
def test_a_malformed_target_says_what_is_wrong(text: str, message: str):
    """The message quotes the part."""
    with pytest.raises(TargetError, match=message):
        TargetText.parse(text)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4", int, 4),
        ("1e6", int, 1_000_000),
        ("0.5", float, 0.5),
        ("3", float, 3.0),
        ("true", bool, True),
        ("0", bool, False),
        ("No", bool, False),
        ("4", str, "4"),
        ("1,2", list, [1, 2]),
        ("[1, 2]", tuple, (1, 2)),
        ("full,full", list, ["full", "full"]),
        ("none", None, None),
        ("0.1", None, 0.1),
        ("relu", None, "relu"),
        ('{"a": 1}', None, {"a": 1}),
    ],
)
def test_convert(text: str, kind: type | None, value: object):
    """Text becomes what the argument's kind asks for."""
    found = convert(text, kind, "target x: n")

    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"), [("four", int), ("1.5", int), ("maybe", bool), ("fast", float), ("inf", int), ("[1", list)]
)
def test_convert_refuses_with_the_name_and_the_text(text: str, kind: type):
    """The message names the argument as it was typed."""
    with pytest.raises(TargetError, match=f"target x: n={re.escape(text)} is not"):
        convert(text, kind, "target x: n")


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.from_regex(r"[^&]*", fullmatch=True), max_size=4))
def test_any_arguments_come_back(arguments: dict[str, str]):
    """What is written name=value is read as it was written."""
    text = "&".join(f"{name}={value}" for name, value in arguments.items())

    assert TargetText.parse(f"a.py:job?{text}").arguments == arguments


def test_nearest_names_a_close_one_and_no_far_one():
    """A typing mistake is answered with the word that was meant."""
    assert nearest("widht", ["width", "layers"]) == "; did you mean 'width'?"
    assert nearest("zzz", ["width"]) == ""
