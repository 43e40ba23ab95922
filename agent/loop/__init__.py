"""The live agent: one queue in, one writer, and what operators see of it."""
