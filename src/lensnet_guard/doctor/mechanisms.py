"""The mechanisms, each a function that tries one for real and says what it saw.

They get an empty folder, use the public face of the guard alone, and compare with what the same
module computes unguarded. Each raises `NotTried` where the machine has not what it needs.
"""

import copy
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BypassedGuard,
    CallPolicy,
    Guard,
    LensNetHazard,
    LensNetViolation,
    NoContext,
    RankDivergence,
    UnsanctionedCall,
    compare_ranks,
    guard_module,
)
from lensnet_guard.doctor.outcome import Broken, NotTried, expect, first_line
from lensnet_guard.postmortem import read_verdict

SCOPE = "critic"
POLICY = CallPolicy({SCOPE: 1})
RANKS_WAIT_S = 20
STEPS = 6  # enough for CUDA graphs to be warmed up, recorded and replayed


def imports_torch(_: Path) -> str:
    """Say what torch was built for, and which devices it sees."""
    torch.set_num_threads(1)
    expect(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum().item() == 8, "2 x 2 ones make no 8")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    number = torch.cuda.device_count()
    devices = ", ".join(torch.cuda.get_device_name(i) for i in range(number)) or "no GPU"
    return f"{torch.__version__}, built for {built}; {devices}"


def refuses_bypasses(_: Path) -> str:
    """Try every way past the guard, and every call that the contract has no place for."""
    module, x = _module(), torch.ones(2, 4)
    expected, bare = module(x), copy.deepcopy(module)
    guard = _guard(module)
    ways: dict[str, Callable[[], object]] = {
        "the module itself": lambda: module(x),
        "its forward": lambda: module.forward(x),  # type: ignore[no-untyped-call]
        "a part of it": lambda: module[0](x),
        "functional_call": lambda: functional_call(module, dict(bare.named_parameters()), (x,)),
    }
    with guard.context("training"), guard.sanctioned(SCOPE):
        expect(torch.equal(guard.module(x), expected), "a legal call computes something else")
    with guard.context("training"):
        for way, call in ways.items():
            _refused(BypassedGuard, way, call)
        _refused(UnsanctionedCall, "a call outside every scope", lambda: guard.module(x))
    _refused(NoContext, "a call in no context", lambda: guard.module(x))
    guard.uninstall()
    expect(torch.equal(module(x), expected), "the module computes something else afterwards")
    return f"{len(ways)} ways past the guard, and 2 calls without a place, are refused"


def tells_recomputes(_: Path) -> str:
    """Try a non-reentrant activation checkpoint."""
    return _recompute(use_reentrant=False)


def tells_reentrant_recomputes(_: Path) -> str:
    """Try a reentrant activation checkpoint."""
    return _recompute(use_reentrant=True)


