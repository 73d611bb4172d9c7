"""What a user can be told. Every error here crosses Ray process boundaries, so each pickles by its message."""

INTERRUPTED = 130
"""The exit code of a command that was interrupted, as shells have it: 128 + SIGINT."""


class TpawError(Exception):
    """Base of every error whose message is meant for the user: what was found, where, and what is expected.

    `exit_code` is what the `tpaw` command ends with; see `docs/cli.md`.
    """

    exit_code = 1


class ConfigError(TpawError):
    """A config file, preset or override that cannot be used."""

    exit_code = 2


class DataError(TpawError):
    """A row, file or data set that cannot be read as conversations."""

    exit_code = 3


class CheckpointError(TpawError):
    """A model directory that is missing, damaged or unsuitable."""

    exit_code = 4


class RunError(TpawError):
    """A run directory that does not fit what is asked of it."""

    exit_code = 5


class DamageError(RunError):
    """A committed file that is missing, or not as it was written."""


class ResourceError(TpawError):
    """The cluster or the disk cannot hold what the config asks for."""

    exit_code = 6


class GenerationError(TpawError):
    """An opponent, or the judge of its answers, could not answer."""

    exit_code = 7


class LearnerError(TpawError):
    """The update of the live policy failed."""

    exit_code = 8


class DivergedError(LearnerError):
    """The loss or the gradient of an update, or what its checkpoint makes of held-out targets, is not a finite number."""

    exit_code = 9
