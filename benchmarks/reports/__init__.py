"""docs/results.md, made of the result files."""
