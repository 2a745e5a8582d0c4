"""`decode.py` and `mlra-decode`: prompts in, text or JSON lines out, mistakes in one sentence."""

import io
import json
import re
import socket
import subprocess
import sys

import jax
import pytest

from mlra_jax.cli import decode
from mlra_jax.config import ConfigError
from mlra_jax.generation import generator as generator_module
from mlra_jax.generation import load
from mlra_jax.generation.sampling import Sampling
from mlra_jax.textfiles import TextError

PROMPTS = ["ROMEO:", "To be, or not to be,"]


@pytest.fixture
def stand_in(generator, monkeypatch):
    """The generator of the session instead of one from the checkpoint; records how it was asked for."""
    asked = {}

    def from_checkpoint(checkpoint, **kwargs):
        asked.update(kwargs, checkpoint=checkpoint)
        return generator

    monkeypatch.setattr(decode.Generator, "from_checkpoint", from_checkpoint)
    return asked


def run(*argv):
    assert decode.main([str(a) for a in argv]) == 0


def test_json_lines_hold_text_tokens_speed_and_cache(checkpoint, stand_in, generator, capsys):
    sampling = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01", "--seed", "4"]
    prompts = [arg for prompt in PROMPTS for arg in ("--prompt", prompt)]
    options = ["--n", "2", "--max-new-tokens", "6", "--max-len", "64", "--json", *sampling]
    run("--checkpoint", checkpoint, "--mesh.tensor", "4", "--split-heads", "no", *prompts, *options)
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [(r["prompt_index"], r["sample"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = generator.complete(
        PROMPTS, n=2, max_new_tokens=6, max_len=64, sampling=Sampling(0.9, 50, 0.95, 0.01), seed=4
    )
    for record, completion in zip(records, expected, strict=True):
        assert record["prompt"] == completion.prompt
        assert record["text"] == completion.text
        assert record["tokens"] == completion.tokens
        assert record["finish_reason"] == "length"
        assert record["cache_bytes_per_device"] == completion.stats.cache_bytes_per_device
        assert record["seconds_to_first_token"] > 0
        assert record["tokens_per_second"] > 0
    assert stand_in["mesh"].tensor == 4
    assert stand_in["split_heads"] == "no"
    assert re.search(
        r"4 completion\(s\), 24 tokens: the first after .* tokens/s .* 4 row\(s\), 100% .* KV cache",
        captured.err,
    )
    assert "note: texts of up to 26 tokens; the model was trained on 16." in captured.err
    assert re.search(r"\nBack ends: .*latent_decode_attention xla", captured.err)


def test_prompts_come_from_arguments_files_and_standard_input(
    checkpoint, stand_in, generator, capsys, monkeypatch
):
    typed = io.BytesIO(f"{PROMPTS[1]}\r\n\r\n".encode("utf-8-sig"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="ascii"))  # whatever the terminal's is
    options = ["--max-new-tokens", "5", "--max-len", "64"]
    run("--checkpoint", checkpoint, "--prompt", PROMPTS[0], "--prompts-file", "-", *options)
    texts = generator.generate(PROMPTS, max_new_tokens=5, max_len=64)
    assert capsys.readouterr().out == "".join(
        f"=== prompt {i}, sample 0\n{prompt}{text}\n"
        for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    )


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_single_text_is_printed_after_its_prompt(checkpoint, stand_in, generator, capsys, stream):
    options = ["--max-new-tokens", "5", "--max-len", "64", stream]
    run("--checkpoint", checkpoint, "--prompt", PROMPTS[0], *options)
    text = generator.generate(PROMPTS[0], max_new_tokens=5, max_len=64)
    assert capsys.readouterr().out == f"{PROMPTS[0]}{text}\n"


def test_prompts_file_has_one_prompt_a_line_or_json_lines(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes("first\r\n\n  second €\n".encode("utf-8-sig"))
    read = lambda file: [prompt for prompt, _ in decode.read_prompts(str(file))]
    assert read(text) == ["first", "  second €"]
    records = ['"two\\nlines"', '{"prompt": "object", "id": 3}', "[1, 2]", '{"prompt": [3]}']
    lines.write_bytes("\r\n".join(records).encode("utf-8-sig"))
    assert read(lines) == ["two\nlines", "object", [1, 2], [3]]
    for wrong in ("[1.5]", "[true]", "3", '{"prompt": {}}', "null"):
        lines.write_text(f'"fine"\n{wrong}\n')
        with pytest.raises(ConfigError, match="line 2 is neither a string nor a list of token ids"):
            decode.read_prompts(str(lines))
    lines.write_text('"fine"\n\n{\n')
    with pytest.raises(ConfigError, match="line 3 is not JSON"):
        decode.read_prompts(str(lines))
    text.write_bytes(b"ab\xff")
    with pytest.raises(TextError, match=r"prompts.txt, line 1, byte 3 is not UTF-8 text"):
        decode.read_prompts(str(text))


def test_lines_of_a_prompts_file_may_change_options(checkpoint, stand_in, generator, capsys, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    changes = {"temperature": 0.9, "seed": 2, "max_new_tokens": 3, "stop": ["\0"]}
    records = [PROMPTS[0], {"prompt": PROMPTS[1], "generation": changes}]
    lines.write_text("\n".join(map(json.dumps, records)))
    run(
        "--checkpoint",
        checkpoint,
        "--prompts-file",
        lines,
        "--max-new-tokens",
        "5",
        "--max-len",
        "64",
        "--json",
    )
    shown = [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()]
    options = generator_module.GenerationOptions(5, max_len=64)
    own = [options, generator_module.changed(options, **changes | {"stop": ("\0",)})]
    assert shown == [c.tokens for c in generator.complete(PROMPTS, own)]
    assert [len(tokens) for tokens in shown] == [5, 3]
    lines.write_text(json.dumps({"prompt": "a", "generation": {"temprature": 1}}))
    with pytest.raises(ConfigError, match=r"prompts.jsonl, line 1: Generation has no option temprature"):
        decode.read_prompts(str(lines))
    lines.write_text(json.dumps({"prompt": "a", "generation": {"sampling": {"top_k": 1}}}))
    with pytest.raises(ConfigError, match=r"line 1: sampling={'top_k': 1} must be a Sampling, not dict"):
        decode.read_prompts(str(lines))


def test_a_closed_standard_input_is_refused(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after `<&-`
    with pytest.raises(SystemExit, match="2"):
        decode.main(["--checkpoint", checkpoint, "--prompts-file", "-"])
    assert "reads standard input, which fails: it is closed; name a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "There is no prompt"),
        (["--prompt", "a", "--top-k", "3"], "no effect on greedy"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--prompts-file", "absent.txt"], "absent.txt"),
        (["--prompt", "a", "--mesh.tensor", "16"], "needs 16 devices; JAX sees 8"),
        (["--prompt", "a", "--mesh.tensor", "3"], "cannot be laid out on mesh axis"),
        (["--prompt", "a", "--step", "99"], "No checkpoint of step 99"),
        (["--prompt", "abc", "--max-len", "64", "--max-new-tokens", "62"], "Prompt 0 has 3 tokens"),
        (["--prompt", "a", "--tokenizer", "nonsense"], "Unknown tokenizer 'nonsense'"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_read(argv, words, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_params", lambda *_: pytest.fail("read parameters"))
    with pytest.raises(SystemExit) as stop:
        decode.main(["--checkpoint", checkpoint, *argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        decode.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--checkpoint",
        "--mesh.tensor",
        "--max-new-tokens",
        "--temperature",
        "--min-p",
        "--stop",
        "--json",
    ):
        assert option in shown


@pytest.fixture
def start_decode(repository, environment, checkpoint):
    """`start_decode(*options, devices=n)`: `python decode.py` on the checkpoint in a new process."""

    def start(*argv, devices):
        return subprocess.Popen(
            [sys.executable, "decode.py", "--checkpoint", checkpoint, *argv],
            cwd=repository,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    # Gloo's threads tell who is connected, and may write into each other's lines, which leaves empty ones.
    of_gloo = lambda line: "[Gloo]" in line or "peer ranks" in line or line == "\n"
    return "".join(line for line in out.splitlines(keepends=True) if not of_gloo(line))


@pytest.mark.smoke
def test_the_command_prints_the_text_of_a_checkpoint_on_four_devices(start_decode, generator):
    argv = ["--prompt", PROMPTS[0], "--max-new-tokens", "12", "--mesh.tensor", "4", "--stop", "\n\n"]
    out = finish(start_decode(*argv, devices=4))
    text = generator.generate(PROMPTS[0], max_new_tokens=12, stop=("\n\n",))
    assert out == f"{PROMPTS[0]}{text}\n"


def test_two_processes_decode_as_one_and_the_first_prints(start_decode, generator):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    prompts = [*PROMPTS, PROMPTS[1] + " that"]  # more than rows
    argv = ["--mesh.data", "2", "--mesh.tensor", "2", "--json", "--max-new-tokens", "12", "--batch-size", "2"]
    argv += [arg for prompt in prompts for arg in ("--prompt", prompt)]
    argv += ["--distributed.coordinator", f"localhost:{port}", "--distributed.processes", "2"]
    processes = [start_decode(*argv, "--distributed.process_id", str(i), devices=2) for i in range(2)]
    try:
        first, second = map(finish, processes)
    finally:
        for process in processes:
            process.kill()
    assert second == ""
    records = [json.loads(line) for line in first.splitlines()]
    assert [r["text"] for r in records] == generator.generate(prompts, max_new_tokens=12)
    assert {(r["devices"], r["rows"]) for r in records} == {(4, 2)}


def test_standard_input_is_refused_with_several_processes(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(decode, "initialize", lambda config: None)
    with pytest.raises(SystemExit):
        decode.main(["--checkpoint", checkpoint, "--prompts-file", "-"])
    assert "reaches only one of several processes" in capsys.readouterr().err
