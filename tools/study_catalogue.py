"""The studies of the SimCLR paper (Chen et al. 2020, arXiv 2002.05709 v3), as grids on any base configuration."""

from __future__ import annotations

from tools.study_cells import (
    BLURRED,
    LOSSES,
    PREDICTED,
    SIMCLR,
    STRENGTHS,
    TRANSFORMATIONS,
    UNNORMALIZED,
    batch_epochs_axes,
    batch_epochs_cell,
    color_cell,
    composition_cell,
    fixed,
    head_axes,
    head_cell,
    loss_cell,
    lr_axes,
    lr_cell,
    temperature_cell,
    transform_cell,
    width_axes,
    width_cell,
)
from tools.study_grid import ACCURACY, CONTRASTIVE_ACCURACY, ONLY, Study

CATALOGUE = {
    study.name: study
    for study in (
        Study(
            name="composition",
            title="Compositions of two transformations, applied to one branch",
            source="SimCLR v1, figure 5",
            protocol="knn",
            varies=("augment.recipe", "augment.branch_transformations", "augment.blur_prob"),
            axes=fixed(("transformation", TRANSFORMATIONS), ("and", TRANSFORMATIONS)),
            cell=composition_cell,
            symmetric=True,
            remarks=(
                "Both views share one random crop, resized; the transformations of the cell are then applied to the "
                "first view alone. On the diagonal, one transformation.",
                "Here transformations are always applied in the chain's order, so that (a, b) is (b, a): 28 cells are "
                "trained for the 49 places. The paper applied them one after the other, and its two halves differ "
                "slightly.",
            ),
        ),
        Study(
            name="color",
            title="Strength of the colour distortion",
            source="SimCLR v1, table 1",
            protocol="linear",
            varies=("augment.recipe", "augment.color_strength", "augment.blur_prob"),
            axes=fixed(("trained", (SIMCLR,)), ("colour strength", (*STRENGTHS, BLURRED))),
            cell=color_cell,
            remarks=("The paper's sixth column, AutoAugment, is not part of this project and is not measured.",),
        ),
        Study(
            name="head",
            title="Projection heads and the dimension of their output",
            source="SimCLR v1, figure 8",
            protocol="linear",
            varies=("model.projection_head.num_layers", "model.projection_head.out_dim"),
            axes=head_axes,
            cell=head_cell,
            remarks=("Without a head the loss is computed on h, whose width is the encoder's: one cell.",),
        ),
        Study(
            name="transform_prediction",
            title="What h and z = g(h) tell of the transformation that was applied",
            source="SimCLR v1, table 3",
            protocol="transformation",
            varies=("augment.extra_transformations", "model.projection_head.out_dim"),
            axes=fixed(("transformation", tuple(PREDICTED)), ("measured", (ONLY,))),
            cell=transform_cell,
            figures=("h", "z"),
            remarks=(
                "As in the paper, pretraining for the last three rows adds the transformation in question to its "
                "recipe, and z is as wide as h.",
            ),
        ),
        Study(
            name="losses",
            title="Losses",
            source="SimCLR v1, table 4",
            protocol="linear",
            varies=("model.loss", "model.semi_hard", "model.margin", "model.learn_temperature"),
            axes=fixed(("loss", tuple(LOSSES)), ("measured", (ONLY,))),
            cell=loss_cell,
            figures=(ACCURACY, CONTRASTIVE_ACCURACY),
            remarks=(
                "The paper tuned the hyperparameters of each loss and reports the best; here all losses have those of "
                "the base configuration.",
            ),
        ),
        Study(
            name="temperature",
            title="Normalisation and temperature of NT-Xent",
            source="SimCLR v1, table 5",
            protocol="linear",
            varies=("model.loss", "model.temperature", "model.normalize"),
            axes=fixed(
                (
                    "temperature",
                    ("0.05", "0.1", "0.5", "1", f"{UNNORMALIZED}10", f"{UNNORMALIZED}100"),
                ),
                ("measured", (ONLY,)),
            ),
            cell=temperature_cell,
            figures=(ACCURACY, CONTRASTIVE_ACCURACY),
            remarks=(
                "The contrastive accuracy is that of training, over the global batch, as the mean of the last epoch's "
                "logged steps; the paper's is over 4096 examples, and a smaller batch makes it easier.",
            ),
        ),
        Study(
            name="batch_epochs",
            title="Batch size and length of training",
            source="SimCLR v1, figure 9 and table B.1",
            protocol="linear",
            varies=("data.global_batch_size", "train.epochs"),
            axes=batch_epochs_axes,
            cell=batch_epochs_cell,
        ),
        Study(
            name="width",
            title="Depth and width of the encoder",
            source="SimCLR v1, figure 7",
            protocol="linear",
            varies=("model.encoder.depth", "model.encoder.width"),
            axes=width_axes,
            cell=width_cell,
        ),
        Study(
            name="lr_scaling",
            title="Linear against square-root scaling of the learning rate",
            source="SimCLR v1, table B.1",
            protocol="linear",
            varies=("data.global_batch_size", "optim.lr_scaling", "optim.base_lr"),
            axes=lr_axes,
            cell=lr_cell,
            remarks=(
                "Both rules give the same rate at the batch size of the base configuration, as the paper's 0.3·B/256 "
                "and 0.075·√B do at 4096.",
            ),
        ),
    )
}
