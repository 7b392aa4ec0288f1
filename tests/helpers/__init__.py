"""What tests use and what is not a test. Oracles never import reap."""
