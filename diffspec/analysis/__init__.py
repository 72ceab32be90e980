"""Questions put to a fitted model: one operating point, its sensitivities."""
