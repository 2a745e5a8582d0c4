"""How commands end: a mistake or a full disk with a sentence, a bug with its traceback, Ctrl-C with status 130."""

import ast
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlra_jax.cli import command, evaluate, plot, prepare
from mlra_jax.config import ConfigError
from mlra_jax.errors import UserError, explain, naming
from mlra_jax.storage import exclusive, whole_folder, write_whole
from mlra_jax.training.loop import DivergedError
from mlra_jax.training.metrics import TensorBoard


def full(errno_=errno.ENOSPC, *path):
    return OSError(errno_, os.strerror(errno_), *path)


def raising(error):
    @command
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError(["It is wrong."]), "It is wrong."),
        (DivergedError("Step 3 diverged."), "Step 3 diverged."),
        (FileNotFoundError("No metrics in runs/x."), "No metrics in runs/x."),
        (full(errno.ENOENT, "x.bin"), "x.bin: No such file or directory; check the path."),
        (full(errno.ENOSPC, "out"), "out: No space left on device; make room there, or name another place."),
        (full(errno.ELOOP, "a", None, "b"), "a -> b: Too many levels of symbolic links; check the path, and"),
        (full(errno.EROFS, b"/ro"), "/ro: Read-only file system; name another place."),
    ],
)
def test_what_is_no_bug_is_one_line_on_stderr_and_status_2(capsys, error, expected):
    with pytest.raises(SystemExit) as caught:
        raising(error)([])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith(f"error: {expected}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "bug",
    [
        lambda argv: evaluate.padded(("a",), [("b", "c")]),  # a ValueError of zip, raised in this package
        lambda argv: Path(evaluate.__file__ + ".absent").read_text(),  # a file that the package should have
        lambda argv: {}["absent"],
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises((ValueError, OSError, KeyError)):
        command(bug)([])


@pytest.mark.parametrize("place", ["cli", "convert", "data/tokenizers.py", "hardware.py", "topologies.py"])
def test_what_users_give_is_refused_with_a_class_of_its_own(repository, place):
    path = repository / "mlra_jax" / place
    bare = {"ValueError", "ImportError", "NotImplementedError", "RuntimeError", "TypeError", "KeyError"}
    found = []
    for file in [path] if path.is_file() else sorted(path.glob("*.py")):
        tree = ast.parse(file.read_text())
        # What a `try` around it turns into another error is seen by no user.
        caught = {n for t in ast.walk(tree) if isinstance(t, ast.Try) for s in t.body for n in ast.walk(s)}
        found += [
            f"{file.name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node not in caught
            if isinstance(node.exc.func, ast.Name) and node.exc.func.id in bare
        ]
    assert not found, "raise UserError, or a class derived from it: only these are shown without a traceback"


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that says only when it is to be flushed, and without a name, that it is full."""

    def fsync(descriptor):
        raise full()

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_one_sentence_with_the_path_and_leaves_nothing_half_written(
    full_disk, tmp_path, capsys
):
    (tmp_path / "text.txt").write_text("To be, or not to be.")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    (tmp_path / "old.png").write_bytes(b"old")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for main, argv, out in [
        (prepare.main, ["text.txt", "--val-fraction", "0"], "shards"),
        (plot.main, ["metrics.jsonl"], "old.png"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / argv[0]), *argv[1:], "--out", str(tmp_path / out)])
        assert ended.value.code == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"error: {tmp_path / out}")
        assert last.endswith(": No space left on device; make room there, or name another place.")
    with pytest.raises(OSError, match=r"No space left on device: 'results\.json'"):
        write_whole("results.json", "{}")
    with pytest.raises(OSError, match=r"No space left on device: '.*events'"):
        TensorBoard(tmp_path / "events", 0)
    os.unlink(next((tmp_path / "events").iterdir()))
    (tmp_path / "events").rmdir()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_figure_in_an_unknown_format_is_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--out", str(tmp_path / "losses.doc")])
    assert "losses.doc must be a file that ends in ." in capsys.readouterr().err


def test_a_name_that_an_error_has_is_kept():
    with pytest.raises(OSError, match="'its own'"), naming("another"):
        raise full(errno.EIO, "its own")


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    """Nor does the second one remove what the first one has written so far."""
    out = tmp_path / "out"
    with whole_folder(out) as partial:
        (partial / "file").touch()
        with pytest.raises(UserError, match=r"out is being made by another process"), whole_folder(out):
            pass
        assert (partial / "file").exists()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/file"]


def test_a_lock_dies_with_its_process(tmp_path):
    code = f"""
import os, signal
from mlra_jax.storage import exclusive
with exclusive({str(tmp_path / "lock")!r}, "It is used"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock", "It is used"):
        pass
    assert not (tmp_path / "lock").exists()


# Streams and signals, as a process of its own -------------------------------------------------------------------------


def heed_interrupts():
    """In a new process: what the shell of a background job, which the tests may be run in, has switched off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(body, encoding="", **options):
    """Runs a command with the body `body`, a line of Python."""
    code = f"import os, signal, sys, time\nfrom mlra_jax.cli import command\n@command\ndef main(argv):\n {body}\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONUNBUFFERED": "", "PYTHONIOENCODING": encoding},
        **options,
    )


def test_what_the_terminal_cannot_encode_is_shown_with_backslashes():
    body = r"print('ü \u2192 \udcff'); print('finished')"
    ended = run_command(body, encoding="ascii", stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "\\xfc \\u2192 \\udcff\nfinished\n"


@pytest.mark.parametrize("body", ["print('text')", "print('text', flush=True)", "sys.exit(print('help'))"])
def test_a_standard_output_that_is_full_or_closed_is_no_traceback(body):
    with open("/dev/full", "w") as device:
        ended = run_command(body, stdout=device)
    assert ended.returncode == 2
    sentence = explain(full(errno.ENOSPC, "standard output"))
    assert ended.stderr == f"error: {sentence}\n"
    reader, writer = os.pipe()
    os.close(reader)
    ended = run_command(body, stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    "body",
    [
        INTERRUPT,
        # A library that makes something else of it; what the interpreter would do at its exit is left out.
        f"import atexit; atexit.register(print, 'shuts down')\n try:\n  {INTERRUPT}\n except BaseException:\n  0 / 0",
        # Where Python can only ignore it, as it does in callbacks.
        f"class A:\n  def __del__(self): {INTERRUPT}\n A()\n time.sleep(30)",
    ],
)
def test_ctrl_c_ends_the_process_at_once_with_130_and_without_a_traceback(body):
    ended = run_command(body, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_while_libraries_are_loaded_ends_alike(repository):
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            {INTERRUPT}
sys.meta_path.insert(0, Interrupting())
sys.argv = ["decode.py", "--help"]
exec(open("decode.py").read())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=repository,
        preexec_fn=heed_interrupts,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_from_python_ctrl_c_ends_only_the_command():
    with pytest.raises(SystemExit) as caught:
        raising(KeyboardInterrupt())([])
    assert caught.value.code == 130


def test_command_takes_the_process_arguments_when_given_none(monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["prog", "a", "b"])
    monkeypatch.setattr("mlra_jax.cli._prepare_process", lambda: None)  # this process is the tests'
    command(seen.append)()
    assert seen == [["a", "b"]]
