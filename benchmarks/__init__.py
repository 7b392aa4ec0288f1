"""What is measured, against what. `python -m benchmarks` lists, runs and tabulates."""
