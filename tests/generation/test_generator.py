"""Strings in, strings out: stop strings, streaming, overflow, batches."""

import dataclasses

import jax
import numpy as np
import pytest

from mlra_jax.config import ConfigError
from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.generation.engine import Rows
from mlra_jax.generation.generator import Completion, Delta, GenerationOptions, Generator, changed
from mlra_jax.generation.sampling import NotFiniteError, Sampling

PROMPTS = ["ROMEO:", "To be, or not to be,", "x", "€"]
SAMPLED = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def texts(generator):
    """Completions of `PROMPTS` of 24 tokens each."""
    return generator.complete(PROMPTS, max_new_tokens=24)


def streamed(events):
    """(text of each row put together from its pieces, completions, number of pieces)."""
    pieces, completions, count = {}, [], 0
    for event in events:
        if isinstance(event, Delta):
            key = event.prompt_index, event.sample
            pieces[key] = pieces.get(key, "") + event.text
            count += 1
        else:
            completions.append(event)
    return pieces, completions, count


def bare(completions):
    """Without the statistics."""
    return [dataclasses.replace(c, stats=None) for c in completions]


def test_streaming_gives_the_completions_of_the_compiled_loop(generator, texts):
    pieces, completions, count = streamed(generator.stream(PROMPTS, max_new_tokens=24))
    assert bare(completions) == bare(texts)
    assert pieces == {(c.prompt_index, c.sample): c.text for c in texts}
    assert count > 4 * 10


