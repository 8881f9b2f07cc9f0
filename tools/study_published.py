"""What the SimCLR paper reports, to stand beside what a study measures.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", 2020, arXiv
2002.05709 v3. Top-1 accuracy on ImageNet, percent, by linear evaluation of a ResNet-50 (1×) pretrained for 100 epochs
with batches of 4096, unless a table says otherwise. Only numbers that are printed in the paper: nothing is read off a
plot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tools.study_grid import ACCURACY, CONTRASTIVE_ACCURACY, ONLY

Figures = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers of the paper, by row and column of the study's table."""

    source: str
    figures: Mapping[tuple[str, str], Figures] = field(default_factory=dict)
    """For each place what is known of it, percent."""
    remarks: tuple[str, ...] = ()
    """What the paper says in words, or in a plot."""

    def at(self, row: str, column: str, figure: str = ACCURACY) -> float | None:
        """The number of a place, or None where the paper prints none."""
        value = self.figures.get((row, column), {}).get(figure)
        return None if value is None else float(value)

    @property
    def rows(self) -> tuple[str, ...]:
        """In the paper's order."""
        return tuple(dict.fromkeys(row for row, _ in self.figures))

    @property
    def columns(self) -> tuple[str, ...]:
        """In the paper's order."""
        return tuple(dict.fromkeys(column for _, column in self.figures))


def _matrix(columns: str, **rows: str) -> dict[tuple[str, str], Figures]:
    """From lines of words; `-` where the paper has nothing."""
    return _table(columns.split(), {name: values.split() for name, values in rows.items()})


def _table(columns: list[str], rows: Mapping[str, list[str]]) -> dict[tuple[str, str], Figures]:
    return {
        (row, column): {ACCURACY: float(value)}
        for row, values in rows.items()
        for column, value in zip(columns, values, strict=True)
        if value != "-"
    }


AVERAGE = "average"
BATCH_EPOCHS = {  # table B.1: top-1 with linear / square-root scaling
    "256": "57.5/62.8 61.9/64.3 64.7/65.7 66.6/66.5",
    "512": "60.7/63.8 64.0/65.6 66.2/66.7 67.8/67.4",
    "1024": "62.8/64.3 65.3/66.1 67.2/67.2 68.5/68.3",
    "2048": "64.0/64.7 66.1/66.8 68.1/67.9 68.9/68.8",
    "4096": "64.6/64.5 66.5/66.8 68.2/68.0 68.9/69.1",
    "8192": "64.8/64.8 66.6/67.0 67.8/68.3 69.0/69.1",
}
EPOCHS = ["100", "200", "400", "800"]

PUBLISHED = {
    "composition": Published(
        source="figure 5, the numbers in its cells; the last column is the average of the row",
        figures=_matrix(
            "crop cutout color sobel noise blur rotate average",
            crop="33.1 33.9 56.3 46.0 39.9 35.0 30.2 39.2",
            cutout="32.2 25.6 33.9 40.0 26.5 25.2 22.4 29.4",
            color="55.8 35.5 18.8 21.0 11.4 16.5 20.8 25.7",
            sobel="46.2 40.6 20.9 4.0 9.3 6.2 4.2 18.8",
            noise="38.8 25.8 7.5 7.6 9.8 9.8 9.6 15.5",
            blur="35.1 25.2 16.6 5.8 9.7 2.6 6.7 14.5",
            rotate="30.0 22.5 20.7 4.3 9.7 6.5 2.6 13.8",
        ),
    ),
    "color": Published(
        source="table 1",
        figures=_table(
            ["1/8", "1/4", "1/2", "1", "1 (+blur)", "AutoAug"],
            {
                "SimCLR": ["59.6", "61.0", "62.6", "63.2", "64.5", "61.1"],
                "supervised": ["77.0", "76.7", "76.5", "75.7", "75.4", "77.1"],
            },
        ),
    ),
    "head": Published(
        source="figure 8, a plot: its numbers are not printed",
        remarks=(
            "Section 4.2: a non-linear head is better than a linear one (+3 %), and much better than none (> 10 %); "
            "with a head, results are similar whatever its output dimension.",
        ),
    ),
    "transform_prediction": Published(
        source="table 3: accuracy of MLPs that predict the transformation, percent",
        figures={
            ("color_vs_grayscale", ONLY): {"chance": 80.0, "h": 99.3, "z": 97.4},
            ("rotation", ONLY): {"chance": 25.0, "h": 67.6, "z": 25.6},
            ("original_vs_corrupted", ONLY): {"chance": 50.0, "h": 99.5, "z": 59.6},
            ("original_vs_sobel", ONLY): {"chance": 50.0, "h": 96.6, "z": 56.3},
        },
    ),
    "losses": Published(
        source="table 4, the hyperparameters of each loss tuned",
        figures={
            ("NT-Xent", ONLY): {ACCURACY: 63.9},
            ("NT-Logistic", ONLY): {ACCURACY: 51.6},
            ("NT-Logistic (semi-hard)", ONLY): {ACCURACY: 57.9},
            ("Margin", ONLY): {ACCURACY: 50.9},
            ("Margin (semi-hard)", ONLY): {ACCURACY: 57.5},
        },
    ),
    "temperature": Published(
        source="table 5; its contrastive accuracy is over 4096 examples",
        figures={
            ("0.05", ONLY): {ACCURACY: 59.7, CONTRASTIVE_ACCURACY: 90.5},
            ("0.1", ONLY): {ACCURACY: 64.4, CONTRASTIVE_ACCURACY: 87.8},
            ("0.5", ONLY): {ACCURACY: 60.7, CONTRASTIVE_ACCURACY: 68.2},
            ("1", ONLY): {ACCURACY: 58.0, CONTRASTIVE_ACCURACY: 59.1},
            ("not normalised, 10", ONLY): {ACCURACY: 57.2, CONTRASTIVE_ACCURACY: 91.7},
            ("not normalised, 100", ONLY): {ACCURACY: 57.0, CONTRASTIVE_ACCURACY: 92.1},
        },
    ),
    "batch_epochs": Published(
        source="table B.1, linear scaling of the learning rate (the numbers of figure 9)",
        figures=_table(
            EPOCHS, {batch: [pair.split("/")[0] for pair in line.split()] for batch, line in BATCH_EPOCHS.items()}
        ),
    ),
    "width": Published(
        source="figure 7, a plot: its numbers for 100 epochs are not printed; table 6, at 1000 epochs, prints these",
        figures=_table(["1", "2", "4"], {"50": ["69.3", "74.2", "76.5"]}),
    ),
    "lr_scaling": Published(
        source="table B.1, 100 epochs",
        figures=_table(["linear", "sqrt"], {batch: line.split()[0].split("/") for batch, line in BATCH_EPOCHS.items()}),
    ),
}
