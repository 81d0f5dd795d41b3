"""What makes docs/results.md, the page of our own experiments: `python -m experiments.results`."""
