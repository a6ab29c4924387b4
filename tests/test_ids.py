import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cgo.errors import SpecError
from cgo.ids import checked_id, file_name, is_model_id

GOOD = ["a", "0", "cnn-3", "A.b_c-9", "nni-alone-2", "x" * 100, "a..b", "con", "a."]
BAD = ["", "../../x", "/x", "a/b", "a\\b", "a\0", "a\n", "a\x1b[31m", "\ud800", "x" * 300, "é", ".",
       "-x", "_x", " a", "a ", "a:b", "~", None, 1, b"a", ["a"]]  # fmt: skip


@pytest.mark.parametrize("id_", GOOD)
def test_ids_that_are_taken(id_):
    assert is_model_id(id_)
    assert checked_id(id_) is id_


@pytest.mark.parametrize("id_", BAD)
def test_ids_that_are_refused(id_):
    assert not is_model_id(id_)
    with pytest.raises(SpecError, match=r"^here: .* must be 1 to 100 letters, digits") as caught:
        checked_id(id_, "here")
    text = str(caught.value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 300


@pytest.mark.parametrize("id_", ["a", "cnn-3", "0", "x" * 100, "console", "com10", "a.b", "nul-1"])
def test_a_plain_id_is_its_own_file_name(id_):
    assert file_name(id_) == id_


@pytest.mark.parametrize(
    "id_",
    ["CON", "con", "nul.txt", "COM1", "lpt9.a.b", "a.", "A", "..", ".", "", "../x", "/x", "a\0",
     "a b", "-rf", ".hidden", "é", "x" * 101, "\ud800", "conin$", "a~b"],
)  # fmt: skip
def test_any_other_gets_a_derived_one(id_):
    name = file_name(id_)
    assert name != id_
    assert len(name) <= 100
    assert f"{name}.x".partition(".")[0] not in ("con", "nul", "com1", "lpt9", "conin$", "")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-~")


ALPHABET = st.sampled_from("aAbB.~-_ /\\\0\n:é1") | st.characters()


def same_file(name):
    """What a file system that folds case and composes characters would take a name for."""
    return unicodedata.normalize("NFKC", name).casefold().rstrip(". ")


@given(st.lists(st.text(ALPHABET, max_size=6), min_size=2, max_size=8, unique=True))
def test_different_ids_are_different_files(ids):
    names = {same_file(file_name(id_)) for id_ in ids}
    assert len(names) == len(ids)
    for name in map(file_name, ids):
        assert not set(name) & set('/\\:*?"<>|\0\n ')
        assert not name.startswith((".", "-"))
