import hypothesis.strategies as st
import pytest
from hypothesis import given

from cgo.text import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 漢 [red]\n\tx", "plain é 漢 [red]\n\tx"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\rb", r"a\x0db"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\ud800", r"\ud800"),
        ("\0", r"\x00"),
    ],
)
def test_what_a_terminal_obeys_is_spelled_out(text, expected):
    assert printable(text) == expected


def test_long_texts_are_cut():
    assert printable("a" * 10, 4) == "aaaa ..."
    assert printable("a" * 4, 4) == "aaaa"


@given(st.text(st.characters()))
def test_any_text_can_be_written(text):
    done = printable(text)
    done.encode()
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in done)
