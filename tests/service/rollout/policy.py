"""The policy of the controller's tests: two weights, no guardrail, no bake."""

from service.settings import Bake, Rollout

POLICY = Rollout(
    weights=(0.1, 0.5),
    step_min_units=10,
    min_units=30,
    max_seconds=1000,
    max_units=500,
    verify_seconds=60,
    guardrails={},
    bake=Bake(holdback=0),
)
