"""Pure functions from graph to graph; one file a pass."""