def _recompute(*, use_reentrant: bool) -> str:
    module, x = _module(), torch.ones(2, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    guard = _guard(module)
    with guard.context("training"), guard.micro_step():
        with guard.sanctioned(SCOPE):
            loss = checkpoint(guard.module, x, use_reentrant=use_reentrant).sum()
        torch.autograd.backward(loss)
    gradient = x.grad
    other = (2 * x).sum()
    other.register_hook(lambda _: guard.module(x))  # type: ignore[no-untyped-call]
    with guard.context("training"):
        _refused(UnsanctionedCall, "a new call in a backward pass", other.backward)
    recomputes = [call for call in guard.calls if call.kind == "recompute"]
    expect(guard.count("training") == 1, f"one call counts as {guard.count('training')}")
    expect(len(recomputes) == 1, f"{len(recomputes)} recomputes were recorded, not 1")
    expect(
        gradient is not None and torch.equal(gradient, expected),
        "the gradient is not that of the unguarded module",
    )
    return "1 call, 1 recompute, the right gradient; a new call in backward is refused"


def compiles_once(_: Path) -> str:
    """Try `torch.compile`, with a backend that needs no C++ compiler and half a minute less."""
    module, x = _module(), torch.ones(2, 4)
    expected = module(x)
    _compiles(_module(), x, backend="aot_eager")
    torch.compiler.reset()
    module.compile(backend="aot_eager")
    guard = _guard(module)

    def both() -> Iterator[torch.Tensor]:
        with guard.context("training"), guard.sanctioned(SCOPE):
            yield guard.module(x)
        with guard.context("inference"), torch.no_grad():
            yield guard.module(x)

    results = [*both(), *both()]
    for result in results:
        torch.testing.assert_close(result, expected)
    compiled = [call.compiled.graphs_compiled or 0 for call in guard.calls if call.compiled]
    expect(len(compiled) == 4, f"{len(compiled)} of 4 calls were seen to be compiled")
    expect(compiled[0] > 0, "nothing was compiled")
    expect(not any(compiled[2:]), f"graphs compiled by the four calls: {compiled}")
    return f"{sum(compiled)} graphs for 2 contexts, none by further calls"


def _compiles(module: nn.Module, x: torch.Tensor, **how: str) -> None:
    """Make sure that this machine compiles a module which is not guarded.

    Raises:
        NotTried: It does not, as where a compiler is missing.
    """
    module.compile(**how)
    try:
        module(x)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise NotTried(f"torch.compile does not work here without a guard: {reason}") from error


def reads_its_log(folder: Path) -> str:
    """Try two micro-steps and a refused call, as the post-mortem finds them."""
    guard, x = _guard(_module(), log=folder), torch.ones(2, 4)
    with guard.context("training"):
        for step in range(2):
            with guard.micro_step(step), guard.sanctioned(SCOPE):
                guard.module(x)
        _refused(UnsanctionedCall, "a call outside every scope", lambda: guard.module(x))
    guard.uninstall()
    found = read_verdict(folder)
    numbers = found.micro_steps, found.calls, found.violations, found.unreadable_lines
    expect((*numbers, found.ended) == (2, 2, 1, 0, True), f"2 calls and 1 violation became {found}")
    return str(found)


def compares_ranks(folder: Path) -> str:
    """Try two processes over gloo, of which this is one: alike at first, and then not."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise NotTried("this torch was built without gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = folder / "rank1"  # a file: gloo prints too
    code = (
        "from pathlib import Path; from lensnet_guard.doctor.mechanisms import rank; "
        f"Path({str(answer)!r}).write_text(rank(1, {port}))"
    )
    peer = subprocess.Popen([sys.executable, "-c", code])
    try:
        first = rank(0, port)
        peer.wait(RANKS_WAIT_S)
    finally:
        peer.kill()
        peer.wait()
    seen = [first, answer.read_text() if answer.exists() else "no answer"]
    expect(seen == ["2 alike, then apart"] * 2, f"the ranks saw: {' | '.join(seen)}")
    return "2 equal micro-steps pass, and one that differs is told on both"


def rank(number: int, port: int) -> str:
    """Be one of two ranks, and say what it saw.

    Raises:
        NotTried: Gloo does not work here, whatever the guard does.
    """
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group(
            "gloo", rank=number, world_size=2, timeout=timedelta(seconds=RANKS_WAIT_S)
        )
        torch.distributed.barrier()
    except RuntimeError as error:
        raise NotTried(f"gloo does not work here: {first_line(error)}") from error
    guard, x = _guard(_module()), torch.ones(2, 4)

    def train(*steps: int) -> None:
        with guard.context("training"), compare_ranks(guard):
            for step in steps:
                with guard.micro_step(step), guard.sanctioned(SCOPE):
                    guard.module(x)

    try:
        train(0, 1)
        seen = f"{guard.count('training')} alike"
        try:
            train(2 + number)
        except RankDivergence:
            return f"{seen}, then apart"
        return f"{seen}, then nothing"
    except LensNetViolation as error:
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        torch.distributed.destroy_process_group()


def knows_cuda_graphs(_: Path) -> str:
    """Try whether the hazard is warned of, and training under CUDA graphs is as in eager mode."""
    if not torch.cuda.is_available():
        raise NotTried("torch sees no GPU")
    x = torch.ones(2, 4, device="cuda")
    _compiles(_module().cuda(), x, mode="reduce-overhead")
    module = _module().cuda()
    module.compile(mode="reduce-overhead")
    guard = _guard(module)
    with warnings.catch_warnings(record=True) as warned, guard.context("inference"):
        warnings.simplefilter("always")
        with torch.no_grad():
            for _i in range(STEPS):
                kept = guard.module(x)
                guard.module(2 * x)
                del kept
    hazards = sum(issubclass(w.category, LensNetHazard) for w in warned)
    expect(hazards == 1, f"an output that was overwritten in use was warned of {hazards} times")
    guard.uninstall()
    eager, graphed = _module().cuda(), _module().cuda()
    graphed.compile(mode="reduce-overhead")
    guard = _guard(graphed)
    for step in range(STEPS):
        losses = [_train(eager, eager, x)]
        with guard.context("training"), guard.micro_step(step), guard.sanctioned(SCOPE):
            losses.append(_train(guard.module, graphed, x))
        torch.testing.assert_close(*losses)
    state = guard.calls[-1].compiled
    phase = state.phase if state is not None else None
    return f"1 hazard told; {STEPS} training steps as in eager mode, the last one: {phase}"


def _train(model: nn.Module, owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Take one step of gradient descent, and return its loss."""
    loss: torch.Tensor = model(x).square().sum()
    torch.autograd.backward(loss)
    with torch.no_grad():
        for parameter in owner.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.01)
            parameter.grad = None
    return loss.detach().clone()


def _module() -> nn.Sequential:
    """Return the same small critic, however often."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def _guard(module: nn.Module, log: Path | None = None) -> Guard:
    return guard_module(module, policy=POLICY, mode="enforce", log=log, name=SCOPE)


def _refused(kind: type[LensNetViolation], what: str, call: Callable[[], object]) -> None:
    """Make a call that must be refused as ``kind``.

    Raises:
        Broken: It ran, or was refused as something else.
    """
    try:
        call()
    except kind:
        return
    except LensNetViolation as error:
        raise Broken(f"{what} is refused as {type(error).__name__}, not {kind.__name__}") from error
    raise Broken(f"{what} is let through")


MECHANISMS: dict[str, Callable[[Path], str]] = {
    "torch": imports_torch,
    "bypass": refuses_bypasses,
    "recompute": tells_recomputes,
    "reentrant": tells_reentrant_recomputes,
    "compile": compiles_once,
    "log": reads_its_log,
    "ranks": compares_ranks,
    "cuda_graphs": knows_cuda_graphs,
}
