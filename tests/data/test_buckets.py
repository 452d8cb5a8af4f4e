"""Aspect buckets and the two size rules."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_jax.data.buckets import Bucket, make_buckets, nearest_bucket, standard_buckets
from sl_jax.data.pictures import area_size, longest_side_size


def test_standard_buckets_at_640():
    assert set(standard_buckets(640)) == {
        Bucket(640, 640),
        Bucket(480, 640),
        Bucket(640, 480),
        Bucket(432, 640),  # 426.67 is 26.67 tokens
        Bucket(640, 432),
        Bucket(352, 640),  # 360 is 22.5 tokens, a half that goes to even
        Bucket(640, 352),
    }


def test_small_sizes_merge_equal_shapes():
    assert standard_buckets(64) == ((64, 64), (48, 64), (64, 48), (32, 64), (64, 32))
    assert standard_buckets(16) == ((16, 16),)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "shapes is empty"),
        ([(640, 640), (640, 500)], r"shapes\[1\] = \(640, 500\).*multiples of 16.*\(640, 496\)"),
        ([(0, 16)], r"shapes\[0\] = \(0, 16\)"),
        ([(-16, 16)], r"shapes\[0\]"),
        ([640], r"shapes\[0\] = 640; please give a \(height, width\) pair"),
        (["640x640"], "pair"),
        ([(64, 64, 3)], "pair"),
        ([(64.0, 64)], "whole numbers"),
        ([(True, 64)], "whole numbers"),
        ([(64, 64), (48, 64), (64, 64)], r"shapes\[2\] = \(64, 64\) is there twice"),
    ],
)
def test_wrong_sizes_name_field_and_value(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_buckets(sizes, field="shapes")


def test_configured_lists_become_buckets():
    assert make_buckets([[640, 480], (480, 640)]) == (Bucket(640, 480), Bucket(480, 640))


def test_side_must_be_a_multiple_of_16():
    with pytest.raises(ValueError, match="side = 600"):
        standard_buckets(600)


def test_nearest_is_by_log_ratio():
    buckets = make_buckets([(64, 64), (64, 128)])
    # √2 is the middle between 1:1 and 2:1 on the log scale; 1.5 is the middle on the linear one.
    assert nearest_bucket(buckets, 100, 141) == (64, 64)
    assert nearest_bucket(buckets, 100, 142) == (64, 128)


def test_of_equal_aspects_the_nearest_area_wins():
    buckets = make_buckets([(64, 64), (640, 640), (1024, 1024)])
    assert nearest_bucket(buckets, 50, 50) == (64, 64)
    assert nearest_bucket(buckets, 700, 701) == (640, 640)
    assert nearest_bucket(buckets, 4000, 4000) == (1024, 1024)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_nearest_really_is(height, width):
    buckets = standard_buckets(640)

    def stretch(bucket):
        return abs(math.log(width / height * bucket.height / bucket.width))

    best = nearest_bucket(buckets, height, width)
    assert stretch(best) <= min(map(stretch, buckets)) + 1e-8
    # The mirrored picture goes to the mirrored bucket unless two are equally far.
    if sum(stretch(bucket) <= stretch(best) + 1e-8 for bucket in buckets) == 1:
        assert nearest_bucket(buckets, width, height) == (best.width, best.height)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 640), (640, 640)),
        ((1000, 3000), (208, 640)),
        ((3000, 1000), (640, 208)),
        ((360, 640), (352, 640)),  # 22.5 → 22: halves to even
        ((376, 640), (384, 640)),  # 23.5 → 24
        ((1, 1000), (16, 640)),
        ((1, 1), (640, 640)),
    ],
)
def test_longest_side_rule(size, expected):
    assert longest_side_size(*size) == expected


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [
        ((640, 640), 640**2, (640, 640)),
        ((1080, 1920), 640**2, (480, 864)),
        ((1920, 1080), 1024**2, (1376, 768)),
        ((1, 10_000), 640**2, (32, 64_000)),
    ],
)
def test_area_rule(size, area, expected):
    assert area_size(*size, area) == expected


@pytest.mark.slow
def test_area_rule_is_the_one_of_diffusers():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_layered import calculate_dimensions

    for height in range(50, 4000, 37):
        for width in range(50, 4000, 41):
            for side in (640, 1024):
                expected = calculate_dimensions(side * side, width / height)[::-1]
                assert area_size(height, width, side * side) == tuple(
                    max(length, 32) for length in expected
                )
