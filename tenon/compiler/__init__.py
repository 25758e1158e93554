"""Graphs to executables. So far: the C toolchain and the hand-written kernels of the reference executor."""
