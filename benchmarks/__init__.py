"""Speed ratios, measured side by side in one run. `python -m benchmarks` runs all scripts of this folder."""
