"""The `cgo` command."""
