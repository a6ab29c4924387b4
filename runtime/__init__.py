"""Executes a GraphData inside a trial."""
