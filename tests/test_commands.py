"""Lines of JSON into a trial: what is read as a command, and what waits for the trial."""

import io
import os

import pytest

from cgo.commands import MOST_LINE, Command, Commands, decode, encode
from cgo.errors import TrialError


@pytest.mark.parametrize(
    "command",
    [
        Command("add", "/experiment/trials/t0001/graph.json", ("a",)),
        Command("stop", models=("a", "b")),
        Command("drain"),
    ],
)
def test_a_command_is_read_as_it_was_written(command):
    line = encode(command)
    assert "\n" not in line
    assert decode(line) == command


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[]", "3", "null", "{}", '{"kind":"jump"}', '{"kind":["add"]}', '{"kind":"add"}',
        '{"kind":"add","document":3}', '{"kind":"stop"}', '{"kind":"stop","models":"a"}x',
        '{"kind":"stop","models":[3]}', '{"kind":"stop","models":["../a"]}',
        '{"kind":"stop","models":3}', '{"kind":"stop","models":"ab"}', "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_command_is_refused(line):
    with pytest.raises(TrialError, match="not a command"):
        decode(line)


def test_documents_wait_in_order_and_stops_together():
    commands = Commands()
    assert commands.first() is None
    for command in (Command("add", "x"), Command("stop", models=("a",)), Command("add", "y"),
                    Command("stop", models=("b", "c"))):  # fmt: skip
        commands.put(command)
    assert commands.first() == Command("add", "x")
    commands.drop()
    assert commands.first() == Command("add", "y")
    assert commands.stopped == {"a", "b", "c"}
    commands.forget(["b"])
    assert commands.stopped == {"a", "c"}
    assert not commands.draining
    commands.put(Command("drain"))
    assert commands.draining


def test_broken_lines_are_passed_over(caplog):
    commands = Commands()
    broken = '{"kind":"add","document":"' + "x" * MOST_LINE + '"}\n'
    text = f"noise\n{encode(Command('add', 'x'))}\n{broken}{encode(Command('drain'))}\n"
    commands.read(io.StringIO(text))
    assert commands.first() == Command("add", "x")
    assert commands.draining
    assert caplog.text.count("not a command") == 3  # the long line is two


def test_a_thread_follows_a_pipe():
    read, write = os.pipe()
    commands = Commands.following(read)
    os.write(write, (encode(Command("stop", models=("a",))) + "\n").encode())
    while not commands.stopped:
        pass
    os.close(write)
    assert commands.stopped == {"a"}
