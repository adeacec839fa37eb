"""Saves the calibration's evidence if a later stage of the run fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gradprune.calibration.evidence import Evidence
from gradprune.errors import GradPruneError


@contextmanager
def evidence_kept(evidence: Evidence, output: Path | None) -> Iterator[None]:
    """Context manager that, if its body fails, tries to save the evidence beside the future results folder.

    Args:
        evidence: the run's evidence.
        output: the results folder; None: nothing is saved.

    Raises:
        GradPruneError: the body raised it; if the evidence was saved, the message says where.
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
