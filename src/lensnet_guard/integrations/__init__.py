"""Guards in other people's training loops; each module needs its library, and nothing else does.

``lensnet_guard.integrations.lightning``, ``.transformers`` and ``.accelerate``: see
docs/integrations.md.
"""
