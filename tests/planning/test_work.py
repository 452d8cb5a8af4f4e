"""Operations and bytes of traced programs, against numbers worked by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from sl_jax.planning.work import Work, count_work

A = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
B = jax.ShapeDtypeStruct((16, 32), jnp.bfloat16)
PRODUCT = Work(2 * 8 * 16 * 32, 2 * (8 * 16 + 16 * 32 + 8 * 32))


def _count(function, *shapes, trips=()):
    return count_work(jax.jit(function).trace(*shapes), trips)


def test_a_product():
    assert _count(lambda a, b: a @ b + 1, A, B) == PRODUCT


def test_batched_products():
    batched = (jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in (A, B))
    assert _count(jnp.matmul, *batched) == Work(5 * PRODUCT.flops, 5 * PRODUCT.bytes)


def test_a_convolution():
    picture = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 7), jnp.float32)

    def convolved(x, w):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions)

    found = _count(convolved, picture, kernel)
    assert found.flops == 2 * (2 * 8 * 8 * 7) * (3 * 3 * 3)


def test_scans_count_as_often_as_they_run():
    def scanned(a, b):
        return jax.lax.scan(lambda carry, _: (carry, carry @ b), a, length=7)[1]

    assert _count(scanned, A, B).flops == 7 * PRODUCT.flops


def test_open_loops_take_their_trips_in_order():
    def times(n, a, b):
        step = lambda state: (state[0] + 1, (state[1] @ b)[:, :16])  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < n, step, (0, a))[1]

    def two_loops(a, b, n):
        return times(n, times(n, a, b), b)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    assert _count(two_loops, A, B, n, trips=(3, 10)).flops == 13 * PRODUCT.flops
    assert _count(two_loops, A, B, n).flops == 2 * PRODUCT.flops


def test_the_gradient_of_what_is_computed_again():
    def loss(a, b):
        return jax.checkpoint(lambda a: jnp.tanh(a @ b) @ b.T)(a).sum()

    forward = _count(loss, A, B).flops
    # Forward, the first product again, and one product back for each of two.
    assert _count(jax.grad(loss), A, B).flops == pytest.approx(forward * 2.5)


def test_kernels_count_by_their_grid():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def blocked(a, b):
        return pl.pallas_call(
            kernel,
            grid=(4, 2),
            in_specs=[
                pl.BlockSpec((2, 16), lambda i, j: (i, 0)),
                pl.BlockSpec((16, 16), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((2, 16), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((8, 32), jnp.bfloat16),
        )(a, b)

    assert _count(blocked, A, B) == PRODUCT


def test_the_branch_that_is_more_work():
    def chosen(a, b, n):
        return jax.lax.cond(n > 0, lambda: a @ b, lambda: jnp.zeros((8, 32), a.dtype))

    assert _count(chosen, A, B, jax.ShapeDtypeStruct((), jnp.int32)) == PRODUCT