def test_tokens_decode_to_the_text_and_are_counted(generator, texts):
    for i, c in enumerate(texts):
        assert (c.prompt_index, c.sample, c.prompt, c.finish_reason) == (i, 0, PROMPTS[i], "length")
        assert len(c.tokens) == 24
        assert c.text == ByteTokenizer().decode(c.tokens)
        assert (c.prompt_tokens, c.prompt_tokens_dropped) == (len(PROMPTS[i].encode()), 0)
        assert c.stats.rows == 4
        assert c.stats.devices == 8
        assert c.stats.cache_bytes_per_device == 2 * 4 * (4 // 2) * (256 // 2) * (64 // 2 + 8)
        assert c.stats.seconds_to_first_token > 0
        assert c.stats.tokens_per_second > 0


@pytest.mark.parametrize("every_token", [True, False])
def test_a_stop_string_that_spans_tokens_cuts_the_text_before_it(generator, texts, every_token, monkeypatch):
    told = []
    stop_rows = Rows.stop
    monkeypatch.setattr(Rows, "stop", lambda self, rows: (told.append(rows), stop_rows(self, rows)))
    # Each token is a byte; three characters of the first row's text come in at least three tokens.
    stop = texts[0].text[6:9]
    assert texts[0].text.find(stop) == 6
    _, stopped, _ = streamed(
        generator.stream(PROMPTS, max_new_tokens=24, stop=(stop, "\0\0"), every_token=every_token)
    )
    assert [0] in told  # the device makes no more tokens for that row
    assert stopped[0].text == texts[0].text[:6]
    assert stopped[0].finish_reason == "stop"
    assert ByteTokenizer().decode(stopped[0].tokens) == texts[0].text[:9]
    assert bare(stopped)[1:] == [dataclasses.replace(c, stats=None) for c in texts[1:] if stop not in c.text]


def test_the_end_of_text_ends_a_completion_unless_ignored(generator, texts):
    tokenizer = ByteTokenizer()
    tokenizer.eot_id = texts[0].tokens[5]
    ending = Generator(generator.engine, tokenizer)
    (ended, *_) = ending.complete(PROMPTS, max_new_tokens=24)
    before = texts[0].tokens.index(tokenizer.eot_id)
    assert (ended.tokens, ended.finish_reason) == (texts[0].tokens[:before], "eos")
    (ignored, *_) = ending.complete(PROMPTS, max_new_tokens=24, ignore_eos=True)
    assert (ignored.tokens, ignored.finish_reason) == (texts[0].tokens, "length")


def test_prompts_may_be_token_ids_and_are_given_back(generator, texts):
    as_ids = [list(prompt.encode()) for prompt in PROMPTS]
    completions = generator.complete(np.asarray(as_ids[0]), max_new_tokens=24)
    assert (completions[0].tokens, completions[0].prompt_tokens) == (texts[0].tokens, 6)
    mixed = [as_ids[0], *PROMPTS[1:3], as_ids[3]]
    again = generator.complete(mixed, max_new_tokens=24)
    assert [c.tokens for c in again] == [c.tokens for c in texts]
    assert [c.prompt for c in again] == mixed
    assert generator.generate(as_ids[0], max_new_tokens=24) == texts[0].text
    with pytest.raises(ConfigError, match="Prompt 1 has the token id 257; ids are 0 to 256"):
        generator.stream([[0], [1, 257]])
    with pytest.raises(ConfigError, match="Prompt 0 has the token id -1"):
        generator.stream([-1])


def test_one_prompt_gives_a_string_and_several_a_list(generator, texts):
    assert generator.generate(PROMPTS[0], max_new_tokens=8) == ByteTokenizer().decode(texts[0].tokens[:8])
    options = GenerationOptions(max_new_tokens=24)
    assert generator.generate(PROMPTS, options) == [c.text for c in texts]
    with pytest.raises(ValueError, match="give it as a list"):
        generator.generate(PROMPTS[0], n=2, sampling=SAMPLED)


def test_batches_of_any_size_give_the_same_completions_and_compile_once(generator):
    options = GenerationOptions(max_new_tokens=5, max_len=64, sampling=Sampling(top_p=0.5))
    options = changed(options, temperature=1.0, top_p=1.0, n=2)  # as keywords of `complete` are
    assert options.sampling == SAMPLED
    prompts = [*PROMPTS, "a fifth prompt"]
    together = generator.complete(prompts, options, batch_size=100)
    compiled = set(generator.engine.programs)
    in_parts = generator.complete(prompts, options, batch_size=4)
    assert bare(in_parts) == bare(together)
    assert [(c.prompt_index, c.sample) for c in together] == [(i, s) for i in range(5) for s in range(2)]
    new = [key for key in generator.engine.programs if key not in compiled]
    shapes = [key[:2] for key in new if key[0] != "prefill"]  # prefill: one for each padded length
    assert len(set(shapes)) == len(shapes) <= 4  # create, begin, run, copy
    assert [c.stats.rows for c in in_parts] == [4] * 10


def test_each_prompt_may_have_its_own_options_and_equals_its_own_run(generator):
    own = [
        GenerationOptions(max_new_tokens=12, max_len=64),
        GenerationOptions(5, Sampling(0.8, top_k=40), seed=3, max_len=64),
        GenerationOptions(9, Sampling(1.2, top_p=0.9), seed=4, ignore_eos=True, max_len=64),
        GenerationOptions(12, Sampling(0.5, min_p=0.1), seed=4, stop=("e",), max_len=64),
    ]
    together = generator.complete(PROMPTS, own)
    alone = [generator.complete([prompt], one)[0] for prompt, one in zip(PROMPTS, own, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    compiled = len(generator.engine.programs)
    others = [changed(own[3], seed=9, stop=()), changed(own[2], top_p=0.3), changed(own[1], top_k=2), own[0]]
    again = generator.complete(PROMPTS, others)
    assert len(generator.engine.programs) == compiled
    assert again[0].tokens == generator.complete(PROMPTS[:1], others[0])[0].tokens
    lists = {"temperature": [0.0, 0.9, 0.9, 0.9], "seed": [0, 1, 1, 2], "max_new_tokens": [3, 4, 5, 6]}
    texts = generator.generate([PROMPTS[0]] * 4, max_len=64, **lists)
    assert texts[0] == generator.generate(PROMPTS[0], max_new_tokens=3, max_len=64)
    assert texts[2].startswith(texts[1])
    assert not texts[3].startswith(texts[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": [GenerationOptions()] * 3}, "options has 3 values for 2 prompt"),
        ({"temperature": [0.5]}, "temperature has 1 values for 2 prompt"),
        ({"sampling": [Sampling(-1.0), SAMPLED]}, "temperature=-1"),
        ({"max_len": [64, 128]}, r"max_len must be the same for all prompts, not \[64, 128\]"),
    ],
)
def test_options_that_cannot_be_given_by_prompt_are_refused(changes, words, generator):
    with pytest.raises(ConfigError, match=words):
        generator.stream(["a", "b"], **changes)


def test_an_empty_prompt_is_the_beginning_of_a_text_and_any_other_is_continued(generator, monkeypatch):
    continued = []

    class Recording(ByteTokenizer):
        def stream(self, after=None):
            continued.append(after)
            return super().stream(after)

    monkeypatch.setattr(generator, "tokenizer", Recording())
    (empty,) = generator.complete("", max_new_tokens=4)
    assert empty.prompt_tokens == 1
    assert len(empty.tokens) == 4
    generator.complete("ab", max_new_tokens=4)
    assert continued == [None, ord("b")]


def test_what_does_not_fit_is_refused_with_every_prompt_named(generator):
    with pytest.raises(ConfigError) as refused:
        generator.complete(["short", "x" * 60, "y" * 70], max_new_tokens=10, max_len=64)
    assert refused.value.faults == [
        "Prompt 1 has 60 tokens; with max_new_tokens=10 that is more than max_len=64; raise it, or cut with overflow "
        "truncate-left or shorten.",
        "Prompt 2 has 70 tokens; with max_new_tokens=10 that is more than max_len=64; raise it, or cut with overflow "
        "truncate-left or shorten.",
    ]


def test_overflow_truncate_left_is_the_prompt_without_its_beginning(generator):
    options = GenerationOptions(max_new_tokens=10, max_len=64)
    text = "".join(chr(97 + i % 26) for i in range(100))
    (cut,) = generator.complete(text, options, overflow="truncate-left")
    (short,) = generator.complete(text[-54:], options)
    assert cut.tokens == short.tokens
    assert (cut.prompt_tokens, cut.prompt_tokens_dropped, len(cut.tokens)) == (54, 46, 10)
    with pytest.raises(ConfigError, match="nothing of the prompt would be left"):
        generator.complete(text, options, max_new_tokens=64, overflow="truncate-left")


def test_overflow_shorten_ends_the_completion_at_the_end_of_the_cache(generator):
    options = GenerationOptions(max_new_tokens=10, max_len=64)
    text = "".join(chr(97 + i % 26) for i in range(54))
    (whole,) = generator.complete(text, options)
    (cut,) = generator.complete(text, options, max_new_tokens=1000, overflow="shorten")
    assert (cut.tokens, cut.finish_reason, cut.prompt_tokens_dropped) == (whole.tokens, "length", 0)
    with pytest.raises(ConfigError, match="nothing would be left to generate"):
        generator.complete("x" * 64, options, overflow="shorten")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"n": 2}, "greedy samples would all be the same"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"presence_penalty": 3.0}, "presence_penalty=3"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0"),
        ({"max_len": -1}, "max_len=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"stop": ("a", "")}, "stop string must not be empty"),
        ({"sampling": Sampling(-1.0)}, "temperature=-1"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"sampling": SAMPLED, "temperature": 0.0, "top_k": 3}, "no effect on greedy"),
    ],
)
def test_illegal_options_are_refused_before_anything_runs(changes, words, generator):
    with pytest.raises(ConfigError, match=words):
        generator.stream("a", **changes)  # not even asked for its first event


