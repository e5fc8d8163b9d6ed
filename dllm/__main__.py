"""`python -m dllm`: run a verb; turn every outcome into an exit code and at most one line on stderr.

Exit codes: 2 to 6 as in dllm/errors.py, 5 for an error of the operating system, 128 + n for signal n (SIGHUP, SIGINT,
SIGTERM), 1 for a bug in dllm. Tracebacks appear only with --debug.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # The folder that `python -m` is called in comes last: a random.py of its user's would hide Python's own.
    sys.path.append(sys.path.pop(0))

import errno
import locale
import os
import signal
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from dllm import secrets
from dllm.disk_faults import is_disk_full, no_room, what_helps
from dllm.errors import ConfigError, DllmError, StageError
from dllm.files import refuse_pipes
from dllm.outside import MAX_LINE, one_line
from dllm.process import signals
from dllm.process.git_hooks import leave_hook
from dllm.process.huge_pages import restart_with_huge_pages
from dllm.process.interpreter import check_docstrings, explain_import
from dllm.process.openmp import spin_briefly
from dllm.process.output import open_closed, outlive_readers
from dllm.process.parent import follow_parent
from dllm.process.program import program
from dllm.process.proxies import bypass_for_loopback

if TYPE_CHECKING:
    import typer

PACKAGE = Path(__file__).parent
WITH_MODELS = {"regenerate", "train", "evaluate", "generate", "lm-eval"}

NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "failed to map segment")
"""What torch says, the system's words, and those of its loader for a library (`ulimit -v`)."""
MEMORY_HINT = (
    "make batches or rows smaller (train.batch_size, train.max_length, batch_size of the stage); "
    "docs/recipes.md has fsdp and activation_checkpointing"
)


def start() -> NoReturn:
    """Prepare the process, which may start it anew, and run the command line."""
    _read_utf8()
    spin_briefly()
    if WITH_MODELS & set(sys.argv[1:2]):
        restart_with_huge_pages()
    main()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    open_closed()
    # Outside the block below, while Python starts and ends, a signal ends the process by itself: Python's own handler
    # of SIGINT would raise inside a destructor, where the exception is printed and lost.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # First of all. Even imports take a while.
    with signals.handled(signal.SIGTERM, signal.SIGINT):
        follow_parent()
        refuse_pipes()
        outlive_readers()
        bypass_for_loopback()
        leave_hook()
        secrets.install()
        # PYTHONWARNINGS=error would make failures of what other packages warn of at import.
        if any(option.startswith("error") for option in sys.warnoptions):
            warnings.simplefilter("default")
        if not is_debug:
            sys.excepthook = _report_bug
        code = _run(arguments, is_debug)
        try:
            sys.stdout.flush()
        except OSError:  # it has been reported; Python would flush once more, fail, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)


def _run(arguments: list[str], is_debug: bool) -> int:
    try:
        import typer
    except ModuleNotFoundError as error:
        if cause := explain_import(error):
            return _report(cause)
        raise
    signals.check()
    try:
        check_docstrings()
        from dllm.cli.app import app

        # Not app(): typer would replace our excepthook by its own.
        verbs = typer.main.get_command(app)
        code = verbs.main(args=arguments, prog_name=program(), standalone_mode=False) or 0
        sys.stdout.flush()  # here a full disk is one line
        return code
    except (DllmError, typer.TyperException, OSError, KeyboardInterrupt) as error:
        if is_debug:
            traceback.print_exc()
        return _report_usage(error) if isinstance(error, typer.TyperException) else _report(error)
    except Exception as error:
        if not is_debug and (cause := _explain_path(error) or explain_import(error)):
            return _report(cause)
        if is_debug or not (_is_memory_full(error) or is_disk_full(error)):
            raise
        return _report(
            StageError("memory is full", hint=MEMORY_HINT) if _is_memory_full(error) else _disk_is_full(error)
        )


def _report(error: BaseException) -> int:
    """Print one line for an error the user can act on; return its exit code."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OSError):
        error = _explain(error)
    _print_line(str(error))
    return error.exit_code if isinstance(error, DllmError) else 1


def _explain_path(error: Exception) -> ConfigError | None:
    """Explain what `Path.expanduser` and `Path.resolve` raise a RuntimeError for; None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    if "home directory" in str(error):
        hint = "set HOME, or DLLM_CACHE and paths without ~"
        return ConfigError("this user's home directory is not known", where="HOME", hint=hint)
    _, is_loop, path = str(error).partition("Symlink loop from ")
    return ConfigError("symbolic links that lead back to themselves", where=path.strip("'\"")) if is_loop else None


def _report_usage(error: typer.TyperException) -> int:
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    if message:  # empty where no verb was given: the help is already printed
        context = getattr(error, "ctx", None)
        path = context.command_path if context else program()
        _print_line(f"{message[0].lower()}{message[1:]}; see `{path} --help`")
    return error.exit_code


def _explain(error: OSError) -> StageError:
    where = None if error.filename is None else str(error.filename)
    if is_disk_full(error):
        return _disk_is_full(error, where)
    if error.errno == errno.EADDRINUSE:
        return StageError("the port is taken", where=where, hint="stop the process that holds it or choose another")
    if error.errno == errno.ENOMEM:
        return StageError("memory is full", where=where, hint=MEMORY_HINT)
    return StageError(error.strerror or str(error), where=where, hint=what_helps(error))


def _disk_is_full(error: Exception, where: str | None = None) -> StageError:
    what = no_room(error) or "disk is full"
    way = "free some space" if what.startswith("disk") else "raise that limit"
    return StageError(f"the {what}", where=where, hint=f"{way} and run the same command again")


def _is_memory_full(error: BaseException) -> bool:
    # By name and text, so that torch need not be imported.
    on_gpu = type(error).__name__ == "OutOfMemoryError"
    return on_gpu or isinstance(error, MemoryError) or any(text in str(error).lower() for text in NO_MEMORY)


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    ours = [frame for frame in traceback.extract_tb(trace) if Path(frame.filename).is_relative_to(PACKAGE)]
    place = f" ({Path(ours[-1].filename).relative_to(PACKAGE.parent)}:{ours[-1].lineno})" if ours else ""
    _print_line(f"unexpected {kind.__name__}: {error}{place}; a bug: run again with --debug and report what it prints")


def _print_line(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "dllm" if rank == "0" else f"dllm rank {rank}"
    print(f"{prefix}: {one_line(text, MAX_LINE)}", file=sys.stderr, flush=True)


def _read_utf8() -> None:
    """Start again where the locale has another encoding than UTF-8, in which all files of a project are written.

    What is printed keeps the locale's.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        printed = getattr(sys.stdout, "encoding", None) or "utf-8"
        os.environ["PYTHONUTF8"] = "1"  # for children
        os.environ.setdefault("PYTHONIOENCODING", f"{printed}:replace")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    start()
