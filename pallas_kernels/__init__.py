"""GPU kernels behind plain functions. Imports jax alone; every kernel has a jnp reference."""
