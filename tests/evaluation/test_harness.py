"""lm-evaluation-harness through the adapter; skipped where it is not installed."""

import json
import re
import types

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

from mlra_jax.cli.evaluate import main
from mlra_jax.config import ConfigError, MeshConfig
from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.evaluation import harness
from mlra_jax.evaluation.scoring import Scorer
from mlra_jax.generation.generator import Generator

TASKS = ["mlra_choice", "mlra_rolling"]


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def adapter(evaluated, checkpoint):
    def make(*args):
        generator = lambda: Generator.from_checkpoint(checkpoint, mesh=MeshConfig(1, 1, 4, 1))
        return harness.HarnessModel(Scorer(evaluated(*args)), ByteTokenizer(), generator)

    return make


def requests(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def test_local_tasks_give_the_same_at_batch_1_and_64_on_one_device_and_eight(adapter):
    tasks = harness.load_tasks(TASKS)
    results = [
        harness.run_tasks(adapter(sizes, batch_size), tasks)
        for sizes, batch_size in (((1, 1, 1, 1), 1), ((1, 1, 1, 1), 64), ((2, 2, 2, 1), 1))
    ]
    assert results[0]["mlra_choice"].keys() >= {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}
    assert results[0]["mlra_rolling"].keys() >= {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for other in results[1:]:
        for task in TASKS:
            assert other[task] == pytest.approx(results[0][task], rel=1e-5)


class Merging(ByteTokenizer):
    """Bytes, but `ab`, `b` with a space before it, and what follows a `c` are one token each."""

    def encode(self, text):
        return [sum(part.encode()) % 256 for part in re.findall("ab| b|c.?|.", text, re.DOTALL)]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("x", "y", ("x", "y")),
        ("x ", "b", ("x", " b")),  # as the harness has it: the space belongs to what follows
        ("xa", "b", ("xa", "b")),  # `ab` is one token: there would be nothing to score
        ("xc", "yz", ("xc", "yz")),  # `cy` is one token: `y` would not be scored
        (" ", "b", ("", " b")),
        ("x", "", ("x", "")),
    ],
)
def test_a_continuation_is_scored_whole_though_a_token_joins_it_with_its_context(
    context, continuation, expected, adapter
):
    model = adapter()
    model._tokenizer = Merging()
    ids = model._encode_pair(context, continuation)
    before, after = map(Merging().encode, expected)
    assert ids == (before or [model.eot_token_id], after)
    assert bool(ids[1]) == bool(continuation)
    with pytest.raises(harness.TaskError, match="makes no tokens of the continuation 'y'"):
        model._loglikelihood_tokens([(("x", "y"), [1], [])])


def test_rolling_likelihood_is_that_of_all_bytes_after_an_end_of_text(adapter, evaluated):
    model = adapter()
    text = "Ein längerer Text, der nicht in ein Fenster passt. " * 4
    (total,) = model.loglikelihood_rolling(requests((text,)))
    ids = [256, *text.encode()]
    assert len(ids) > 2 * model.max_length
    pairs = [(ids[:1], ids[1:97]), (ids[96:97], ids[97:193]), (ids[len(ids) - 97 : 193], ids[193:])]
    expected = sum(s.log_likelihood for s in Scorer(evaluated()).score(pairs))
    assert total == pytest.approx(expected, rel=1e-5)


def test_generation_goes_through_the_decode_engine_and_ends_at_a_stop_string(adapter, checkpoint):
    model = adapter()
    free, stopped = {"until": [], "max_gen_toks": 12}, {"until": ["\n\n"], "max_new_tokens": 6}
    prompts = ["ROMEO:", "x" * 300, "To be"]
    texts = model.generate_until(requests((prompts[0], free), (prompts[1], stopped), (prompts[2], free)))
    generator = Generator.from_checkpoint(checkpoint)
    assert [texts[0], texts[2]] == generator.generate([prompts[0], prompts[2]], max_new_tokens=12)
    assert [texts[1]] == generator.generate([prompts[1][-90:]], max_new_tokens=6, stop=("\n\n",))


def test_generation_options_are_the_tasks():
    make = harness.generation_options
    assert (
        make({"until": "a", "do_sample": False, "temperature": 0.7, "top_p": 0.9}, 100, 4).sampling
        == harness.Sampling()
    )
    sampled = make({"until": ["a", ""], "do_sample": True, "temperature": 0.7, "top_k": 5}, 100, 4)
    assert (sampled.sampling, sampled.stop) == (harness.Sampling(0.7, 5), ("a",))
    assert (sampled.max_new_tokens, sampled.max_len, sampled.batch_size) == (50, 100, 4)
    sampled.validate()
    with pytest.raises(ConfigError, match="generates 100 tokens, which leaves no room for a prompt in 100"):
        make({"max_gen_toks": 100}, 100, 4)


def test_unknown_tasks_and_folders_are_named_with_what_is_like_them():
    with pytest.raises(harness.TaskError, match=r"knows no task arc_eazy; did you mean .*arc_easy"):
        harness.load_tasks(["mlra_choice", "arc_eazy"])
    with pytest.raises(harness.TaskError, match=r"There is no folder nowhere; --task-folder"):
        harness.load_tasks(["mlra_choice"], "nowhere")


def test_without_a_network_the_papers_tasks_say_what_they_lack(monkeypatch):
    asked = []

    def load(self, names):
        asked.extend(names)
        raise ConnectionError("Couldn't reach the Hub\nand so on")

    monkeypatch.setattr(harness.TaskManager, "load", load)
    words = r"data of arc_easy, .*piqa could not be loaded \(ConnectionError: Couldn't reach the Hub\)\. .*HF_HOME"
    with pytest.raises(harness.TaskError, match=words):
        harness.load_tasks(["paper"])
    assert asked == list(harness.PAPER_TASKS)


def test_the_papers_average_takes_its_metric_of_each_task():
    results = {task: {"acc": 0.1, "acc_norm": 0.8} for task in harness.PAPER_TASKS}
    assert harness.paper_average(results) == pytest.approx((5 * 80 + 2 * 10) / 7)
    del results["piqa"]
    assert harness.paper_average(results) is None


def test_the_command_runs_tasks_of_a_folder_and_writes_them(checkpoint, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text(json.dumps({"q": "A", "a": "B"}) + "\n")
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/own.jsonl\n  cache_dir: {tmp_path}/cache\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: q\ndoc_to_target: a\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    out = tmp_path / "results.json"
    options = ["--mesh.data", "2", "--task-folder", str(tmp_path), "--limit", "2", "--json", str(out)]
    assert main(["--checkpoint", checkpoint, "--tasks", "own,mlra_choice", *options]) == 0
    report = json.loads(out.read_text())
    assert "perplexity" not in report
    assert report["tasks"]["own"]["exact_match"] in (0, 1)
    assert report["tasks"]["mlra_choice"].keys() >= {"acc", "acc_norm"}
    assert "| mlra_choice | acc_norm" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(
            [
                "--checkpoint",
                checkpoint,
                "--tasks",
                "own",
                "--mesh.fsdp",
                "8",
                "--mesh.data",
                "1",
                *options[2:],
            ]
        )
    assert "decoding does not split parameters over fsdp" in capsys.readouterr().err
