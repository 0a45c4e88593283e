"""One verdict from all findings: the worst, with its exit code, over runs that were resumed."""

import itertools

import pytest

from lensnet_guard.postmortem.findings import Call, CallSite, Divergence, Run, Violation
from lensnet_guard.postmortem.judge import current_runs, judge

CALL = Call(
    *(3, "critic", "call", "UnsanctionedCall", "training", None, 1, 0, "MainThread", True),
    *(("float32[2]",), ("train.py:5 in step",), "train.py:5 in step", 2.0),
    message="raised ValueError",
)
WHERE = "call 3 of critic, called from train.py:5 in step"


def run(log="lensnet.rank0", started=1.0, process="a", *, ended=True, notes=(), **fields):
    fields = {"rank": "0", "module": "critic", "events": 5, "last": started + 5, **fields}
    made = Run(log, started=started, process=process, ended=ended, **fields)
    for kind, note in notes:
        getattr(made, kind).add(note)
    return made


def died(**fields):
    return run(**{"ended": False, **fields})


def violated(**fields):
    return run(violation_count=2, violations=[Violation(CALL, None, ())], **fields)


def verdict(*runs, divergence=None):
    return judge(runs, divergence)


# From the worst to what is hardly worth a word.
FINDINGS = {
    f"crash in {WHERE}": {"ended": False, "in_flight": [CALL]},
    "the process died outside any call of critic": {"ended": False},
    "2 violations, the first UnsanctionedCall at train.py:5 in step": {
        "violation_count": 2,
        "violations": [Violation(CALL, None, ())],
    },
    "the output of call 1 was overwritten by call 2": {
        "notes": [("overwritten", "the output of call 1 was overwritten by call 2")]
    },
    f"{WHERE}, raised ValueError, and no call came after": {"raised": CALL},
    "ranks diverged at step 4": {},
    "budget missed in 3 micro-steps": {"deviation_count": 3},
    "log damaged: a file is missing": {"notes": [("damage", "a file is missing")]},
    "log damaged at line 7 of x": {"notes": [("unreadable", "7 of x")]},
    "7 lines of the log were lost": {"lost_lines": 7},
}


def of(finding):
    return {"divergence": Divergence(4, {"0": 1})} if "diverged" in finding else {}


class TestTheWorst:
    @pytest.mark.parametrize("finding", FINDINGS)
    def test_each_alone(self, finding):
        """Its own words, and exit code 1."""
        assert verdict(run(**FINDINGS[finding]), **of(finding)) == (finding, 1)

    @pytest.mark.parametrize(("worse", "finding"), list(itertools.combinations(FINDINGS, 2)))
    def test_the_worse_of_two(self, worse, finding):
        """Whichever rank it is in."""
        pair = (
            run(**FINDINGS[finding], log="x", rank="1"),
            run(**FINDINGS[worse], log="y", rank="2"),
        )
        diverged = {**of(worse), **of(finding)}
        assert verdict(*pair, **diverged) == (worse, 1)
        assert verdict(*pair[::-1], **diverged) == (worse, 1)

    def test_clean(self):
        """Exit code 0."""
        assert verdict(run()) == ("clean", 0)

    def test_still_running(self):
        """Nothing is wrong so far, also in the middle of a call."""
        running = run(ended=False, running=True, in_flight=[CALL])
        assert verdict(running) == ("still running, clean so far", 0)

    def test_still_running_with_a_violation(self):
        """It does not wait for the end."""
        assert verdict(violated(ended=False, running=True))[1] == 1

    @pytest.mark.parametrize("runs", [(), (Run("x"),)])
    def test_nothing_readable(self, runs):
        """Exit code 2."""
        assert verdict(*runs) == ("unreadable: no line of the log is an event", 2)

    def test_several_calls_in_flight(self):
        """Any of them may have been the one: the newest is named, the others counted."""
        told = verdict(died(in_flight=[CALL, CALL, CALL]))[0]
        assert told == f"crash in {WHERE}, or in 2 more in flight"

    def test_a_run_that_ended_inside_a_call(self):
        """A thread that was still in the module."""
        assert verdict(run(in_flight=[CALL])) == (f"the run ended in the middle of {WHERE}", 1)

    def test_a_torn_line_beside_a_death(self):
        """It says where the log stops."""
        told = verdict(died(torn_at="9 of x"))[0]
        assert told == "the process died outside any call of critic, log torn at line 9 of x"

    def test_violations_whose_lines_are_gone(self):
        """Their number is known from the sums."""
        assert verdict(run(violation_count=1)) == ("1 violation, in lines that are gone", 1)

    def test_what_a_clean_verdict_does_not_hide(self):
        """Hazards, calls that raised, earlier runs."""
        hazard = [("hazards", "call 2 wrote over an output of call 1")]
        told, code = verdict(died(), run(started=9.0, process="b", notes=hazard, raised_count=2))
        assert (told, code) == (
            "clean; 1 CUDA graph hazard, the first: call 2 wrote over an output of call 1; 2 calls "
            "raised; 1 earlier run died",
            0,
        )


