"""What the trainers of TRL call, and how often: the contract of each kind of trainer, as data.

`PRESETS` has one for each; every one was read from the sources of the version that it names, and
real trainings keep it, in the tests. `contracts_of` in ``_preset`` makes the policies of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lensnet_guard import (
    Call,
    Condition,
    active_adapter,
    adapters_off,
    adapters_on,
    eval_mode,
    frozen,
    frozen_base,
    no_grad,
)

Calls = int | tuple[int, int | None] | None
"""A budget, as `lensnet_guard.Scope` takes it; None: there is no such call."""

Setting = Callable[[Any], Any]
"""What a trainer's settings say: a function of the trainer."""

GENERATION = "generation"  # the window from asking for completions until they are scored


@dataclass(frozen=True)
class Pass:
    """Calls of one kind that a trainer makes of a module; a scope of its policy.

    Args:
        scope: The scope's name.
        by: The trainer's method that makes them; or ``"module:qualname"`` of a function.
        calls: How many are due in each window, or what says so of a trainer.
        per: The window, as of `lensnet_guard.Scope`.
        when: The condition that tells them from others of the same method.
        requires: What must hold of each, besides what must hold of all of the module.
    """

    scope: str
    by: str
    calls: Calls | Setting = 1
    per: str = "micro_step"
    when: Condition | None = None
    requires: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Held:
    """A module that a trainer holds, and the calls of it that are legal in training.

    Args:
        place: The trainer's attribute; of a list, each item that is a module.
        passes: The calls.
        requires: What must hold of each.
        syncs: Says of a trainer whether it moves the module's weights, so that they are not frozen.
        given: Says of a trainer whether the module is to be guarded.
        beyond: Says of a trainer in words why nobody could guard the module; None where one can.
        methods: As of `lensnet_guard.CallPolicy`.
        parts: As of `lensnet_guard.CallPolicy`; ``"*"`` is the backbone of a model of transformers.
    """

    place: str
    passes: tuple[Pass, ...]
    requires: tuple[Condition, ...] = ()
    syncs: Setting = lambda trainer: False
    given: Setting = lambda trainer: True
    beyond: Setting = lambda trainer: None
    methods: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """What one kind of trainer holds, and how it calls it.

    Args:
        read_from: The library and the version that it was read from.
        held: The modules that are guarded.
        otherwise: What is guarded where the trainer holds none of them.
        windows: The name of a window -> the trainer's method of which each run is one. There is one
            such run in a micro-step at most.
        evaluates: Methods that evaluate in the midst of training.
        own_loop: Whether its loop tells callbacks of nothing but the end of an update. An update is
            one micro-step then.
    """

    read_from: str
    held: tuple[Held, ...]
    otherwise: Held | None = None
    windows: Mapping[str, str] = field(default_factory=dict)
    evaluates: tuple[str, ...] = ()
    own_loop: bool = False


# What tells a policy from its reference -----------------------------------------------------------


def as_reference(call: Call) -> str | None:
    """The adapters are off, or the one named "ref" works: the policy is its own reference.

    TRL loads a copy by that name where an adapter is trained that was there before.

    Args:
        call: The call as it begins.

    Returns:
        None, or the first layer whose adapter is on, or is another.
    """
    reference = _REFERENCE in getattr(call.module, "peft_config", {})
    return _reference_works(call) if reference else adapters_off(call)


def as_policy(call: Call) -> str | None:
    """The adapters are on, and the one that is active is not the reference's.

    Args:
        call: The call as it begins.

    Returns:
        None, or what was found.
    """
    if getattr(call.module, "active_adapter", None) == _REFERENCE:
        return 'the adapter "ref" is active; leave the block that has made it so'
    return adapters_on(call)


_REFERENCE = "ref"
_reference_works = active_adapter(_REFERENCE)

for _state in (as_reference, as_policy):  # as the stock conditions that they are made of
    vars(_state).update(about=active_adapter.about, mistake=active_adapter.mistake)


# What settings say --------------------------------------------------------------------------------


def _synced(trainer: Any) -> bool:
    """Whether the reference follows the policy."""
    return bool(getattr(trainer.args, "sync_ref_model", False))


def _adapters_are_the_difference(trainer: Any) -> bool:
    """Whether the reference is the policy itself without its adapters."""
    return trainer.ref_model is None and hasattr(_policy_of(trainer), "peft_config")


def _policy_of(trainer: Any) -> Any:
    return getattr(trainer, "policy_model", trainer.model)  # PPO trains it beside the value model


