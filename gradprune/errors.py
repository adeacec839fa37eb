"""Exceptions of gradprune. Every message names the argument, its value and what is expected."""


class GradPruneError(Exception):
    """Base class of every error that gradprune raises on purpose; the command line turns it into exit code 2."""


class ConfigError(GradPruneError):
    """An option has a value outside its domain, or options contradict each other."""


class UnsupportedArchitectureError(GradPruneError):
    """The architecture is untested and fails its self-test, or a projection is not a plain linear layer."""


class CalibrationError(GradPruneError):
    """The calibration or evaluation text is missing, empty or too short."""


class EvaluationError(GradPruneError):
    """The questions of a task are missing or malformed, or lm-eval is needed and not installed."""


class NonFiniteError(GradPruneError):
    """A loss or a gradient is NaN or infinite; the message names the layer and the sample."""


class SelectionError(GradPruneError):
    """The requested ratio cannot be reached under the given constraints."""


class CheckpointError(GradPruneError):
    """A checkpoint is missing, truncated, or would be overwritten."""


class BackendUnavailableError(GradPruneError):
    """A backend was asked for by name and cannot run here; the message gives the reason."""


class ExportError(GradPruneError):
    """A model cannot be written in the requested format; the message gives the reason."""


class RecoveryError(GradPruneError):
    """A pruned model cannot be trained as requested: no teacher, a different vocabulary, or another run's state."""


class RankError(GradPruneError):
    """One of the processes that torchrun started failed or disappeared; the message says which and why."""


class OutOfMemoryError(GradPruneError):
    """Memory ran out; the message says what was running and which options need less."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: "1 sample", "1,024 samples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(error: BaseException) -> str:
    """Return the message of an error that is not gradprune's: one line, no full stop, cut at about 200 characters.

    Of an `OSError`, only the operating system's explanation is returned, without the error number and the file name.
    """
    system = isinstance(error, OSError) and error.strerror
    words = " ".join(str(system or error).split())
    if not words or isinstance(error, KeyError):  # its message is only the key
        words = f"{type(error).__name__} {words}".strip()
    return words.rstrip(".") if len(words) <= 200 else words[:200].rsplit(" ", 1)[0] + " ..."
