"""Which form of the step time a trace supports: hold-out by load, by draft length and by lengths."""

import numpy as np

from diffspec.fitting.objective import Target
from diffspec.fitting.observations import Observations
from diffspec.fitting.solve import LANES, Solution

MOST_FOLDS = LANES
IMPROVEMENT = 0.02
"""A form must lower the held-out error by this share to displace a simpler one before it."""


def folds_of(frame, data: Observations, targets: list[Target]) -> dict[str, np.ndarray]:
    """Held-out row sets by name (True = held out, in block order): each of the draft lengths > 0 (when there are at
    least two), the lower, middle and upper third of the loads, and each (prompt, output) shape when several."""
    order = list(data.order)
    lengths = frame["draft_length"].to_numpy(float)[order]
    rate, users = (frame[name].to_numpy(float)[order] for name in ("arrival_rate", "concurrency"))
    folds: dict[str, np.ndarray] = {}
    thirds = np.zeros(len(order), dtype=int)
    for load in (rate, users):  # rank the loads of each loop kind on their own
        known = np.flatnonzero(~np.isnan(load))
        levels = np.unique(load[known])
        if levels.size:
            thirds[known] = np.searchsorted(levels, load[known]) * 3 // levels.size
    for third, name in enumerate(("low load", "middle load", "high load")):
        folds[name] = thirds == third
    speculative = [k for k in np.unique(lengths) if k > 0]
    if len(speculative) > 1:
        folds |= {f"draft_length {k:g}": lengths == k for k in speculative}
    shapes = list(zip(frame["prompt_length"].to_numpy()[order], frame["output_length"].to_numpy()[order], strict=True))
    distinct = sorted(set(shapes))
    if 1 < len(distinct) <= 4:
        folds |= {f"lengths {p:g}+{o:g}": np.asarray([shape == (p, o) for shape in shapes]) for p, o in distinct}
    used = np.any([target.used for target in targets], axis=0)
    usable = {name: fold for name, fold in folds.items() if 0 < (fold & used).sum() <= 0.7 * used.sum()}
    return dict(list(usable.items())[:MOST_FOLDS])


def held_out_error(refits: Solution, folds: dict[str, np.ndarray], targets: list[Target]):
    """Mean |log(predicted/measured)| over held-out rows of refits without each fold, in all and by fold."""
    used = np.stack([target.used for target in targets])
    errors, by_fold = [], {}
    for (name, fold), residual in zip(folds.items(), refits.residuals, strict=True):
        held = np.abs(residual)[:, fold][used[:, fold]]
        if held.size:
            by_fold[name] = float(held.mean())
            errors.append(held)
    return (float(np.concatenate(errors).mean()) if errors else None), by_fold


def simplest_good(errors: dict[str, float | None]) -> str:
    """The form with the smallest held-out error; an earlier (simpler) form stays unless beaten by IMPROVEMENT."""
    names = list(errors)
    chosen = names[0]
    for name in names[1:]:
        now, best = errors[name], errors[chosen]
        if now is not None and (best is None or now < best * (1.0 - IMPROVEMENT)):
            chosen = name
    return chosen


def why_chosen(chosen: str, tried: dict[str, dict]) -> str:
    """The winner's reason, in words."""
    errors = {form: entry["held_out_error"] for form, entry in tried.items()}
    others = {form: error for form, error in errors.items() if form != chosen and error is not None}
    if len(tried) == 1:
        return f"{chosen} was asked for"
    if errors[chosen] is None or not others:
        return f"{chosen}: the trace is too small to hold rows out, so the simplest form stays"
    rival = min(others, key=lambda form: others[form])
    if others[rival] < errors[chosen]:
        return (
            f"{chosen} errs {errors[chosen]:.1%} on held-out rows; {rival} ({others[rival]:.1%}) is not better by "
            f"{IMPROVEMENT:.0%} of that, and less simple"
        )
    folds = [name for name, error in tried[chosen]["held_out_by_fold"].items()
             if error <= tried[rival]["held_out_by_fold"].get(name, np.inf)]  # fmt: skip
    return f"{chosen} errs {errors[chosen]:.1%} on held-out rows, the next ({rival}) {others[rival]:.1%}" + (
        f"; better at {', '.join(folds)}" if folds else ""
    )


def candidate_forms(step_time: str, has_experts: bool) -> list[str]:
    """Forms to try: ``auto`` tries all that the trace supports, simplest first; ``affine`` and ``roofline`` fix it
    (with expert coverage where the trace tells the experts)."""
    if step_time == "auto":
        return ["affine", "roofline"] + (["affine-moe", "roofline-moe"] if has_experts else [])
    return [f"{step_time}-moe" if has_experts else step_time]
