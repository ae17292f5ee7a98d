"""Hypothesis without clocks: a slow machine is no failure."""

from hypothesis import HealthCheck, settings

settings.register_profile("learnd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("learnd")
