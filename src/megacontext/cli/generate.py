"""``megacontext generate``."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from megacontext.cli.endings import EXIT_CODES, plain_endings, usage_errors
from megacontext.cli.options import is_given, option, with_options
from megacontext.cli.streams import PipeConsole
from megacontext.controller import MCController
from megacontext.data.tokenizer import Tokenizer, tokenizer_of
from megacontext.evaluation.focus_strip import focus_legend, focus_strip, tokens_per_character
from megacontext.inference.sampling import SamplingRules, sample_token
from megacontext.inference.session_config import SessionConfig, session_rules
from megacontext.inference.session_folder import require_free, require_session
from megacontext.inference.session_report import FocusEvent
from megacontext.inference.text_stream import TextStream
from megacontext.model.gguf import SMOLLM2
from megacontext.training.exported import model_folder
from megacontext.training.pretrained import load_model, usable_device
from megacontext.training.run_folder import RunFolder

_SESSION, _SAMPLING = SessionConfig(), SamplingRules()
# Training has so few entries that a session has no room in them; and LensNet learned which block is
# worth more, not whether one is worth anything.
_SHIPPED = {"wc_length": 1_024, "expand_threshold": -1.0}
_PROMPT_BYTES = 1 << 16  # of a prompt that are in memory at once


_HELP = """Continue a text of any length with a trained model.

The text streams to stdout; the budget and every refocus are told on stderr.

\b
Examples:
  megacontext generate --run-dir runs/first --text "def main("
  megacontext generate --language-model smollm2 --prompt book.txt --show-focus
  megacontext generate --run-dir runs/first --prompt book.txt --show-focus
  megacontext generate --run-dir runs/first --prompt log.txt --tree-store disk --session-dir s
  megacontext generate --run-dir runs/first --session-dir s --resume
