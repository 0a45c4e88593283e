"""A guard that asks conditions of every call in training, and legal calls of it."""

from lensnet_guard import CallPolicy, guard_module


def guarded(module, *requires, ensures=(), mode=None):
    """Its calls are legal as often as one likes, in the scope ``kl``."""
    policy = CallPolicy({"kl": 1}, requires=requires, ensures=ensures)
    return guard_module(module, policy=policy, mode=mode)


def call(guard, *args, **kwargs):
    """One micro-step with one legal call, and what that returns."""
    with guard.context("training"), guard.micro_step(), guard.sanctioned("kl"):
        return guard.module(*args, **kwargs)
