"""What the server of rank processes imports once, before it forks them."""

import sharding.parallelize  # noqa: F401 - imported for its cost
from sharding.deepspeed_engine import import_without_compiling
from sharding.process_group import hush_libraries

hush_libraries()
import_without_compiling("deepspeed.runtime.zero.muon.muon_optimizer")
