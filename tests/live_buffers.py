"""What is alive on a device."""

import jax


def buffers_of(size):
    """Addresses of the vectors of one size; an array and its part of a device may share one."""
    arrays = (x for x in jax.live_arrays() if x.shape == (size,))
    return {x.unsafe_buffer_pointer() for x in arrays}
