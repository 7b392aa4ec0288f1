"""What was measured of each expert, the scores made of it, and the choice of what stays."""
