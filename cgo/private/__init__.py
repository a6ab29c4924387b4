"""Names of torch's that are not public, one module for each subject.

Nothing else in this package reaches for them. Each module says in `NAMES` what it leans on, so that
`tests/test_private.py` tells which of them is gone in another version; and what is optional falls
back where it is missing.
"""
