"""Numbers as people read them. Only here do seconds become milliseconds."""

import math

NONE = "-"


def significant(value: float | int | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent for everyday sizes; "-" for nothing.

    >>> significant(0.012345), significant(1316.6), significant(12.0), significant(None)
    ('0.0123', '1317', '12', '-')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size < 7:
        return f"{value:.{digits - 1}e}"
    decimals = max(digits - 1 - size, 0)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def milliseconds(value: float | int | None) -> str:
    """A time in seconds, told in milliseconds; below a picosecond it is what rounding left of 0.

    >>> milliseconds(1.3166), milliseconds(0.0845), milliseconds(0.00123), milliseconds(3.2e-18)
    ('1317 ms', '84.5 ms', '1.23 ms', '0 ms')
    """
    if value is None or not math.isfinite(value):
        return NONE
    return f"{significant(1000 * value if abs(value) >= 1e-12 else 0.0)} ms"


def percent(value: float | int | None) -> str:
    """A fraction as a percentage with one decimal.

    >>> percent(0.0523), percent(-1.0)
    ('5.2 %', '-100.0 %')
    """
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def quantity(value: float | int | None, unit: str) -> str:
    """A value with its unit; times in milliseconds, pure numbers bare.

    >>> quantity(0.0179, "s"), quantity(0.00029, "s/req"), quantity(1.2, "1")
    ('17.9 ms', '0.29 ms/req', '1.2')
    """
    if value is None:
        return NONE
    if unit == "s" or unit.startswith("s/"):
        return f"{significant(1000 * value)} m{unit}"
    return significant(value) if unit in ("", "1") else f"{significant(value)} {unit}"


METRIC_UNITS = {"throughput": "req/s", "utilization": "1", "capacity": "req/s", "goodput": "req/s", "cost": "1"}
METRIC_UNITS |= {"energy": "J", "memory": "GB"}


def metric_value(name: str, value: float | int | None) -> str:
    """The value of a metric by its name: latencies in milliseconds, rates in req/s."""
    return quantity(value, METRIC_UNITS.get(name, "s")) if value is not None else NONE


def span(values: list[float] | None, unit: str = "") -> str:
    """A range of measured values, such as "0.5 to 4 req/s".

    >>> span([64.0, 64.0], "tok"), span([0.5, 4.0], "req/s"), span(None)
    ('64 tok', '0.5 to 4 req/s', '-')
    """
    if values is None:
        return NONE
    low, high = (f"{value:g}" for value in values)
    return (low if low == high else f"{low} to {high}") + (f" {unit}" if unit else "")
