"""What compiled kernels are made of: vectors for Numba, and caches that know their sources."""
