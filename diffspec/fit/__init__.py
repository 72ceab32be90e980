"""Fitting: a trace becomes a model that predicts; see :func:`diffspec.fit.fitting.fit`."""
