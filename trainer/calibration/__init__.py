"""Times of single linears and GEMMs on the present device: for `octavo calibrate` and the benchmarks."""
