"""Whether Python looks for garbage."""

import gc

import pytest

from cgo.garbage import uncollected


def test_it_is_left_as_it_was_whatever_happens():
    with pytest.raises(ZeroDivisionError), uncollected():
        1 / gc.isenabled()
    assert gc.isenabled()


def test_within_a_process_that_never_looks_it_stays_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
