"""An update's modulation tables: one on the devices for all batches of a bucket."""

from types import SimpleNamespace

import numpy as np
from judged import judged

from sl_jax.grpo.config import AdvantageConfig, JudgeSettings, RolloutConfig
from sl_jax.grpo.epoch import _scored
from sl_jax.models.rope import LatentGrid


def test_batches_of_a_grid_share_their_table():
    made = []

    def table(grid):
        made.append(SimpleNamespace(grid=grid))
        return made[-1]

    square, wide = LatentGrid(3, 4, 4), LatentGrid(3, 2, 8)
    config = SimpleNamespace(
        advantage=AdvantageConfig(),
        judge=JudgeSettings(),
        rollout=RolloutConfig(groups=4, batch_groups=1, group_size=2),
    )
    parts = SimpleNamespace(config=config, rollout=SimpleNamespace(table=table))
    grids = [square, wide, square, wide]
    rolled = [SimpleNamespace(candidates=number, grid=grid) for number, grid in enumerate(grids)]
    scored, _ = _scored(parts, rolled, [judged(np.array([0.1, 0.9]))] * 4)
    assert [table.grid for table in made] == [square, wide]
    assert [batch.table.grid for batch in scored] == grids
    assert scored[0].table is scored[2].table and scored[1].table is scored[3].table
