"""Call contracts at run time for PyTorch modules: who may call, in which context, how often.

The names are listed in the stub beside this file, and imported when they are first used: the
command line and the pytest plugin live in this package too, and start without torch.
"""

from lensnet_guard._face import attach
from lensnet_guard._moved import find_moved_modules

__getattr__, __dir__, __all__ = attach(__name__, __file__)
find_moved_modules()
