"""Settings of the whole suite."""

import os

from hypothesis import HealthCheck, settings

# A shared two-core machine may pause any example; time is not what these tests measure.
settings.register_profile("tandem", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tandem")

# Before numpy and torch start their thread pools: ranks of one test share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
