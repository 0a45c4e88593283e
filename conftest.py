"""Settings for every test: one torch thread a worker, and Hypothesis without deadlines."""

import torch
from hypothesis import settings

pytest_plugins = ["pytester"]
torch.set_num_threads(1)  # the workers share the cores among themselves
settings.register_profile("project", deadline=None)
settings.load_profile("project")
