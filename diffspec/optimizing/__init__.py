"""Choosing a configuration under latency limits."""
