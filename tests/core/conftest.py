"""How hard the property tests look; `HYPOTHESIS_PROFILE=deep` looks longer, and at random."""

import os

from hypothesis import HealthCheck, settings

quick = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
)
settings.register_profile("quick", quick)
settings.register_profile("deep", quick, max_examples=3000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
