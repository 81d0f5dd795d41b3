"""Speed and memory, measured: `python -m benchmarks.attention`, `.sample`, `.train`, and `.render` for the page."""