class TestResumed:
    def test_in_the_same_file(self):
        """The later run takes the place of the one that crashed."""
        runs = [died(in_flight=[CALL]), run(started=9.0, process="b")]
        assert verdict(*runs) == ("clean; 1 earlier run died", 0)
        assert current_runs(runs) == runs[1:]

    def test_in_a_file_of_its_own(self):
        """When the dead one's file could not be taken over."""
        runs = [died(), run("lensnet.rank0.pid7", started=9.0, process="b")]
        assert verdict(*runs) == ("clean; 1 earlier run died", 0)

    def test_again_and_again(self):
        """Only the last one counts, and it died too."""
        runs = [died(started=9.0 * n, process=str(n)) for n in range(1, 4)]
        assert current_runs(runs) == runs[2:]
        assert verdict(*runs)[1] == 1

    def test_violations_never_heal(self):
        """Numbers may be wrong since then, whoever went on from them."""
        assert verdict(violated(), run(started=9.0, process="b")) == (
            "2 violations in an earlier run, the first UnsanctionedCall at train.py:5 in step",
            1,
        )

    def test_missed_budgets_never_heal(self):
        """Nor does damage of the files."""
        later = run(started=9.0, process="b")
        assert verdict(run(deviation_count=1), later) == ("budget missed in 1 micro-step", 1)
        assert verdict(run(notes=[("damage", "x")]), later) == ("log damaged: x", 1)

    def test_torn_lines_of_a_dead_run_heal(self):
        """That is how a process dies."""
        dead = died(notes=[("unreadable", "7 of x")], torn_at="7 of x")
        assert verdict(dead, run(started=9.0, process="b"))[1] == 0

    def test_by_another_rank(self):
        """Nobody has gone on for the one that died."""
        assert verdict(died(), run("y", started=9.0, process="b", rank="1"))[1] == 1

    def test_while_it_was_still_alive(self):
        """Two processes of one rank, side by side: both count."""
        assert verdict(died(), run("y", started=3.0, process="b"))[1] == 1

    def test_two_guards_of_one_process(self):
        """Their runs follow one another, and neither takes the other's place."""
        runs = [died(in_flight=[CALL]), run(started=9.0)]
        assert current_runs(runs) == runs
        assert verdict(*runs) == (f"crash in {WHERE}", 1)

    def test_a_log_of_no_known_process(self):
        """Whatever follows in the same file comes later."""
        assert verdict(died(process=None), run(started=9.0, process=None))[1] == 0


