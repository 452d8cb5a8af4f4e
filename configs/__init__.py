"""Configurations; installed as `sl_jax.configs`."""
