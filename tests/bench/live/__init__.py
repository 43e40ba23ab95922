"""Benchmarks against a real API server: what is loaded into it, the node beside it, and what is measured there."""
