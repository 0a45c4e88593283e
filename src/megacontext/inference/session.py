"""A session: a language model over a history that grows without end, through a small context.

Tokens go into the tree; the language model reads the working context and remembers what it has
read. Every ``refocus_interval`` tokens the focus allocator edits the cut by LensNet's scores, and
the model reads the new working context once. What a token costs does not depend on how long the
history is.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacontext.allocators.cut import Cut
from megacontext.allocators.rules import first_that_fits, highest_lod
from megacontext.inference.focus import FocusAllocator
from megacontext.inference.focus_state import FocusState
from megacontext.inference.session_config import SessionConfig, session_rules
from megacontext.inference.session_folder import SessionFolder
from megacontext.inference.session_report import FocusEvent, InferenceReport
from megacontext.inference.stored_view import entries_of, view_of_store
from megacontext.inference.tree_store import TreeStore
from megacontext.model.fingerprint import fingerprint
from megacontext.model.hf_language_model import HFSeen
from megacontext.model.language_model import Seen
from megacontext.model.networks import Networks
from megacontext.model.working_context import NO_LABEL, WorkingContext

Tokens = NDArray[np.int64]
_EVENTS_KEPT = 1_000


class Session:
    """One history and the working context over it; `SessionHost` has methods for its use.

    Args:
        networks: The model.
        settings: The user's.
        folder: Where the tree is kept; in memory if None.

    Attributes:
        rules: What the settings make of a focus, for this model.
        settings: The user's.
        store: The tree.
        focus: As of the last refocus.

    Raises:
        ValueError: Settings that do not fit the model.
        OSError: The folder cannot be written.
    """

    def __init__(
        self, networks: Networks, settings: SessionConfig, folder: SessionFolder | None = None
    ) -> None:
        config = networks.config
        self.rules = session_rules(config, settings, networks.language_model.max_tokens)
        self.settings = settings
        self._networks = networks
        self._folder = folder
        self._allocator = FocusAllocator(
            networks.lensnet,
            networks.guard,
            self.rules,
            horizon_tokens=config.horizon_tokens,
            focus_window=config.focus_window,
        )
        self.store = TreeStore(
            networks.language_model,
            networks.gistnet,
            block_size=config.block_size,
            max_lod=config.max_lod,
            folder=folder.path if folder is not None else None,
        )
        self.focus = FocusState(self.rules.geometry.coarse_cut(0, 0), 0)
        self._events: deque[FocusEvent] = deque(maxlen=_EVENTS_KEPT)
        self._seen: Seen | HFSeen | None = None
        self._seen_tokens = 0
        self._busy = threading.Lock()

    # What the user does ------------------------------------------------------------------------

    def begin(self, chunks: Iterable[Tokens], progress: Callable[[int], None]) -> Tensor:
        """Take in the first tokens, focus on them, and read.

        Args:
            chunks: The tokens, in pieces ``[n]``.
            progress: Is told now and then how many were taken in.

        Returns:
            Logits after the last token, ``[1, 1, vocab_size]``.

        Raises:
            ValueError: There are no tokens.
        """
        with self._alone():
            for tokens in chunks:
                self.store.append(tokens)
                self._deepen()  # as they come, not out of all that there are
                progress(len(self.store))
            if not len(self.store):
                raise ValueError("a session begins with at least one token")
            self._focus_anew()
            return self._read(1)

    def resume(self) -> Tensor:
        """Go on where a session ended or was killed.

        Returns:
            Logits after the last token, ``[1, 1, vocab_size]``.

        Raises:
            RuntimeError: The session is in no folder.
            ValueError: The folder is damaged, or holds no token yet.
        """
        if self._folder is None:
            raise RuntimeError("only a session in a folder can be resumed")
        with self._alone():
            if not len(self.store):
                raise ValueError(
                    f"{self._folder.path} holds no token yet: the session was killed before the "
                    "first; remove the folder and begin again"
                )
            self._deepen()
            focus = self._folder.read_focus(self.rules, len(self.store))
            if focus is None:  # killed while it took in its first tokens
                self._focus_anew()
            else:
                self.focus = focus
                if self._due():
                    self._refocus()
            return self._read(1)

    def step(self, tokens: Tokens) -> Tensor:
        """Append tokens, refocusing where it is due.

        Args:
            tokens: What is new, ``[n]``.

        Returns:
            Logits after each of them, ``[1, n, vocab_size]``. A refocus sees no token that it has
            not yet predicted: only the logits of the last token before it are those of the new
            working context.
        """
        logits = []
        with self._alone():
            begin = 0
            while begin < len(tokens):
                if self._due():  # when the last one failed
                    self._refocus()
                end = begin + self.settings.refocus_interval - self._since_refocus()
                self.store.append(tokens[begin:end])
                read = self._read(len(tokens[begin:end]))
                if self._due():
                    self._refocus()
                    read = torch.cat([read[:, :-1], self._read(1)], dim=1)
                logits.append(read)
                begin = end
        return torch.cat(logits, dim=1)

    def close(self) -> None:
        """Let go of files."""
        self.store.close()
        if self._folder is not None:
            self._folder.close()

    # What the user sees ------------------------------------------------------------------------

    @property
    def cut(self) -> Cut:
        """The cut now: as of the last refocus, and all tokens since at LOD0."""
        return self.focus.cut_at(len(self.store))

    def working_context(self) -> WorkingContext:
        """Gather what the language model reads now, ``[1, W]``; starts count from its first token.

        Angles of positions near 1,000,000 lose digits in float32, and only differences matter.
        """
        cut = self.cut
        labels = np.full(len(cut), NO_LABEL, dtype=np.int64)
        known = cut.ends < len(self.store)
        labels[known] = self.store.tokens(cut.ends[known])
        context = entries_of(self.store, cut)
        return dataclasses.replace(
            context, labels=torch.from_numpy(labels)[None].to(context.labels.device)
        )

    def report(self) -> InferenceReport:
        """Return the session in figures."""
        cut = self.cut
        ram, disk = self.store.nbytes()
        by_lod = np.bincount(cut.lods, minlength=self.rules.geometry.max_lod + 1)
        return InferenceReport(
            tokens=len(self.store),
            first_token=int(cut.positions[0]),
            length=len(cut),
            wc_length=self.rules.wc_length,
            entries_by_lod=tuple(by_lod.tolist()),
            next_refocus=max(self.settings.refocus_interval - self._since_refocus(), 0),
            ram_bytes=ram,
            disk_bytes=disk,
            events=tuple(self._events),
            **dataclasses.asdict(self.focus.totals),
        )

    # How it works ------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one caller in at a time.

        Raises:
            RuntimeError: There is another.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another thread is using this session; give each thread its own")
        try:
            yield
        finally:
            self._busy.release()

    def _since_refocus(self) -> int:
        return len(self.store) - self.focus.tokens

    def _due(self) -> bool:
        return self._since_refocus() >= self.settings.refocus_interval

    def _deepen(self) -> int:
        """Let the tree have the levels that the history needs now; return the highest."""
        self.store.deepen(depth := highest_lod(len(self.store), self.rules))
        return depth

    def _focus_anew(self) -> None:
        """Focus from gists alone, in so many iterations that the best parts reach LOD0."""
        rules, end = self.rules.up_to(self._deepen()), len(self.store)
        first = first_that_fits(0, end, rules)
        self.focus = FocusState(rules.geometry.coarse_cut(first, end), end)
        self._refocus(max(self.rules.geometry.max_lod, int(self.focus.cut.lods.max())))

    def _refocus(self, least: int = 1) -> None:
        """Edit the cut; on disk before it counts, so that an error changes nothing."""
        tokens, depth, events = len(self.store), self._deepen(), []
        focus = self.focus.refocused(tokens)
        query = self._networks.config.query_tokens
        look = partial(view_of_store, self.store, query_tokens=query)
        for _ in range(max(self.settings.iterations, least)):
            before = len(focus.cut)
            cut, edits = self._allocator.refocus(focus.cut, focus.resting, look, depth)
            events.append(FocusEvent.of(edits, cut, before, tokens))
            focus = focus.edited(cut, edits, self.settings.cooldown)
        if self._folder is not None:
            self._folder.write_focus(focus)
        self.focus, self._seen = focus, None
        self._events.extend(events)

    def _read(self, last: int) -> Tensor:
        """Let the language model read what it has not read.

        Returns:
            Logits after the last tokens, ``[1, last, vocab_size]``.
        """
        seen, self._seen = self._seen, None  # half-read by an interrupted model is not read
        if seen is None:
            room = self.rules.wc_length + self.settings.refocus_interval
            seen = self._networks.language_model.new_seen(room)
            context = entries_of(self.store, self.cut)
            embeddings, starts, spans = context.embeddings, context.starts, context.spans
        else:
            new = np.arange(self._seen_tokens, len(self.store), dtype=np.int64)
            embeddings = self.store.embed(self.store.tokens(new))[None]
            first = int(self.focus.cut.positions[0])
            starts = torch.from_numpy(new - first).to(self.store.device)[None]
            spans = torch.ones_like(starts)
        logits: Tensor = self._networks.language_model(embeddings, starts, spans, None, seen, last)
        self._seen, self._seen_tokens = seen, len(self.store)
        return logits


def session_about(networks: Networks, settings: SessionConfig) -> dict[str, Any]:
    """Return what the folder of a session says of the model that made it."""
    sizes = ("vocab_size", "d_model", "block_size", "max_lod", "recent_tokens")
    return {
        "model": {name: getattr(networks.config, name) for name in sizes},
        "weights": fingerprint(networks.language_model.embedding, networks.gistnet),
        "settings": dataclasses.asdict(settings),
    }
