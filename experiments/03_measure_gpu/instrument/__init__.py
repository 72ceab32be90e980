"""The measuring instrument: models at real dimensions with random weights, a small serving loop, and its tables.

`shapes`, `grid`, `loop`, `load` and `tables` need numpy only; `ops`, `kernels`, `checks`, `model`, `experts`, `engine`,
`timing`, `step_cost`, `routing` and `traces` need PyTorch.
"""
