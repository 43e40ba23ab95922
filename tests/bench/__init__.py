"""What the agent costs: `python -m tests.bench` measures it and writes docs/benchmarks.md."""
