"""Engine runs over a few batches."""

from gradprune.calibration.engine import ImportanceEngine, Scores


def run_engine(model, ids, method="taylor_2nd", reduction="sample", batch_size=2, **options) -> Scores:
    with ImportanceEngine(model, method, reduction, options.pop("backend", "reference"), **options) as engine:
        for batch in ids.split(batch_size):
            engine.step(batch)
    return engine.scores()
