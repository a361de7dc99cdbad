"""A language model trainer in plain JAX: config, data, model, mesh, optimizers, train."""

import os

# On a CPU, LAPACK orthonormalizes the bases of `eigenbasis=`. The matrices are small, and with one
# thread OpenBLAS takes half of the time or less; with more, its threads also wait for each other
# where other processes run. It reads this at JAX's first call of LAPACK.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
