"""Whole jobs: the other packages' functions one after the other, in a folder that says what is done."""
