"""The families of the equivalence tests: factories in `support.nets` with their arguments."""

FAMILIES = {
    "mlp": {"width": 16},
    "cnn": {"width": 4},
    "residual": {"width": 4, "blocks": 2},
    "cells": {"edges": "conv3 skip conv1 pool none conv3"},
    "encoder": {"d": 8},
    "lstm": {"hidden": 12},
    "tied": {"width": 16},
}
