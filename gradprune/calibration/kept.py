"""Keep the calibration evidence when a later stage of the run fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gradprune.calibration.evidence import Evidence
from gradprune.errors import GradPruneError


@contextmanager
def evidence_kept(evidence: Evidence, output: Path | None) -> Iterator[None]:
    """If the body fails, try to write the evidence next to where the results folder would have been.

    Args:
        evidence: of the run.
        output: the results folder; nothing is kept without one.

    Raises:
        GradPruneError: what the body raised; the message says where the evidence is.
    """
    try:
        yield
    except (GradPruneError, OSError, MemoryError, RuntimeError) as error:
        if output is None:
            raise
        kept = output.with_name(f"{output.name}.evidence.safetensors")
        try:
            evidence.save(kept)
        except (OSError, SafetensorError):
            kept.unlink(missing_ok=True)
            raise error from None
        if isinstance(error, GradPruneError):
            kind = type(error)
            raise kind(f"{error} (what calibration found is kept: --evidence_file '{kept}')") from error
        raise
