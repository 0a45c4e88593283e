"""Networks that hold a session: the inference side of a controller.

Each method runs in inference context, which it opens when none is set, and without gradients.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from megacontext.allocators.cut import Cut
from megacontext.inference.session import Session, Tokens, session_about
from megacontext.inference.session_config import SessionConfig, session_rules
from megacontext.inference.session_folder import SessionFolder
from megacontext.inference.session_report import InferenceReport
from megacontext.model.networks import Networks
from megacontext.model.tokens import check_range
from megacontext.model.working_context import WorkingContext


class SessionHost(Networks):
    """Networks that can hold one session at a time, over a history that grows.

    What runs a network raises a RuntimeError in training context, and all but the first two methods
    do when there is no session. See `Networks` for the arguments.
    """

    _session: Session | None = None

    def begin_inference_session(
        self,
        tokens: Tensor | Iterable[Tensor],
        *,
        tree_store: str = "memory",
        path: str | os.PathLike[str] | None = None,
        settings: SessionConfig | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Begin a session with its first tokens; it takes the place of the one before.

        The weights must stay as they are while it lasts: finished gists are kept.

        Args:
            tokens: The first tokens, int64 ``[T]`` or ``[1, T]``, or such pieces one after another,
                which need not fit into memory together.
            tree_store: ``"memory"``, or ``"disk"`` for a history that survives a kill and may be
                larger than memory.
            path: Folder of a session on disk; new or empty.
            settings: Of the session.
            progress: Is told now and then how many tokens were taken in.

        Returns:
            Next-token logits after the last token, ``[1, 1, vocab_size]``.

        Raises:
            TypeError: Tokens of another type.
            ValueError: Tokens or settings that make no session.
            FileExistsError: The folder holds something.
            BlockingIOError: Another session is using it.
            OSError: It cannot be written.
        """
        settings = settings or SessionConfig()
        if tree_store not in ("memory", "disk"):
            raise ValueError(f"tree_store must be 'memory' or 'disk', not {tree_store!r}")
        if (tree_store == "disk") != (path is not None):
            raise ValueError("tree_store='disk' and path belong together: give both or neither")
        with self._inference():
            several = isinstance(tokens, Iterable) and not isinstance(tokens, Tensor)
            given: Iterator[object] = iter(tokens if several else [tokens])
            chunks: Iterator[Tokens] = (_as_tokens(c, self.config.vocab_size) for c in given)
            first = next(chunks, None)
            if first is None:
                raise ValueError("a session begins with at least one token")
            session_rules(self.config, settings, self.language_model.max_tokens)
            folder = (
                None if path is None else SessionFolder.create(path, session_about(self, settings))
            )
            return self._start(
                settings, folder, lambda session: session.begin(chain([first], chunks), progress)
            )

    def resume_inference_session(self, path: str | os.PathLike[str]) -> Tensor:
        """Go on with a session on disk, also one that was killed; settings are its own.

        `inference_report` says how many tokens it holds.

        Args:
            path: Folder of the session.

        Returns:
            Next-token logits after its last token, ``[1, 1, vocab_size]``.

        Raises:
            FileNotFoundError: There is no session.
            BlockingIOError: Another process, or another controller, is using it.
            ValueError: It was made by another model, or is damaged.
        """
        with self._inference():
            about = session_about(self, SessionConfig())
            folder, saved = SessionFolder.open(path, about)
            try:
                settings = SessionConfig(**saved)
                session_rules(self.config, settings, self.language_model.max_tokens)
            except (TypeError, ValueError) as error:
                folder.close()
                raise ValueError(f"the settings in {path} are not usable: {error}") from error
            return self._start(settings, folder, Session.resume)

    def inference_step(self, new_tokens: Tensor) -> Tensor:
        """Append tokens to the history; refocuses where it is due.

        Args:
            new_tokens: At least one, int64 ``[T]`` or ``[1, T]``.

        Returns:
            Next-token logits after each of them, ``[1, T, vocab_size]``.

        Raises:
            TypeError: Tokens of another type; nothing was appended.
            ValueError: Tokens that cannot be appended; nothing was.
            OSError: The folder cannot be written. `inference_report` says what was appended.
        """
        session = self._current()
        with self._inference():
            return session.step(_as_tokens(new_tokens, self.config.vocab_size))

    @property
    def working_context(self) -> WorkingContext:
        """What the language model reads now, ``[1, W]``.

        Starts count from the first token that is covered, ``inference_report().first_token``.
        """
        session = self._current()
        with self._inference():
            return session.working_context()

    @property
    def inference_cut(self) -> Cut:
        """Which entries the working context has now: absolute positions, and LODs."""
        return self._current().cut

    def inference_report(self) -> InferenceReport:
        """Return the session in figures, as of now."""
        return self._current().report()

    def end_inference_session(self) -> None:
        """Let go of the session and its files. One on disk can be resumed."""
        self._current().close()
        self._session = None

    def __getstate__(self) -> dict[str, object]:
        """Leave the session out of copies: it may own files."""
        return self.__dict__ | {"_session": None}

    def _start(
        self,
        settings: SessionConfig,
        folder: SessionFolder | None,
        how: Callable[[Session], Tensor],
    ) -> Tensor:
        """Put a new session in the place of the one before, if it starts."""
        session = None
        try:
            session = Session(self, settings, folder)
            logits = how(session)
        except BaseException:
            if session is not None:
                session.close()
            elif folder is not None:
                folder.close()
            raise
        if self._session is not None:
            self._session.close()
        self._session = session
        return logits

    def _current(self) -> Session:
        if self._session is None:
            raise RuntimeError(
                "there is no inference session: begin one with mc.begin_inference_session(tokens)"
            )
        return self._session

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Open inference context for a block, and take no gradients in it."""
        context = self.guard.current_context
        if context == "training":
            raise RuntimeError(
                "inference sessions cannot be used in training context; "
                'leave `with mc.context("training"):` first'
            )
        with torch.no_grad():
            if context == "inference":
                yield
            else:
                with self.context("inference"):
                    yield


def _as_tokens(tokens: object, vocab_size: int) -> Tokens:
    """Refuse what cannot be appended; return host integers ``[T]``."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 tensor, not {found}")
    shape = list(tokens.shape)
    if not shape or len(shape) > 2 or (len(shape) == 2 and shape[0] != 1):
        raise ValueError(f"tokens must be [T] or [1, T]: a session has one history, not {shape}")
    if not shape[-1]:
        raise ValueError("there must be at least one token")
    host: Tokens = tokens.flatten().numpy(force=True)
    check_range(host, vocab_size)
    return host
