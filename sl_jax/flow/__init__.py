"""Flow matching in pure functions: σ schedules, steps of the policy, samplers and rollouts."""
