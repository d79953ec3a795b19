"""Every failure a user can cause, in one tree.

    MoietyError
    ├── ConfigError        a value, or two values together, cannot describe a model or a run
    ├── UsageError         a command or function was called wrongly
    ├── BudgetError        a model cannot be run within the memory that it is given
    ├── BusyError          too much was asked for at a time; later it may be taken in
    ├── DataError          a text or a token file cannot be trained on
    ├── FormatError        a file is not what it claims to be: truncated, altered, unknown layout
    ├── StorageError       the system refused to read or write: disk full, no permission
    ├── DependencyError    a package, compiler or device that this needs is not here
    ├── ServerError        another server cannot be reached, refuses, or breaks its answer off
    ├── TrainingError      a run stopped on purpose: non-finite steps in a row, no signal to the router
    └── CheckFailed        a check ran to its end and its answer is no

Each says what was given, what is allowed, and (`hint`) what to do. What only a bug of ours can
cause is an `assert` with the values in it, never one of these.
"""

__all__ = [
    "BudgetError",
    "BusyError",
    "CheckFailed",
    "ConfigError",
    "DataError",
    "DependencyError",
    "FormatError",
    "MoietyError",
    "ServerError",
    "StorageError",
    "TrainingError",
    "UsageError",
]


class MoietyError(Exception):
    """Base of all failures a user can cause. `exit_code` is what the command line returns.

    Args:
        message: What was given and what is allowed.
        hint: What to do about it, one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(MoietyError):
    """A value, or two values together, cannot describe a model or a run."""

    exit_code = 2


class UsageError(MoietyError):
    """A command or function was called wrongly."""

    exit_code = 2


class BudgetError(MoietyError):
    """A model cannot be run within the memory that it is given."""

    exit_code = 2


class BusyError(MoietyError):
    """Too much was asked for at a time; later it may be taken in."""


class DataError(MoietyError):
    """A text or a token file cannot be trained on."""


class FormatError(MoietyError):
    """A file is not what it claims to be: truncated, altered, or of an unknown layout."""


class StorageError(MoietyError):
    """The system refused to read or write: disk full, no permission, no such folder."""


class DependencyError(MoietyError):
    """A package, compiler or device that this needs is not here."""

    exit_code = 3


class ServerError(MoietyError):
    """Another server cannot be reached, refuses, or breaks its answer off.

    Args:
        message: What it said.
        hint: What to do about it.
        kind: Its HTTP status, or connection, timeout or broken.
        code: Its own word for it, where it has one.
    """

    def __init__(self, message: str, *, kind: str, code: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind, self.code = kind, code


class TrainingError(MoietyError):
    """A run stopped on purpose: too many non-finite steps, or a loss that cannot reach the router."""


class CheckFailed(MoietyError):
    """A check ran to its end and its answer is no."""

    exit_code = 4