def test_an_option_that_is_none_is_named_with_those_there_are(generator):
    with pytest.raises(
        TypeError, match=r"no option temprature; there are: max_new_tokens, .*, temperature, "
    ):
        generator.stream("a", temprature=1.0)


@pytest.mark.parametrize(("every_token", "calls", "position"), [(True, 3, 4), (False, 1, 2)])
def test_logits_that_are_no_number_end_a_generation_with_the_prompt_and_the_position(
    every_token, calls, position, generator, monkeypatch
):
    name = "step" if every_token else "run"
    advance, made = getattr(Rows, name), []

    def poisoned(rows, *args):
        made.append(rows)
        if (
            len(made) == calls
        ):  # the cache of a row becomes NaN: prompts are dealt out over `data`, two rows each
            poison = lambda x: jax.device_put(
                np.asarray(x)
                * np.where(np.arange(len(x)) == 1, np.nan, 1)
                .reshape(-1, *[1] * (x.ndim - 1))
                .astype(x.dtype),
                x.sharding,
            )
            cache = rows.state.cache
            cache = dataclasses.replace(cache, layers=jax.tree.map(poison, cache.layers))
            rows.state = dataclasses.replace(rows.state, cache=cache)
        return advance(rows, *args)

    monkeypatch.setattr(Rows, name, poisoned)
    words = f"Prompt 2, sample 0: the logits for the token at position {position} are NaN or infinite"
    with pytest.raises(NotFiniteError, match=words):
        list(generator.stream(PROMPTS, max_new_tokens=24, every_token=every_token))
    assert (np.asarray(made[0].state.left_B) > 0).tolist() == [every_token, False, every_token, every_token]


def test_no_prompt_is_refused(generator):
    with pytest.raises(ConfigError, match="no prompt"):
        generator.generate([])


def test_completions_come_as_soon_as_they_and_all_earlier_ones_are_done(generator):
    events = generator.stream(PROMPTS, max_new_tokens=3, batch_size=2, max_len=64, every_token=False)
    kinds = [type(event) for event in events]
    first = kinds.index(Completion)
    assert kinds[first : first + 2] == [Completion] * 2
    assert Delta in kinds[first + 2 :]
