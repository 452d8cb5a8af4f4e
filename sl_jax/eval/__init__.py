"""Metrics of decompositions, baselines, intervals, and the reports that show them."""

from sl_jax.eval.baselines import BASELINES
from sl_jax.eval.bootstrap import Interval, interval, paired_difference
from sl_jax.eval.compare import Measurement, comparison_tables, flat_records, measure
from sl_jax.eval.layerd import layerd_scores
from sl_jax.eval.reference_free import reference_free
from sl_jax.eval.report import (
    Column,
    Curve,
    Decomposition,
    Fact,
    Picture,
    Report,
    Series,
    Table,
    render_html,
    write_csv,
    write_html,
    write_json,
    write_records,
    write_report,
)
from sl_jax.eval.stable_layers import layer_l1

__all__ = [
    "BASELINES",
    "Column",
    "Curve",
    "Decomposition",
    "Fact",
    "Interval",
    "Measurement",
    "Picture",
    "Report",
    "Series",
    "Table",
    "comparison_tables",
    "flat_records",
    "interval",
    "layer_l1",
    "layerd_scores",
    "measure",
    "paired_difference",
    "reference_free",
    "render_html",
    "write_csv",
    "write_html",
    "write_json",
    "write_records",
    "write_report",
]
