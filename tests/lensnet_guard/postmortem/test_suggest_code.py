"""What is printed is Python as black formats it, and nothing of a log becomes code but names."""

import ast
import subprocess
import sys

import pytest

from lensnet_guard.postmortem.suggest import Rested, SuggestedScope, Suggestion
from lensnet_guard.postmortem.suggest_code import scope_code, suggestion_code, suggestion_json

LONG = "trl.trainer.dpo_trainer_of_somebody:DPOTrainer.compute_reference_log_probabilities"


def scope(name="score", calls=1, per="micro_step", caller=None, when=None, **conditions):
    asked = {"requires": (), "ensures": (), **conditions}
    return SuggestedScope(name, calls, per, caller, when, **asked, on="40 calls; the first at a:1")


def suggestion(*scopes, module="critic", **fields):
    return Suggestion(module, "40 calls in training, 2 in inference (free)", scopes, **fields)


def rested(*names):
    return tuple(Rested(name, "held of all 40 calls") for name in names)


FULL = suggestion(
    scope("kl", (1, 2)),
    scope(caller="train:score"),
    scope("ema", (0, None), per="step", caller=LONG, when="adapters_off"),
    scope(
        "all",
        caller=f"a.b.c:{'d' * 20}",
        requires=("no_grad", "eval_mode", "autocast(torch.bfloat16)"),
        ensures=("detached",),
    ),
    requires=rested("frozen"),
    ensures=rested("detached"),
    methods=(Rested("generate", "4 calls of it"),),
    shared_submodules=(Rested("backbone", "as in the observed policy"),),
    to_do=("call it once " * 7,),
    stricter=("`eval_mode` did not hold of 2 of 40 calls of score: step 3 at train.py:4 in f",),
    remarks=("3 calls of score inside a backward pass",),
)
LARGE = suggestion(
    scope("x", caller=LONG, requires=("a_condition_with_a_long_name", "b" * 30, "c" * 30)),
    requires=rested(*(f"condition_{letter}" for letter in "abcdef")),
)


class TestCode:
    def test_all_of_it(self):
        """Line by line."""
        assert suggestion_code([FULL], ["runs/42: 1 line cannot be read"]) == (
            "import torch\n"
            "from lensnet_guard import (\n"
            "    CallPolicy,\n"
            "    Scope,\n"
            "    adapters_off,\n"
            "    autocast,\n"
            "    detached,\n"
            "    eval_mode,\n"
            "    frozen,\n"
            "    no_grad,\n"
            ")\n"
            "\n"
            "# critic: 40 calls in training, 2 in inference (free)\n"
            "policy = CallPolicy(\n"
            "    scopes={\n"
            "        # 40 calls; the first at a:1\n"
            '        "kl": (1, 2),\n'
            "        # 40 calls; the first at a:1\n"
            '        "score": Scope(1, caller="train:score"),\n'
            "        # 40 calls; the first at a:1\n"
            '        "ema": Scope(\n'
            "            (0, None),\n"
            '            per="step",\n'
            f'            caller="{LONG}",\n'
            "            when=adapters_off,\n"
            "        ),\n"
            "        # 40 calls; the first at a:1\n"
            '        "all": Scope(\n'
            "            1,\n"
            f'            caller="a.b.c:{"d" * 20}",\n'
            "            requires=(no_grad, eval_mode, autocast(torch.bfloat16)),\n"
            "            ensures=(detached,),\n"
            "        ),\n"
            "    },\n"
            "    requires=(\n"
            "        frozen,  # held of all 40 calls\n"
            "    ),\n"
            "    ensures=(\n"
            "        detached,  # held of all 40 calls\n"
            "    ),\n"
            "    methods=(\n"
            '        "generate",  # 4 calls of it\n'
            "    ),\n"
            "    shared_submodules=(\n"
            '        "backbone",  # as in the observed policy\n'
            "    ),\n"
            ")\n"
            "\n"
            "# Before this holds:\n"
            f"# - {'call it once ' * 6}call\n"
            "#   it once\n"
            "\n"
            "# A stricter contract would have been broken:\n"
            "# - `eval_mode` did not hold of 2 of 40 calls of score: step 3 at train.py:4 in f\n"
            "\n"
            "# Besides:\n"
            "# - 3 calls of score inside a backward pass\n"
            "\n"
            "# What it rests on is not whole:\n"
            "# - runs/42: 1 line cannot be read\n"
        )

    @pytest.mark.parametrize(
        "suggestions",
        [[FULL], [LARGE], [suggestion()], [FULL, suggestion(module="reference"), LARGE]],
        ids=["all of it", "long lines", "inference only", "several"],
    )
    def test_is_formatted(self, tmp_path, suggestions):
        """A formatter of black's style finds nothing to change, imports included."""
        pytest.importorskip("ruff", reason="the extra named dev is not installed")
        code = suggestion_code(suggestions)
        style = ["--isolated", "--line-length=88", "-"]
        for command in (["format", "--diff"], ["check", "--select=I,F401,F821,E9"]):
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *command, *style],
                input=code, capture_output=True, text=True, cwd=tmp_path,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout

    def test_of_several_modules(self):
        """Policies by name, as `guard_modules` takes them; one that has none is only told of."""
        none = Suggestion("actor", "0 calls", None, to_do=("no call of actor was seen",))
        code = suggestion_code([suggestion(scope()), suggestion(module="reference"), none])
        namespace = {}
        exec(code, namespace)
        assert {name: dict(p.scopes) for name, p in namespace["policies"].items()} == {
            "critic": {"score": 1},
            "reference": {},
        }
        assert "# actor: 0 calls\n" in code
        assert code.endswith("# Before this holds (actor):\n# - no call of actor was seen\n")

    def test_without_a_policy(self):
        """There is nothing to import."""
        none = Suggestion("actor", "0 calls", None, to_do=("no call of actor was seen",))
        assert suggestion_code([none]) == (
            "# actor: 0 calls\n\n# Before this holds:\n# - no call of actor was seen\n"
        )

    @pytest.mark.parametrize(
        ("found", "code"),
        [
            (scope(calls=2), "2"),
            (scope(calls=(0, None)), "(0, None)"),
            (scope(calls=None), "(0, None)"),
            (scope(per="step"), 'Scope(1, per="step")'),
            (scope(ensures=("detached",)), "Scope(1, ensures=(detached,))"),
        ],
    )
    def test_a_scope_is_as_short_as_it_can_be(self, found, code):
        """Its calls alone, where there is no more to say."""
        assert scope_code(found) == code

    def test_a_log_of_a_stranger(self):
        """Whatever is in its strings stays in strings and comments."""
        evil = 'x"\n\rimport os\u2028os.abort()\x0c\x85"""'
        found = suggestion(
            scope(evil, caller=f"{evil}:f"),
            module=evil,
            methods=(Rested(evil, evil),),
            to_do=(evil,),
            stricter=(evil,),
        )
        tree = ast.parse(suggestion_code([found, found], [evil]))
        kinds = [type(node) for node in tree.body]
        assert kinds == [ast.ImportFrom, ast.Assign]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert names == {"policies", "CallPolicy", "Scope"}
        keys = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert evil in keys


def test_json():
    """The same for programs, with all that is known of each scope."""
    found = suggestion_json([FULL], ["fault"], 1)
    assert (found["exit_code"], found["faults"]) == (1, ["fault"])
    assert found["code"] == suggestion_code([FULL], ["fault"])
    (module,) = found["modules"]
    assert module["scopes"][2]["calls"] == [0, None]
    assert module["requires"] == [{"name": "frozen", "on": "held of all 40 calls"}]
