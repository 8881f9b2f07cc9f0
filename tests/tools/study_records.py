"""Records of cells as a study leaves them, without training."""

from tools.study_records import keep, trials_of


def write_record(trial, protocol="knn", *, seconds=2.0, options=(), **figures):
    """Beside the run directory of a trial, which there is none of."""
    keep(
        trial,
        f"{protocol}.json",
        {
            "cell": trial.cell.name,
            "seed": trial.seed,
            "protocol": protocol,
            "evaluation_options": list(options),
            "figures": figures,
            "seconds": {"train": seconds, "evaluate": 1.0},
        },
    )


def write_records(grid, out, accuracy, *, num_seeds=1, protocol="knn"):
    """`accuracy(cell, seed)` of every cell."""
    for trial in trials_of(grid, num_seeds, out):
        write_record(trial, protocol, accuracy=accuracy(trial.cell, trial.seed))