class TestForks:
    def test_a_worker_ends_without_a_word(self):
        """Multiprocessing leaves by `os._exit`."""
        worker = run("y", started=2.0, process="b", ended=False, forked=True)
        assert verdict(run(), worker) == ("clean", 0)

    def test_a_worker_that_died_inside_a_call(self):
        """That is a crash like any other."""
        worker = run("y", started=2.0, process="b", ended=False, forked=True, in_flight=[CALL])
        assert verdict(run(), worker) == (f"crash in {WHERE}", 1)

    def test_a_worker_takes_nobodys_place(self):
        """It is no resumed run, however late it started."""
        worker = run("y", started=9.0, process="b", forked=True)
        assert verdict(died(), worker)[1] == 1


class TestWorkers:
    """Processes that a run has forked or spawned are part of it, whenever they began."""

    def worker(self, *, parent=7, process="w", started=2.0, **fields):
        fields = {"pid": 8, "last": started + 1, **fields}
        return run(f"lensnet.rank0.pid{process}", started, process, parent=parent, **fields)

    @pytest.mark.parametrize("forked", [True, False])
    def test_violations_in_an_earlier_run(self, forked):
        """As of the next epoch's workers, or of its log, the ones before were told as that."""
        guilty = {"violation_count": 2, "violations": [Violation(CALL, None, ())]}
        runs = [
            run(pid=7),
            self.worker(forked=forked, **guilty),
            run(pid=7, started=10.0),
            self.worker(process="v", started=11.0, forked=forked),
        ]
        told = "2 violations in 1 worker, the first UnsanctionedCall at train.py:5 in step"
        assert verdict(*runs) == (told, 1)
        assert current_runs(runs) == runs

    def test_in_the_file_of_their_parent(self):
        """A worker that goes on after its parent's log has ended finds that name free."""
        runs = [violated(pid=7), run(started=9.0, process="w", pid=8, parent=7)]
        assert current_runs(runs) == runs
        assert verdict(*runs)[0].startswith("2 violations, the first")

    def test_they_took_the_place_of_their_parent(self):
        """Its death was forgiven when it had spawned somebody before."""
        runs = [died(pid=7), self.worker(started=9.0)]
        assert verdict(*runs) == ("the process died outside any call of critic", 1)

    def test_they_heal_with_their_parent(self):
        """The run that goes on is another's, with workers of its own."""
        runs = [
            died(pid=7),
            self.worker(ended=False, in_flight=[CALL]),
            run("z", started=20.0, process="b", pid=9),
            self.worker(parent=9, process="v", started=21.0),
        ]
        assert current_runs(runs) == runs[2:]
        assert verdict(*runs) == ("clean; 2 earlier runs died", 0)

    def test_workers_of_workers(self):
        """Belong to the first of them."""
        runs = [run(pid=7), self.worker(), self.worker(parent=8, process="v", started=9.0, pid=9)]
        assert current_runs(runs) == runs

    def test_pids_come_again(self):
        """A restarted container gives its processes the numbers of those before."""
        runs = [
            died(pid=7),
            self.worker(ended=False, in_flight=[CALL]),
            run(started=20.0, process="b", pid=7),
            self.worker(process="v", started=21.0),
        ]
        assert current_runs(runs) == runs[2:]

    @pytest.mark.parametrize("other", [{"host": "else"}, {"rank": "1"}, {"started": 8.0}])
    def test_another_process_of_that_number(self, other):
        """On another host, of another rank, or later: that is not the parent, and no run of its."""
        guilty = {"violation_count": 1, "violations": [Violation(CALL, None, ())]}
        stranger = run("y", **{"pid": 7, "process": "b", **other})
        told, _ = verdict(stranger, self.worker(started=7.0, last=20.0, **guilty))
        assert told == "1 violation, the first UnsanctionedCall at train.py:5 in step"


def test_sites_are_no_verdict() -> None:
    """Calls that were made and allowed are only counted."""
    clean = run()
    clean.sites[CallSite("critic", "training", None, "call", None, "train.py:5")] += 7
    assert verdict(clean) == ("clean", 0)
