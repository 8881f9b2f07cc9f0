"""Numbers as people read them: in a table, on an axis, in a sentence."""

from __future__ import annotations

import math


def figure(value: float) -> str:
    """Four digits that count, thousands apart."""
    if not math.isfinite(value):
        return {True: "not a number"}.get(math.isnan(value), "infinite" if value > 0 else "−infinite")
    if value == 0.0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return _minus(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}")
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{decimals}f}"
    return _minus(shown.rstrip("0").rstrip(".") if "." in shown else shown)


def count(number: float) -> str:
    """A whole number."""
    return _minus(f"{round(number):,}")


def percent(share: float) -> str:
    """A share of 1."""
    return _minus(f"{100 * share:.1f} %") if math.isfinite(share) else figure(share)


def duration(seconds: float) -> str:
    """A length of time, by its two largest units."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        whole = int(seconds)
        return f"{whole // 60} min {whole % 60} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def ticks(low: float, high: float, num: int = 4) -> list[float]:
    """About `num` round numbers from `low` to `high`, at least one; the numbers are finite, `low` below `high`."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] or [low]


def tick_label(value: float, step: float) -> str:
    """A number on an axis whose ticks lie `step` apart."""
    if abs(value) < step * 1e-6:
        return "0"
    largest = max(abs(value), step)
    if largest >= 1e9 or step < 1e-5:
        return _minus(f"{value:.2g}")
    for unit, sign in ((1e6, "M"), (1e3, "k")):
        if largest >= 10 * unit or (largest >= unit and sign == "M"):
            return _minus(f"{value / unit:.{_decimals(step / unit)}f} {sign}")
    return _minus(f"{value:,.{_decimals(step)}f}")


def _decimals(step: float) -> int:
    """As many as tell multiples of `step` apart."""
    return next((n for n in range(7) if abs(step * 10**n - round(step * 10**n)) < 1e-6 * 10**n * step + 1e-9), 7)


def _minus(shown: str) -> str:
    return shown.replace("-", "−")
