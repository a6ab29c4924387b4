"""`python -m cgo` is the `cgo` command."""

from cgo.cli import main

main()
