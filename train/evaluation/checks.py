"""What every protocol asks of features and labels before it starts."""

from __future__ import annotations

from torch import Tensor


def check_labelled(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Raise a ValueError naming the split unless features are finite [N, D] and labels integers [N] ≥ 0."""
    for split, features, labels in (("training", train_x, train_y), ("test", test_x, test_y)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise ValueError(
                f"{split} features must be [N, D] with one label each and N ≥ 1, "
                f"got {list(features.shape)} with labels {list(labels.shape)}"
            )
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise ValueError(f"{split} labels must be integers from 0, got {labels.dtype} from {labels.min()}")
        finite = features.isfinite().all(dim=1)
        if not bool(finite.all()):
            raise ValueError(
                f"{split} features must be finite, got NaN or infinity in {int((~finite).sum())} of "
                f"{len(features)} samples, first {int((~finite).nonzero()[0])}; the encoder has diverged"
            )
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"features must have one width, got {train_x.shape[1]} and {test_x.shape[1]}")
