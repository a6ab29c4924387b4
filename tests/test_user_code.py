"""What user code raises, made harmless; and signals, which are not."""

import signal
import subprocess
import sys
import threading

import pytest

from cgo.errors import UserExitError
from cgo.user_code import Terminated, contained, told, where


class Vanish(BaseException):
    pass


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (SystemExit(), "SystemExit"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(7), "StopIteration: 7"),
        (StopAsyncIteration(), "StopAsyncIteration"),
        (Vanish("away"), "Vanish: away"),
    ],
)
def test_what_leaves_a_process_or_an_iteration_becomes_an_error_that_names_it(raised, text):
    with pytest.raises(UserExitError) as caught, contained:
        raise raised
    assert str(caught.value) == text
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [ValueError("plain"), MemoryError(), Terminated(143)])
def test_everything_else_passes_as_it_is(raised):
    with pytest.raises(type(raised)) as caught, contained, contained:
        raise raised
    assert caught.value is raised


def test_nothing_happens_where_nothing_is_raised():
    with contained:
        value = 3
    assert value == 3


def test_an_interrupt_from_the_keyboard_reaches_the_main_thread_and_no_other():
    with pytest.raises(KeyboardInterrupt), contained:
        raise KeyboardInterrupt
    seen = []

    def work():
        try:
            with contained:
                raise KeyboardInterrupt
        except UserExitError as error:
            seen.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["KeyboardInterrupt"]


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit(1)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("lr"), "KeyError: 'lr'"),
        (ValueError(), "ValueError"),
        (UserExitError("SystemExit: 3"), "SystemExit: 3"),
        (Unprintable(), "Unprintable, whose message cannot be printed"),
    ],
)
def test_an_error_in_words(error, text):
    assert told(error) == text


def test_the_line_that_raised_is_that_of_user_code():
    def leaves():
        raise SystemExit

    with pytest.raises(UserExitError) as caught, contained:
        leaves()
    assert where(caught.value).startswith(f"{__file__}:")
    assert where(caught.value).endswith("in leaves")
    assert where(ValueError("never raised")) == "raised nowhere"


_CHILD = """
import sys, time
from cgo.user_code import Terminated, contained, terminate_on_signals, told

terminate_on_signals()
try:
    try:
        with contained:
            print("in user code", flush=True)
            if len(sys.argv) > 1:
                raise KeyboardInterrupt
            time.sleep(60)
    except Exception as error:
        print(told(error), flush=True)
except Terminated as ended:
    sys.exit(ended.code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_trial_in_the_midst_of_user_code(number):
    child = subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "in user code\n"
    child.send_signal(number)
    rest, _ = child.communicate(timeout=30)
    assert (child.returncode, rest) == (128 + number, "")


def test_in_a_trial_a_keyboard_interrupt_without_a_signal_is_the_models_own():
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, "raise"], capture_output=True, text=True, timeout=30
    )
    assert (child.returncode, child.stdout) == (0, "in user code\nKeyboardInterrupt\n")
