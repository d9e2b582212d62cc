"""What plait raises.

PlaitError                 status 1: the work failed
├── RequestError           status 2: what the user asked cannot be done
│   ├── TargetError        the TARGET does not exist, raises, or returns no Job
│   ├── PlanError          a plan that is malformed or does not fit devices, batch or model
│   ├── HardwareError      an unknown accelerator, a broken cluster, offer or catalogue file
│   ├── CaptureError       a model that torch.export cannot capture
│   ├── CheckpointError    a checkpoint that is broken or belongs to another model
│   ├── TableError         a table of measurements that cannot be read
│   └── ServeError         an unknown serving backend, a broken artefact, inputs outside what was exported
├── DivergedError          a loss or gradient that is not finite
├── ParityError            the plan does not compute what one device computes
└── WorkerError            a process of the run died
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "CheckpointError",
    "DivergedError",
    "HardwareError",
    "ParityError",
    "PlaitError",
    "PlanError",
    "RequestError",
    "ServeError",
    "TableError",
    "TargetError",
    "WorkerError",
]


class PlaitError(Exception):
    """Something a person should read: first line what and where, `hint` what to change."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries; keep the hint.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[PlaitError], message: str, hint: str) -> PlaitError:
    return kind(message, hint=hint)


class RequestError(PlaitError):
    """What the user asked cannot be done."""

    exit_status = 2


class TargetError(RequestError):
    """The TARGET does not exist, raises, or returns no Job."""


class PlanError(RequestError):
    """A plan that is malformed, or does not fit the devices, the batch or the model."""


class HardwareError(RequestError):
    """An unknown accelerator, or a broken cluster, offer or catalogue file."""


class CaptureError(RequestError):
    """A model that cannot be captured; says which line stopped it."""


class CheckpointError(RequestError):
    """A checkpoint that is broken or belongs to another model."""


class TableError(RequestError):
    """A table of measurements that cannot be read."""


class ServeError(RequestError):
    """An unknown serving backend, an artefact that is broken or hostile, or inputs outside what was exported."""


class DivergedError(PlaitError):
    """A loss, gradient or parameter that is not finite."""


class ParityError(PlaitError):
    """The plan does not compute what one device computes."""


class WorkerError(PlaitError):
    """A process of the run died."""
