"""Ends of processes and of logs, in words."""

import pytest

from cgo.platforms.logs import how_ended, last_lines


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-11, "signal SIGSEGV"),
        (-64, "signal SIGRTMAX"),
        (-63, "signal 63"),
        (3, "exit code 3"),
        (0, "exit code 0, before its models had ended"),
    ],
)
def test_exit_codes_in_words(code, words):
    assert how_ended(code) == words


def test_the_end_of_a_large_log_is_bounded(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("x" * 200_000 + "\n" + "one\n" + "y" * 1000 + "\n\xff\n", encoding="latin-1")
    first, second, third = last_lines(path, 3).splitlines()
    assert first == "one"
    assert second == "y" * 300 + " ..."
    assert third
    assert last_lines(path, 3, path.stat().st_size - 2) == third
    assert last_lines(tmp_path / "none.txt", 3) == ""
