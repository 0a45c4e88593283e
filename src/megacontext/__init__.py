"""MegaContext: a language model over mixed levels of detail, and the LensNet that picks them.

The names are listed in the stub beside this file, and imported when they are first used: the
command line lives in this package too, and shows its help without torch.
"""

from lensnet_guard._face import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__, extra="megacontext")
