"""The names in a log, once for who writes them and for who reads them. Needs no other module.

A log is one JSON object a line. The first line is ``run.begin`` (host, process, rank, versions,
policy); then come ``call.begin`` before and ``call.end`` after each run of the module,
``violation``, ``micro_step.end``, ``window.end``, and last ``run.end``. A file that follows a full
one begins with ``segment.begin``: the header again, and the sums of what came before. Field names
follow OpenTelemetry where it has one.
"""

VERSION = 1

# Events, and what every line has ------------------------------------------------------------------

RUN_BEGIN = "run.begin"
SEGMENT_BEGIN = "segment.begin"
CALL_BEGIN = "call.begin"
CALL_END = "call.end"
VIOLATION = "violation"
HAZARD = "hazard"
OVERWRITTEN = "overwritten"
MICRO_STEP_END = "micro_step.end"
WINDOW_END = "window.end"
RUN_END = "run.end"
TEST_BEGIN = "test.begin"
TEST_END = "test.end"

EVENT = "event"
TIMESTAMP = "timestamp"  # seconds since the epoch

# The header: of run.begin, and of segment.begin ---------------------------------------------------

SCHEMA_VERSION = "schema_version"
MODULE = "module"  # in most other lines too
MODE = "mode"
POLICY = "policy"
POLICIES = "policies"  # by module, instead of it, in a log of several modules
HOST = "host.name"
PID = "process.pid"
PARENT_PID = "process.parent_pid"
FORKED = "process.forked"
ARGUMENTS = "process.command_args"
PROCESS = "service.instance.id"  # tells a process from one that has its pid later
RANK = "rank"
VERSIONS = "versions"
FROM_MEMORY = "from_memory"  # written afterwards, from records that were kept
PYTEST_WORKER = "pytest.worker"
TEST = "test"  # of test.begin and test.end

SEGMENT = "segment"  # the number of the full file before this one
BEFORE = "before"  # the sums of what came before

# Sums: of a segment's ``before``, and of run.end --------------------------------------------------

MICRO_STEPS = "micro_steps"
CALLS = "calls"  # of run.end in any context, else in training; of micro_step.end by scope
INFERENCE_CALLS = "inference_calls"
VIOLATIONS = "violations"
LOST_LINES = "lost_lines"

# A call: of call.begin and violation; a few in call.end, too --------------------------------------

SEQ = "seq"
GUARD = "guard"
KIND = "kind"
VERDICT = "verdict"  # of run.end, too: in a word
REASON = "reason"
CONTEXT = "context"
SCOPE = "scope"
STEP = "step"
MICRO_STEP = "micro_step"
THREAD = "thread"
GRAD_ENABLED = "grad_enabled"
DURATION_MS = "duration_ms"
OUTCOME = "outcome"
RECOMPUTE_OF = "recompute_of"
COMPILED = "compiled"
METHOD = "method"
RECORD = (  # the fields of `CallRecord` that are written as they are, in this order
    *(SEQ, GUARD, MODULE, KIND, VERDICT, REASON, CONTEXT, SCOPE, STEP, MICRO_STEP, THREAD),
    *(GRAD_ENABLED, DURATION_MS, OUTCOME, RECOMPUTE_OF, COMPILED, METHOD),
)
HELD = "held"  # in observe mode: the conditions that held, as they are written in code
CALLERS = "callers"  # likewise: of each frame of the stack the name that a policy knows it by
WINDOWS = "windows"  # likewise: the windows that were open, but for the micro-step
OPTIMIZER_STEP = "optimizer_step"  # likewise: how many torch had taken; of run.end, too
IN_BACKWARD = "in_backward"  # likewise: whether it was made inside a backward pass
INPUTS = "inputs"
CALLER = "caller"  # the index of the caller's frame in the stack
STACK = "stack"
FILE = "code.file.path"  # of each frame of the stack
LINE = "code.line.number"
FUNCTION = "code.function.name"
MESSAGE = "message"  # of a violation
MISTAKE = "mistake"  # likewise: the entry of docs/mistakes.md that explains it

# What `COMPILED` holds ----------------------------------------------------------------------------

CUDA_GRAPHS = "cuda_graphs"
CAPTURING = "capturing"
GENERATION = "generation"
MARKS = "marks"
PENDING_BACKWARD = "pending_backward"
NEW_INPUTS = "new_inputs"
LIVE_OUTPUTS = "live_outputs"
PHASE = "phase"
GRAPHS_COMPILED = "graphs_compiled"
CUDA_GRAPHS_SKIPPED = "cuda_graphs_skipped"
COMPILE_STATE = (  # the fields of `CompileState`, in this order
    *(CUDA_GRAPHS, CAPTURING, GENERATION, MARKS, PENDING_BACKWARD, NEW_INPUTS, LIVE_OUTPUTS),
    *(PHASE, GRAPHS_COMPILED, CUDA_GRAPHS_SKIPPED),
)

# Two calls, the later of which wrote over the other's output: of hazard and overwritten -----------

AT = "at"
EARLIER_SEQ = "earlier_seq"
EARLIER_AT = "earlier_at"
EXCEPTION_TYPE = "exception.type"
EXCEPTION_MESSAGE = "exception.message"

# micro_step.end, and window.end -------------------------------------------------------------------

DUE = "due"
RAISED = "raised"  # the type of what broke it off
WINDOW = "window"  # its name, of window.end
