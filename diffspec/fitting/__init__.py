"""Fitting: a trace becomes a model that predicts; see :func:`diffspec.fitting.fit.fit`."""
