"""The description of the released model, from which its programs are planned."""

import math

import jax

from sl_jax.checkpoints.pipeline import parameter_shapes
from sl_jax.checkpoints.source import release_shapes


def test_the_release_has_its_number_of_parameters():
    shapes = parameter_shapes(release_shapes())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 20_430_407_232
