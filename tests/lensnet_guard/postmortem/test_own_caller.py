"""Which function on a stack makes a call, as its author would say."""

import pytest

from lensnet_guard.boundary import entrances
from lensnet_guard.postmortem.own_caller import entered_method, own_caller

SCRIPT = "__main__:<module>"
LOSS = "__main__:Trainer.compute_loss"
ENTRANCES = "lensnet_guard.boundary.entrances"
DPO = "trl.trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs"


@pytest.mark.parametrize(
    ("callers", "named"),
    [
        pytest.param([LOSS, "__main__:main", SCRIPT], LOSS, id="the innermost of one's own"),
        pytest.param(
            [DPO, "transformers.trainer:Trainer.train", "__main__:main", SCRIPT],
            DPO,
            id="that of a framework, and not what starts it",
        ),
        pytest.param(
            [
                "torch.nn.modules.module:Module._call_impl",
                "peft.peft_model:PeftModel.forward",
                LOSS,
            ],
            LOSS,
            id="what wraps a module only hands calls on",
        ),
        pytest.param(
            ["accelerate.utils.operations:ConvertOutputsToFp32.__call__", SCRIPT],
            "accelerate.utils.operations:ConvertOutputsToFp32.__call__",
            id="unless there is nothing else",
        ),
        pytest.param(
            ["contextlib:ContextDecorator.__call__.<locals>.inner", "lensnet_guard.ranks:f", LOSS],
            LOSS,
            id="the standard library and the guard are nobody's own",
        ),
        pytest.param(
            [f"{LOSS}.<locals>.<lambda>", "helpers:apply", LOSS, SCRIPT],
            LOSS,
            id="a lambda is part of what it is written in",
        ),
        pytest.param([f"{LOSS}.<locals>.<listcomp>", LOSS], LOSS, id="and so is a comprehension"),
        pytest.param(
            ["m:gone.<locals>.<lambda>", "torch.autograd:backward", LOSS],
            LOSS,
            id="one whose function has returned has no name",
        ),
        pytest.param(
            [f"{LOSS}.<locals>.score", LOSS],
            f"{LOSS}.<locals>.score",
            id="a function in a function has one",
        ),
        pytest.param(
            ["teacher:M.step", "teacher:M.generate", f"{ENTRANCES}:_enter", f"{ENTRANCES}:f", LOSS],
            LOSS,
            id="the module's own methods, which are its own business",
        ),
        pytest.param(["m:<lambda>", LOSS], LOSS, id="a lambda at module level has none"),
        pytest.param([SCRIPT, "runpy:_run_code", "some_runner:run"], None, id="module level"),
        pytest.param([":f", LOSS], LOSS, id="code of no module"),
        pytest.param(["torch.nn:f"], None, id="nobody"),
        pytest.param([], None, id="no stack"),
    ],
)
def test_who_is_named(callers, named):
    """And the frame is that of the one who is named."""
    frame, found = own_caller(callers)
    assert found == named
    if named is not None:
        assert callers[frame] == named


@pytest.mark.parametrize(
    ("callers", "method"),
    [
        (["m:M.step", "m:M.generate", "torch.x:f", f"{ENTRANCES}:_enter", LOSS], "generate"),
        ([LOSS, SCRIPT], None),
        ([f"{ENTRANCES}:_enter", LOSS], None),
        ([], None),
    ],
)
def test_which_of_its_methods_a_module_is_in(callers, method):
    """The outermost one, that was called from outside."""
    assert entered_method(callers) == method
    assert entrances.__name__ == ENTRANCES


def test_from_a_frame_on():
    """What the log takes for internal is passed over, whatever it is called."""
    assert own_caller([DPO, LOSS], 1) == (1, LOSS)
    assert own_caller([DPO], 7) == (7, None)


def test_module_level_has_its_frame():
    """So that its line can be told."""
    assert own_caller(["torch.nn:f", SCRIPT, "runpy:run"]) == (1, None)
