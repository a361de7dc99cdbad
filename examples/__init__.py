"""What one can do with sophia_optax, as programs."""
