"""llama.cpp: its options, devices and sessions. The only package that imports the native module."""