def _unless_precomputed(trainer: Any) -> Calls:
    """One call, unless the reference has scored the whole data set beforehand."""
    return None if trainer.precompute_ref_logps else 1


def _kl(trainer: Any) -> Calls:
    """The mismatched completions that estimate the KL, where the loss has one."""
    return 1 if trainer.calculate_KL else None


def _kl_unless_precomputed(trainer: Any) -> Calls:
    return None if trainer.precompute_ref_logps else _kl(trainer)


def _chunks(trainer: Any) -> int:
    """A generation batch is scored in chunks of the size of a micro-batch."""
    return int(trainer.args.steps_per_generation)


def _reference_chunks(trainer: Any) -> Calls:
    return _chunks(trainer) if trainer.beta != 0.0 else None


def _grpo_old_chunks(trainer: Any) -> Calls:
    """The policy scores its own completions where it has moved before all of them are used."""
    every = trainer.args.steps_per_generation * trainer.num_iterations
    aligned = trainer.args.gradient_accumulation_steps % every == 0
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return None if aligned and not corrected else _chunks(trainer)


def _writings(trainer: Any) -> Calls:
    """The policy writes the completions, with tools in several turns; unless an engine does.

    What a function of the user's calls to write them is for that function to say.
    """
    if getattr(trainer, "rollout_func", None) is not None:
        return 0, None
    return None if trainer.use_vllm else (1, None)


def _pairs(trainer: Any) -> Calls:
    """Both completions of a prompt are written at once, by the policy or by an engine."""
    return None if trainer.use_vllm else 1


def _in_a_thread(trainer: Any) -> str | None:
    if not getattr(trainer, "use_transformers_continuous_batching", False):
        return None
    return (
        "its model writes by continuous batching, in a thread of transformers' own, where nobody "
        "could tell its calls from others"
    )


def _teacher_generations(trainer: Any) -> Calls:
    """The teacher writes what the student does not, where ``seq_kd`` says so; by lot."""
    if not trainer.seq_kd or trainer.lmbda >= 1:
        return None
    return 1 if trainer.lmbda <= 0 else (0, 1)


