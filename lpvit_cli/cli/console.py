"""The one output sink: tables and sentences for people, one JSON document for programs, errors as exit codes.

Results go to stdout, progress and notes to stderr; with --json stdout holds the document and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lpvit_cli import distributed
from lpvit_cli.errors import EnvironmentFault, ForeignImage, LpvitError, escaped, known, printable
from lpvit_cli.registry import foreign_culprit

INTERRUPTED = 130


class Console:
    """`human` prints results, `note` and `progress` go to stderr, `document` collects what --json will print.

    Of several processes only the main one prints, but for errors that are another one's own.
    """

    def __init__(self, json_mode: bool = False, quiet: bool = False, verbose: bool = False):
        from lpvit_cli.cli.screen import Screen

        main = distributed.is_main()
        self.json_mode, self.quiet, self.verbose = json_mode and main, quiet or not main, verbose
        self.out = Screen(stderr=json_mode)
        self.err = Screen(stderr=True)
        self.document: Any = None
        self._bar: Any = None
        self._printed = 0.0

    def human(self, *renderables: Any) -> None:
        self._stop_bar()
        if not self.quiet:
            for renderable in renderables:
                self.out.print(renderable)

    def note(self, text: str) -> None:
        self._stop_bar()
        if not self.quiet:
            self.err.print(text, style="dim")

    def progress(self, what: str, done: int, total: int, detail: str) -> None:
        """A live bar on a terminal; elsewhere a line every ten seconds, and one when a task is complete."""
        if self.quiet:
            return
        if not self.err.is_terminal:
            now = time.monotonic()
            if now - self._printed > 10 or done == total:
                self._printed = now
                self.err.print(f"{what}: {detail or f'{done}/{total}'}")
            return
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.err, transient=True)
            self._bar.start()
        task = next((t.id for t in self._bar.tasks if t.description == what and not t.finished), None)
        if task is None:
            for old in self._bar.task_ids:
                self._bar.remove_task(old)
            task = self._bar.add_task(what, total=total or None, detail=detail)
        self._bar.update(task, completed=done, total=total or None, detail=detail)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _fail(self, kind: str, message: str, hint: str, code: int) -> None:
        self._stop_bar()
        if self.json_mode:
            error = {"kind": kind, "message": message, "hint": hint, "exit_code": code}
            self.document = {**(self.document or {}), "error": error}
        self.err.print(f"error: {message}", style="bold red", soft_wrap=True)
        if hint:
            self.err.print(f"  {hint}", soft_wrap=True)

    @contextmanager
    def command(self) -> Iterator[None]:
        """Run a command's body; every way out of it becomes an exit code (see errors.py; 130 interrupted, 1 a bug)."""
        code, on_term = 0, signal.getsignal(signal.SIGTERM)
        try:
            yield
        except LpvitError as error:
            code = error.exit_code
            self._tell(error)
            if self.verbose and error.__cause__:
                _show_trace(error.__cause__)
        except PermissionError as error:  # a file or folder of another user, anywhere
            code = EnvironmentFault.exit_code
            told = f"{error.filename or 'a file'}: {error.strerror}"
            self._fail("EnvironmentFault", told, "ask its owner for the right to use it, or name another", code)
        except KeyboardInterrupt:
            code = INTERRUPTED
            self._fail("Interrupted", "interrupted", "nothing half-made was left; run the same command again to go on", code)
        except Exception as error:
            told = printable(f"{type(error).__name__}: {error}")
            if fault := known(error):
                code = fault.exit_code
                self._fail(type(fault).__name__, fault.message, fault.hint, code)
            elif culprit := foreign_culprit(error.__traceback__):
                code = EnvironmentFault.exit_code
                if self.verbose:
                    _show_trace(error)
                self._fail("PluginFault", f"{culprit} failed: {told}", "report it to its author; --verbose shows where", code)
            else:
                code = 1
                _show_trace(error)
                self._fail("Bug", told, "this is a bug in lpvit: please report it with the lines above", code)
        finally:
            self._stop_bar()
        self._print_document()
        if signal.getsignal(signal.SIGTERM) is not on_term:  # a job has failed (distributed.joined)
            signal.signal(signal.SIGTERM, on_term)
        if code:
            sys.exit(code)

    def give_up(self, lost: distributed.PeerLost) -> None:
        """End the program from any thread, as `command` would; nothing that is half made counts."""
        self._tell(lost)
        self._print_document()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(lost.exit_code)

    def _tell(self, error: LpvitError) -> None:
        """Of several processes one tells of an error that all meet, and each of its own."""
        if isinstance(error, distributed.PeerLost):
            tells = distributed.speaks(error)
        else:
            tells = distributed.is_main() or isinstance(error, EnvironmentFault | ForeignImage)
        if tells:
            self._fail(type(error).__name__, error.message, error.hint, error.exit_code)

    def _print_document(self) -> None:
        if self.json_mode:
            sys.stdout.write(json.dumps(self.document, indent=1) + "\n")


def _show_trace(error: BaseException) -> None:
    sys.stderr.write(escaped("".join(traceback.format_exception(error))))
