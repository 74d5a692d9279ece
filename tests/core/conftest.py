"""How hard the property tests look; `HYPOTHESIS_PROFILE=deep` looks longer, and at random."""

import os

from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": (HealthCheck.too_slow, HealthCheck.filter_too_much),
}
settings.register_profile("quick", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("deep", max_examples=3000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
