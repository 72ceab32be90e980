"""Outcomes and errors shared by every room of the house.

An *outcome* is a value: a saturated or infeasible system is an answer with numbers. An *error* is an
exception that names what was got, what is allowed and what to do.
"""

import equinox as eqx


class RESULTS(eqx.Enumeration):
    """How a steady state ended. Traced, so it survives `jax.jit` and `jax.vmap`.

    `successful` -- one equilibrium below capacity; `saturated` -- the arrival rate is above 0.999 of capacity, so
    latency grows without bound and the reported numbers are those at 0.999 of capacity; `metastable` -- the
    smallest equilibrium is reported, but a burst can push the system over its peak throughput into overload;
    `unconverged` -- the inner solve left a residual above its tolerance, do not trust the gradients.
    """

    successful = ""
    saturated = (
        "The arrival rate is at or above capacity. Lower it, raise max_batch_size, or choose a cheaper configuration."
    )
    metastable = "More than one equilibrium exists at this load. A burst may not recover: keep a margin."
    unconverged = "The steady state did not converge. Check the step time for NaN, infinite or negative values."


def outcome_name(result) -> str:
    """Name of a concrete outcome: ``outcome_name(RESULTS.saturated) == "saturated"``."""
    for name in ("successful", "saturated", "metastable", "unconverged"):
        if bool(result == getattr(RESULTS, name)):
            return name
    raise ValueError(f"not a diffspec outcome: {result!r}")


class DiffspecError(Exception):
    """Base of every error that diffspec raises on purpose."""


class InputError(DiffspecError):
    """Bad input (a file, a row, an option). The command line exits with 2."""


class NoResultError(DiffspecError):
    """An expected absence of an answer (infeasible limits, a saturated request). The command line exits with 1."""


class TraceError(InputError):
    """A trace that cannot be used, with the place and the mend.

    The message reads ``file, row 3, column 'ttft_mean': got 512.0; allowed: 0 to 600 s; perhaps milliseconds: divide
    by 1000``. Rows are counted as a spreadsheet shows them: the header is row 1.
    """

    def __init__(self, message: str, *, file=None, row=None, column=None, got=None, allowed=None, advice=None):
        self.file, self.row, self.column = file, row, column
        self.got, self.allowed, self.advice = got, allowed, advice
        place = ", ".join(
            part
            for part in (
                None if file is None else str(file),
                None if row is None else f"row {row}",
                None if column is None else f"column '{column}'",
            )
            if part
        )
        tail = "; ".join(
            part
            for part in (
                message,
                None if got is None else f"got {got!r}",
                None if allowed is None else f"allowed: {allowed}",
                advice,
            )
            if part
        )
        super().__init__(f"{place}: {tail}" if place else tail)
