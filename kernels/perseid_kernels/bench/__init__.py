"""Benchmarks of the ops against what the machine can do.

python -m perseid_kernels.bench.gpu        the GPU suite: rates, checks, the decode step, products, low-rank sums
python -m perseid_kernels.bench.kernels    each op against its roofline, on whatever this machine has
"""
