"""Curvature and interactions of a metric: H_ij = d^2 log(metric)/(d log x_i d log x_j).

Columns are fourth-order differences of the exact elasticities, so that one compiled gradient serves every metric; that
H comes out symmetric is its check. An interaction of 0.5 says: 1 % more of one input raises the elasticity of the other
by 0.005.
"""

from typing import Any

import numpy as np

from diffspec.analysis.plain import finite
from diffspec.analysis.sensitivity import Slopes

STEP = 2e-3
_CENTRAL = (np.array([-2.0, -1.0, 1.0, 2.0]), np.array([1.0, -8.0, 8.0, -1.0]) / 12.0)
_FROM_ABOVE = (np.arange(5.0), np.array([-25.0, 48.0, -36.0, 16.0, -3.0]) / 12.0)
MOST = 20


def second_order(slopes: Slopes, step: float = STEP) -> dict[str, Any]:
    """The Hessian in log coordinates over the inputs above 0 (ours).

    ``{"names", "hessian": [[...]], "asymmetry", "curvatures": [{"name", "value"}], "interactions": [{"first", "second",
    "value"}]}``, largest first; ``asymmetry``: largest |H - H'| over the largest |H|, what differences miss. The
    derivative by the draft length is that from above, where measured curves bend. Everything is empty where the metric
    has no elasticities.
    """
    moving = np.flatnonzero((slopes.at > 0) & np.isfinite(slopes.elasticities))
    names = [slopes.inputs.names[index] for index in moving]
    if not moving.size:
        return {"names": [], "hessian": [], "asymmetry": None, "curvatures": [], "interactions": []}
    columns = []
    for index in moving:
        offsets, weights = _FROM_ABOVE if slopes.inputs.paths[index] == "draft_length" else _CENTRAL
        rows = []
        for offset in offsets:
            values = slopes.at.copy()
            values[index] *= np.exp(offset * step)
            rows.append(slopes.moved(values).elasticities[moving])
        columns.append(weights @ np.stack(rows) / step)
    raw = np.stack(columns, axis=1)
    hessian = 0.5 * (raw + raw.T)
    size = np.max(np.abs(hessian))
    pairs = [(i, j) for i in range(len(moving)) for j in range(i)]
    pairs.sort(key=lambda pair: -abs(hessian[pair]))
    order = np.argsort(-np.abs(np.diag(hessian)))
    return {
        "names": names,
        "hessian": [[finite(value) for value in row] for row in hessian],
        "asymmetry": finite(np.max(np.abs(raw - raw.T)) / size) if size > 0 else 0.0,
        "curvatures": [{"name": names[i], "value": finite(hessian[i, i])} for i in order],
        "interactions": [
            {"first": names[j], "second": names[i], "value": finite(hessian[i, j])} for i, j in pairs[:MOST]
        ],
    }
