"""The console commands, and what they share: how a user's mistake is reported.

`mlra-train`, `mlra-plan`, `mlra-decode`, `mlra-evaluate`, `mlra-prepare`, `mlra-plot`, `mlra-convert` and
`mlra-describe` are the `main` functions of the modules in this package.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from mlra_jax.config import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
# A user's mistake wherever it is raised; the second kind only where this package's own code raised it.
_ALWAYS = (
    ConfigError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
_WHEN_OURS = (ValueError, NotImplementedError, ImportError)


def is_users(error: BaseException) -> bool:
    """Whether `error` says what the user did wrong: a path, or something that this package itself refused.

    A ValueError from deeper down (JAX, NumPy, ...) is a bug of ours, and its traceback is needed.
    """
    if isinstance(error, _ALWAYS):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, _WHEN_OURS) and _PACKAGE in Path(raised_in).resolve().parents


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int | None]:
    """Makes `main(argv)` the entry point of a console command: called without `argv` it takes `sys.argv[1:]`.

    A user's mistake (a `ConfigError` or other ValueError, NotImplementedError or ImportError that this package
    raised, or a path that is missing or not permitted) becomes `error: ...` on standard error and exit status 2;
    anything else keeps its traceback. Ctrl-C exits with 130; a closed pipe (`mlra-decode ... | head`) ends quietly.
    """

    @functools.wraps(main)
    def entry(argv: Sequence[str] | None = None) -> int | None:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            # The interpreter flushes standard output once more at exit, which would raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except Exception as error:
            if not is_users(error):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    return entry
