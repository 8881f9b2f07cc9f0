"""L-BFGS for smooth convex functions whose values carry rounding errors.

Directions are those of Nocedal & Wright, "Numerical Optimization", 2006, algorithm 7.4. The length of a step is found
by the slope along it, as in Hager & Zhang's "approximate Wolfe conditions" (2005): near the optimum, values differ by
less than their rounding error long before slopes do. Line searches that compare values, as SciPy's and torch's, then
evaluate the function over and over again and give up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

HISTORY = 10  # steps that tell the curvature
FLATTER = 0.9  # share of the slope that a step may leave (Nocedal & Wright's, for quasi-Newton directions)
MOST_TRIALS = 20  # of lengths along one direction

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a point [P] to its value, a scalar, and its gradient [P]."""


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Where the search ended."""

    point: Tensor
    """[P]."""
    value: float
    largest_derivative: float
    iterations: int
    evaluations: int
    converged: bool
    """Whether the largest derivative fell to the tolerance."""


def minimize(function: Function, start: Tensor, *, tolerance: float, max_iterations: int) -> Minimum:
    """Go down from `start` until no derivative is larger than `tolerance`.

    Args:
        function: convex and differentiable, with curvature of the order of 1 or below; computed in float64.
        start: [P], float64.
        tolerance: of the derivatives.
        max_iterations: at most so many steps.
    """
    point = start.clone()
    value, gradient = function(point)
    steps: deque[tuple[Tensor, Tensor]] = deque(maxlen=HISTORY)
    iterations, evaluations = 0, 1
    while iterations < max_iterations and float(gradient.abs().max()) > tolerance:
        direction = _direction(gradient, steps)
        found, trials = _line_search(function, point, direction, gradient)
        evaluations += trials
        if found is None:
            break
        length, value, new_gradient = found
        step, change = length * direction, new_gradient - gradient
        if float(step @ change) > 0:
            steps.append((step, change))
        point, gradient = point + step, new_gradient
        iterations += 1
    largest = float(gradient.abs().max())
    return Minimum(
        point=point,
        value=float(value),
        largest_derivative=largest,
        iterations=iterations,
        evaluations=evaluations,
        converged=largest <= tolerance,
    )


def _direction(gradient: Tensor, steps: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """Minus the gradient times the inverse curvature that the last steps tell of."""
    direction = -gradient
    if not steps:
        return direction
    shares = []
    for step, change in reversed(steps):
        share = (step @ direction) / (step @ change)
        direction = direction - share * change
        shares.append(share)
    step, change = steps[-1]
    direction = direction * ((step @ change) / (change @ change))
    for (step, change), share in zip(steps, reversed(shares), strict=True):
        direction = direction + (share - (change @ direction) / (step @ change)) * step
    return direction


def _line_search(
    function: Function, point: Tensor, direction: Tensor, gradient: Tensor
) -> tuple[tuple[float, Tensor, Tensor] | None, int]:
    """A length at which the slope has flattened, with value and gradient there, and the trials it took.

    None where rounding hides the slope. Of a convex function the slope rises along the direction: it brackets the
    length, and a straight line between the slopes at both ends tells where to look.
    """
    first = float(gradient @ direction)
    if first >= 0:
        return None, 0
    low, low_slope, high, high_slope = 0.0, first, float("inf"), 0.0
    length = 1.0
    for trial in range(1, MOST_TRIALS + 1):
        value, new_gradient = function(point + length * direction)
        slope = float(new_gradient @ direction)
        if FLATTER * first <= slope <= -first / 2:  # past the middle a convex function may lie higher than it began
            return (length, value, new_gradient), trial
        if slope < 0:
            low, low_slope = length, slope
        else:
            high, high_slope = length, slope
        if high == float("inf"):
            length *= 4
        else:
            share = -low_slope / (high_slope - low_slope)
            length = low + min(max(share, 0.1), 0.9) * (high - low)
    return None, MOST_TRIALS
