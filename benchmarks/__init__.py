"""Measurements that are run by hand: ``python -m benchmarks.<name>``.

All of them run at one thread unless the environment says otherwise. OpenMP reads these when it is loaded, and
MinkowskiEngine brings an OpenMP of its own that ``torch.set_num_threads`` does not reach.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
