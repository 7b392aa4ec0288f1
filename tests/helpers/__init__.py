"""What tests use and what is no test. Oracles never import reap."""
