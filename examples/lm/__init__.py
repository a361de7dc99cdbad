"""A language model trainer in plain JAX: config, data, model, mesh, optimizers, train."""
