"""A module that counts, for forwards that use it."""

COUNT = 0


def count():
    global COUNT
    COUNT += 1
