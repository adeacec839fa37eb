"""Exceptions of gradprune. Every message names the argument, its value and what would be right."""


class GradPruneError(Exception):
    """Base of every error that gradprune raises on purpose; the command line turns it into exit code 2."""


class ConfigError(GradPruneError):
    """An option has a value outside its domain, or options contradict each other."""


class UnsupportedArchitectureError(GradPruneError):
    """The model's architecture, or a layer in it, has no description in `gradprune.models`."""


class CalibrationError(GradPruneError):
    """The calibration or evaluation text is missing, empty or too short."""


class EvaluationError(GradPruneError):
    """Questions to ask a model are missing or malformed, or what asks them is not installed."""


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
    """A pruned model cannot be trained as asked: no teacher, another vocabulary, another run's state."""


class OutOfMemoryError(GradPruneError):
    """Memory ran out; the message says what was running and which options need less."""


def one_line(error: BaseException) -> str:
    """The start of another library's error message, which may go on for paragraphs; without a full stop."""
    words = " ".join(str(error).split())
    if not words or isinstance(error, KeyError):  # whose message is the bare key
        words = f"{type(error).__name__} {words}".strip()
    message = words if len(words) <= 200 else words[:200].rsplit(" ", 1)[0] + " ..."
    return message.rstrip(".")
