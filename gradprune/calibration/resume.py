"""Resumable calibration: the engine's sums are saved every few samples, so that a later run can resume from them.

The file, `results/.NAME.calibration`, is beside the future results folder. It holds the engine's state and the identity
of its run, and is deleted once the results are written.
"""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from gradprune.calibration.engine import ImportanceEngine
from gradprune.calibration.sealed import DamagedFileError, read_sealed, write_sealed
from gradprune.config import PruneConfig
from gradprune.errors import CheckpointError
from gradprune.models.digest import model_digest, tensors_digest
from gradprune.run import Run
from gradprune.version import __version__

logger = logging.getLogger(__name__)

# The options on which the sums depend.
_OPTIONS = (
    "prune_kinds",
    "num_samples",
    "seq_len",
    "batch_size",
    "seed",
    "reduction",
    "gradient_fix",
    "use_gradient_checkpointing",
)


def calibration_file(config: PruneConfig) -> Path | None:
    """The path at which the state of a run's calibration is saved; None for a run that writes nothing."""
    if config.output_name is None:
        return None
    return Path(config.output_dir) / f".{config.output_name}.calibration"


def forget_calibration(config: PruneConfig) -> None:
    """Delete the saved state of a run's calibration, after the results are written."""
    path = calibration_file(config)
    if path is not None:
        path.unlink(missing_ok=True)


class Resumable:
    """The state of one run's calibration; saved if `checkpoint_every` is set, restored if `resume` is."""

    def __init__(self, run: Run, engine: ImportanceEngine, samples: Tensor) -> None:
        """Identify the run; its files are not touched yet.

        Args:
            run: the run.
            engine: its engine, which has not run yet.
            samples: [N, T] int64, the samples on which the engine's steps will run.
        """
        self._engine = engine
        self._samples = samples
        self._batch_size = run.config.batch_size
        self._every = run.config.checkpoint_every
        self._saved = 0
        self._path = calibration_file(run.config)
        self._identity = _identity(run, engine, samples) if self._every is not None or run.config.resume else {}

    def restore(self, *, resume: bool) -> int:
        """Restore the engine to an interrupted run's state, if there is one; return the number of samples in it.

        Args:
            resume: whether to resume; if not, the existence of such a state is only logged, and 0 returned.

        Raises:
            CheckpointError: the file is damaged, or belongs to a run with another model, data or options; says what
                differs.
        """
        if self._path is None or not self._path.is_file():
            return 0
        if not resume:
            logger.warning("'%s' of an interrupted run is not used; --resume would go on with it", self._path)
            return 0
        try:
            state, record = read_sealed(self._path)
        except DamagedFileError as error:
            raise CheckpointError(
                f"resume: '{self._path}' is damaged ({error}); leave out --resume to start again"
            ) from error
        belongs, done = record["belongs"], int(record["done"])
        differing = [
            f"{name} ({belongs.get(name)}, now {value})"
            for name, value in self._identity.items()
            if belongs.get(name) != value
        ]
        if differing:
            raise CheckpointError(
                f"resume: '{self._path}' belongs to a run with another {', another '.join(differing)}; give the same "
                "options, or leave out --resume to start again"
            )
        self._engine.restore(state, list(self._samples[:done].split(self._batch_size)))
        self._saved = done
        logger.warning("calibration goes on after %d of %d samples", done, len(self._samples))
        return done

    def save(self, done: int) -> None:
        """Save the state after `done` samples, if `checkpoint_every` samples were processed since the last time.

        It is also saved after the last sample.

        Raises:
            CheckpointError: the file cannot be written.
        """
        due = self._every is not None and (done - self._saved >= self._every or done == len(self._samples))
        if self._path is None or not due or done == self._saved:
            return
        try:
            write_sealed(self._path, self._engine.state(), {"belongs": self._identity, "done": done})
        except OSError as error:
            raise CheckpointError(f"checkpoint_every: '{self._path}' cannot be written: {error.strerror}") from error
        self._saved = done


def _identity(run: Run, engine: ImportanceEngine, samples: Tensor) -> dict[str, Any]:
    """The run's identity: everything that must match for a resumed run to give the same bytes."""
    return {
        **{name: getattr(run.config, name) for name in _OPTIONS},
        "number of samples with gradients": len(samples),
        "backend": engine.backend,
        "evidence": engine.collects,
        "device": run.view.model.device.type,
        "gradprune": __version__,
        "model": model_digest(run.view.model),
        "data": tensors_digest([run.samples.calibration]),
    }
