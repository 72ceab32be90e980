"""Browsers and Node: a JAX function becomes JavaScript by translating its jaxpr, so that no model is written twice."""