"""
_OPTIONS = (
    click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        help="Folder of the run that trained the model.",
    ),
    click.option(
        "--language-model",
        help=f"Instead: {SMOLLM2}, with the LensNet and the GistNet that this package ships.",
    ),
    click.option(
        "--prompt",
        type=click.Path(exists=True, dir_okay=False, allow_dash=True),
        help="File to continue, of any length; - for standard input.",
    ),
    click.option("--text", help="Text to continue."),
    option("--max-tokens", 256, "Most bytes, or tokens of the model's tokenizer, to generate."),
    option("--temperature", _SAMPLING.temperature, "0 takes the likeliest token always."),
    option("--top-k", _SAMPLING.top_k, "Only so many of the likeliest tokens; 0 for all."),
    option("--top-p", _SAMPLING.top_p, "Only the likeliest that have this probability together."),
    option("--seed", 0, "Same seed, same text."),
    click.option(
        "--stop", multiple=True, help="Ends the text before this string; may be repeated."
    ),
    click.option(
        "--wc-length",
        type=int,
        show_default=f"the model's; {_SHIPPED['wc_length']:,} of what is shipped",
        help="Most entries of the working context.",
    ),
    option("--refocus-interval", _SESSION.refocus_interval, "Tokens from one refocus to the next."),
    option("--iterations", _SESSION.iterations, "Of each refocus, with one LensNet call each."),
    click.option(
        "--expand-threshold",
        default=_SESSION.expand_threshold,
        show_default=f"0.0; {_SHIPPED['expand_threshold']} of what is shipped",
        help="Only what scores above is expanded.",
    ),
    option(
        "--collapse-threshold", _SESSION.collapse_threshold, "Only what scores no more gives way."
    ),
    option("--margin", _SESSION.margin, "By which an expansion must beat the collapse it costs."),
    option("--max-edits", _SESSION.max_edits, "Of one iteration."),
    option("--cooldown", _SESSION.cooldown, "Iterations for which an edit is not undone."),
    option("--detail-share", _SESSION.detail_share, "Freed for detail when a level is added."),
    option("--device", "cpu", "Torch device, such as cpu or cuda."),
    click.option(
        "--tree-store",
        type=click.Choice(["memory", "disk"]),
        default="memory",
        help="Where the history is kept; disk needs --session-dir.",
    ),
    click.option(
        "--session-dir", type=click.Path(path_type=Path), help="Folder of a session on disk."
    ),
    click.option("--resume", is_flag=True, help="Continue the session in --session-dir."),
    click.option("--show-focus", is_flag=True, help="Draw at each refocus what is held in detail."),
    click.option("--quiet", is_flag=True, help="No budget and no refocus events on stderr."),
    click.option(
        "--json", "as_json", is_flag=True, help="Print text and report as JSON at the end."
    ),
)


@click.command("generate", help=_HELP, epilog=EXIT_CODES, context_settings={"show_default": True})
@with_options(_OPTIONS)
def command(run_dir: Path | None, language_model: str | None, device: str, **options: Any) -> None:
    """Continue a text; `_HELP` is what a user reads."""
    console = PipeConsole(stderr=True, highlight=False)
    where = options["session_dir"]
    again = f"Continue with: --session-dir {where} --resume" if where is not None else ""
    with plain_endings(lambda: again):
        with usage_errors():
            _check_usage(click.get_current_context())
            run_dir = model_folder(run_dir, language_model)
            if language_model is not None:
                options |= {n: v for n, v in _SHIPPED.items() if not is_given(n)}
            RunFolder(run_dir).require_run()
            on = usable_device(device)
        mc = load_model(run_dir, on)
        tokenizer = tokenizer_of(mc.config.language_model)
        with usage_errors():
            if mc.config.vocab_size < tokenizer.vocab_size:
                raise ValueError(
                    f"{run_dir} was not trained on {tokenizer.unit}: its vocab_size is "
                    f"{mc.config.vocab_size}, and text needs {tokenizer.vocab_size}"
                )
            generation = _Generation(mc, tokenizer, console, options)
        generation.run()


def _check_usage(ctx: click.Context) -> None:
    """Refuse options that do not go together, and folders that are not what they should be.

    Raises:
        ValueError: Options that do not go together; says which.
        FileNotFoundError: There is no session to resume.
        FileExistsError: The folder of a new session holds something.
    """
    given = ctx.params
    if given["text"] == "":
        raise ValueError("--text is empty, and a session begins with at least one token")
    if given["prompt"] is not None and given["text"] is not None:
        raise ValueError("give --prompt or --text, not both")
    if given["resume"]:
        if given["session_dir"] is None:
            raise ValueError("--resume needs the --session-dir that is to go on")
        fixed = [field.name for field in dataclasses.fields(SessionConfig)]
        changed = [name for name in fixed if is_given(name)]
        if changed:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise ValueError(f"a resumed session keeps its settings, so leave out {flags}")
        require_session(given["session_dir"])
        return
    if given["prompt"] is None and given["text"] is None:
        raise ValueError("give a --prompt or a --text to continue, or --resume a session")
    if (given["tree_store"] == "disk") != (given["session_dir"] is not None):
        raise ValueError("--tree-store disk and --session-dir belong together: give both")
    if given["session_dir"] is not None:
        require_free(given["session_dir"])


class _Generation:
    """From options to text."""

    def __init__(
        self, mc: MCController, tokenizer: Tokenizer, console: Console, options: dict[str, Any]
    ) -> None:
        self._mc, self._console, self._options = mc, console, options
        self._tokenizer, self._decode = tokenizer, tokenizer.decoder()
        self._rules = SamplingRules(options["temperature"], options["top_k"], options["top_p"])
        self._stream = TextStream(options["stop"])
        self._max_tokens = options["max_tokens"]
        if self._max_tokens < 0:
            raise ValueError(f"--max-tokens must not be negative, but is {self._max_tokens}")
        values = {f.name: options[f.name] for f in dataclasses.fields(SessionConfig)}
        self._settings = SessionConfig(**values)
        if not options["resume"]:
            session_rules(mc.config, self._settings, mc.language_model.max_tokens)
        self._text: list[str] = []
        self._told = 0  # refocuses that were told
        self._drawn_scale = (0, 0)  # tokens of a character, and highest LOD, in the last legend

    def run(self) -> None:
        """Generate until there is enough, or a stop string."""
        logits = self._begin()
        device = logits.device
        generator = torch.Generator(device).manual_seed(self._options["seed"])
        tokens = 0
        self._tell()
        while tokens < self._max_tokens and not self._stream.stopped:
            # A model may give logits of more tokens than there is text for.
            token = sample_token(
                logits[0, -1, : self._tokenizer.vocab_size], self._rules, generator
            )
            self._print(self._stream.feed(self._decode(int(token))))
            logits = self._mc.inference_step(token)
            tokens += 1
            self._tell()
        self._print(self._stream.finish())
        self._end(tokens)

    def _begin(self) -> Tensor:
        """Take in the prompt; return logits after it."""
        options = self._options
        if options["resume"]:
            logits = self._mc.resume_inference_session(options["session_dir"])
            for chunk in self._prompt():
                logits = self._mc.inference_step(chunk)
            return logits
        size = os.path.getsize(options["prompt"]) if options["prompt"] not in (None, "-") else None
        show = self._console.is_terminal and options["text"] is None
        with Progress(
            TextColumn("reading the prompt"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._console,
            disable=not show,
            transient=True,
        ) as progress:
            task = progress.add_task("prompt", total=size)
            return self._mc.begin_inference_session(
                self._prompt(),
                tree_store=options["tree_store"],
                path=options["session_dir"],
                settings=self._settings,
                progress=lambda done: progress.update(task, completed=done),
            )

    def _prompt(self) -> Iterator[Tensor]:
        """Yield the prompt in pieces."""
        return map(torch.from_numpy, self._tokenizer.encode(self._prompt_bytes()))

    def _prompt_bytes(self) -> Iterator[bytes]:
        prompt, text = self._options["prompt"], self._options["text"]
        if text:
            yield text.encode("utf-8", "surrogateescape")
        elif prompt == "-":
            yield from _pieces(sys.stdin.buffer)
        elif prompt is not None:
            with open(prompt, "rb") as file:
                yield from _pieces(file)

    def _print(self, text: str) -> None:
        self._text.append(text)
        if not self._options["as_json"]:
            _write(text)

    def _tell(self) -> None:
        """Tell the refocuses that were not told yet, and where the budget stands."""
        report = self._mc.inference_report()
        events = report.events[-(report.lensnet_calls - self._told) :]
        if self._options["quiet"] or report.lensnet_calls == self._told:
            return
        self._told = report.lensnet_calls
        if sys.stdout.isatty() and "".join(self._text[-1:])[-1:] not in ("", "\n"):
            _write("\n")  # the text goes on below
        for event in events:
            self._console.print(_event_line(event, report.wc_length), style="dim", soft_wrap=True)
        if self._options["show_focus"]:
            self._draw()

    def _draw(self) -> None:
        cut, width = self._mc.inference_cut, self._console.width
        ascii_only = self._console.options.ascii_only
        each, max_lod = tokens_per_character(cut, width), int(cut.lods.max())
        if (scale := (each, max(max_lod, 2))) != self._drawn_scale:
            self._console.print(focus_legend(*scale, ascii_only=ascii_only), soft_wrap=True)
            self._drawn_scale = scale
        self._console.print(focus_strip(cut, width, ascii_only=ascii_only))

    def _end(self, tokens: int) -> None:
        report = self._mc.inference_report()
        self._mc.end_inference_session()
        if self._options["as_json"]:
            result = {
                "text": "".join(self._text),
                "generated_tokens": tokens,
                "stopped": self._stream.stopped,
                "report": dataclasses.asdict(report),
            }
            _write(json.dumps(result) + "\n")
            return
        _write("\n")
        if not self._options["quiet"]:
            entries = ", ".join(f"{n} LOD{lod}" for lod, n in enumerate(report.entries_by_lod))
            self._console.print(
                f"{tokens} {self._tokenizer.unit} generated; "
                f"working context {report.length} entries ({entries}) "
                f"of {report.tokens:,} tokens, from token {report.first_token:,} on; "
                f"{report.refocuses} refocuses, {report.lensnet_calls} LensNet calls",
                soft_wrap=True,
            )


def _event_line(event: FocusEvent, wc_length: int) -> str:
    lost = f", {event.dropped} oldest lost" if event.dropped else ""
    return (
        f"refocus at {event.tokens:,} tokens: {event.expanded} expanded, "
        f"{event.collapsed} collapsed{lost}; {event.after} of {wc_length} entries, "
        f"from token {event.first_token:,} on"
    )


def _write(text: str) -> None:
    """Let whoever reads have the text at once, in the encoding of the stream."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(_PROMPT_BYTES):
        yield data
