"""What was measured and how. From the repository's folder: ``python -m benchmarks.GROUP.NAME --help``."""
