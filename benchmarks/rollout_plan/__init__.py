"""The rollout's test plan, one part a file; `benchmarks/rollout.py` runs it, `tests/mathematics` its reduced form."""
