"""Every error the project raises on purpose; all derive from `CgoError`."""

from __future__ import annotations


class CgoError(Exception):
    """Base of all errors raised by this package."""


class SpecError(CgoError, ValueError):
    """A `DataSpec`, `TrainingSpec`, `Model` or run file was refused; names the field."""


class ImportPathError(SpecError):
    """A `package.module:name` could not be resolved."""


class DataError(CgoError):
    """A data source or data set failed, or does not fit its spec."""


class CaptureError(CgoError):
    """A module cannot be captured as a graph; the model then trains as an opaque lane."""


class ModelError(CgoError):
    """A model cannot be built or trained at all: its factory, forward or optimizer failed."""


class UserExitError(ModelError):
    """User code raised what ends a process or an iteration, such as `SystemExit`; names it."""


class GraphError(CgoError):
    """A graph breaks one of the rules that `cgo.graph.verify` checks."""


class PassError(CgoError):
    """A pass failed, or returned a graph that does not verify; names the pass."""


class PlacementError(CgoError):
    """Models cannot be placed on devices: no target, or a size, speed or time that is none."""


class GraphDataError(CgoError):
    """A GraphData document was refused."""


class GraphDataVersionError(GraphDataError):
    """The document's version is not one this package reads."""


class UnknownOperatorError(GraphDataError):
    """The document names an operator that this installation does not have."""


class MissingWeightsError(GraphDataError):
    """The document refers to a weights file that is not there."""


class WeightsHashError(GraphDataError):
    """A weights file's content is not what the document says."""


class GraphDataTooLargeError(GraphDataError):
    """The document is larger than the limit."""


class DuplicateModelError(CgoError):
    """A model object, or a model id, was submitted twice."""


class EngineClosedError(CgoError):
    """The engine was used after `close`."""


class NestedEngineError(CgoError):
    """An engine was made inside a trial: a module runs its search when it is imported."""


class BudgetExhaustedError(CgoError):
    """Models were submitted past the engine's `max_models` or `max_duration_s`."""


class WaitTimeoutError(CgoError, TimeoutError):
    """`wait_models` ran out of time; the models train on."""


class TrialError(CgoError):
    """A trial's process died, or broke the protocol; names its log."""


class StoreError(CgoError):
    """An experiment directory is missing, locked or damaged."""