def _rollouts(trainer: Any) -> int:
    """The completions of an update are made and scored in chunks."""
    args = trainer.args
    return int(-(-args.local_batch_size // args.local_rollout_forward_batch_size))


def _rollout_parts(trainer: Any) -> int:
    """The backbone and the head of each chunk."""
    return 2 * _rollouts(trainer)


def _trained(trainer: Any) -> int:
    """The micro-batches that an update trains on."""
    args = trainer.args
    of_a_mini_batch = -(-args.local_mini_batch_size // args.per_device_train_batch_size)
    return int(args.num_ppo_epochs * args.num_mini_batches * of_a_mini_batch)


def _value_parts(trainer: Any) -> int:
    """The backbone and the head of each chunk, and of each micro-batch."""
    return 2 * (_rollouts(trainer) + _trained(trainer))


# What the trainers hold ---------------------------------------------------------------------------

_STILL = (no_grad, eval_mode, frozen)
_STILL_AS_BASE = (no_grad, frozen_base)  # of a model that is trained itself
_TUNED = (as_policy,)


def _preference(*, estimates_kl: bool) -> tuple[tuple[Held, ...], Held]:
    """Return what a trainer holds that compares a policy and its reference on the same batch."""
    by, kl_by = "_compute_loss", "_compute_kl_logps" if estimates_kl else None
    reference = _twice(Pass("reference", by, _unless_precomputed), kl_by, _kl_unless_precomputed)
    policy = _twice(Pass("policy", by), kl_by, _kl)
    base = tuple(replace(one, when=as_reference, requires=_STILL_AS_BASE) for one in reference)
    tuned = tuple(replace(one, when=as_policy) for one in policy)
    held = (
        Held("ref_model", reference, _STILL, syncs=_synced),
        Held("model", (*base, *tuned), given=_adapters_are_the_difference),
    )
    return held, Held("model", policy)


def _twice(one: Pass, kl_by: str | None, kl: Setting) -> tuple[Pass, ...]:
    """Return the calls for the loss, and those for its estimate of the KL."""
    if kl_by is None:
        return (one,)
    return one, Pass(f"{one.scope}_kl", kl_by, kl)


def _online(old: Setting) -> tuple[tuple[Held, ...], Held]:
    """Return what a trainer holds that scores completions of its own, generation by generation."""
    by = "_generate_and_score_completions"
    writes = Pass("generation", "_generate", _writings, GENERATION)
    before = Pass("before", by, old, GENERATION, requires=(no_grad,))
    policy = Pass("policy", "_compute_loss")
    reference = Pass(
        "reference", "_get_per_token_logps_and_entropies", _reference_chunks, GENERATION
    )
    base = Pass("reference", by, _reference_chunks, GENERATION, as_reference, _STILL_AS_BASE)
    tuned = (
        replace(writes, requires=_TUNED),
        replace(before, when=as_policy),
        replace(policy, requires=_TUNED),
    )
    itself = partial(Held, "model", methods=("generate",), beyond=_in_a_thread)
    held = (
        Held("ref_model", (reference,), _STILL, syncs=_synced),
        Held("reward_funcs", (Pass("reward", "_calculate_rewards", per=GENERATION),), _STILL),
        itself((*tuned, base), given=_adapters_are_the_difference),
    )
    return held, itself((writes, before, policy))


_EACH_GENERATION = {GENERATION: "_generate_and_score_completions"}
_REWARDED = "trl.experimental.utils:get_reward"
_PPO = "trl.experimental.ppo.ppo_trainer"

PRESETS: Mapping[str, Preset] = {
    "trl.trainer.dpo_trainer:DPOTrainer": Preset("trl 1.16.0", *_preference(estimates_kl=False)),
    "trl.trainer.kto_trainer:KTOTrainer": Preset("trl 1.16.0", *_preference(estimates_kl=True)),
    "trl.trainer.grpo_trainer:GRPOTrainer": Preset(
        "trl 1.16.0", *_online(_grpo_old_chunks), windows=_EACH_GENERATION
    ),
    "trl.trainer.rloo_trainer:RLOOTrainer": Preset(
        "trl 1.16.0", *_online(_chunks), windows=_EACH_GENERATION
    ),
    "trl.experimental.online_dpo.online_dpo_trainer:OnlineDPOTrainer": Preset(
        "trl 1.16.0",
        (
            Held("ref_model", (Pass("reference", "_forward"),), _STILL),
            Held("reward_funcs", (Pass("reward", "_calculate_rewards_from_functions"),), _STILL),
            Held(
                "model",
                (
                    Pass("generation", "_generate", _pairs, requires=_TUNED),
                    Pass("reference", "_forward", when=adapters_off, requires=_STILL_AS_BASE),
                    Pass("policy", "_forward", when=adapters_on),
                ),
                given=_adapters_are_the_difference,
                methods=("generate",),
            ),
        ),
    ),
    "trl.experimental.gkd.gkd_trainer:GKDTrainer": Preset(
        "trl 1.16.0",
        (
            Held(
                "teacher_model",
                (
                    Pass("distillation", "compute_loss", requires=(no_grad,)),
                    Pass("generation", "generate_on_policy_outputs", _teacher_generations),
                ),
                (eval_mode, frozen),
                methods=("generate",),
            ),
        ),
    ),
    "trl.trainer.distillation_trainer:DistillationTrainer": Preset(
        "trl 1.16.0", (Held("teacher_model", (Pass("distillation", "_compute_loss"),), _STILL),)
    ),
    "trl.trainer.reward_trainer:RewardTrainer": Preset(
        "trl 1.16.0", (Held("model", (Pass("reward", "compute_loss"),)),)
    ),
    f"{_PPO}:PPOTrainer": Preset(
        "trl 1.12.0",
        (
            Held("ref_model", (Pass("reference", f"{_PPO}:forward", _rollouts),), _STILL),
            Held(
                "reward_model",
                (Pass("reward", _REWARDED, _rollout_parts),),
                _STILL,
                parts=("*", "score"),
            ),
            Held("value_model", (Pass("values", "train", _value_parts),), parts=("*", "score")),
            Held(
                "model.policy",
                (
                    Pass("generation", f"{_PPO}:generate", _rollouts, requires=_TUNED),
                    Pass(
                        "reference",
                        f"{_PPO}:forward",
                        _rollouts,
                        when=as_reference,
                        requires=_STILL_AS_BASE,
                    ),
                    Pass(
                        "policy",
                        f"{_PPO}:PolicyAndValueWrapper.forward",
                        _trained,
                        requires=_TUNED,
                    ),
                ),
                given=_adapters_are_the_difference,
                methods=("generate",),
            ),
        ),
        evaluates=("generate_completions",),
        own_loop=True,
    ),
}
