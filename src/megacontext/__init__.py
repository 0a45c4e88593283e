"""MegaContext: training and inference that keep the LensNet invariant."""
