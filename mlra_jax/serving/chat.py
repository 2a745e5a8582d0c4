"""Conversations as token ids, by the chat template beside a tokenizer's file; needs Jinja, but not transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.errors import UserError
from mlra_jax.serving.gate import Refused
from mlra_jax.serving.huggingface import chat_template

ChatEncoder = Callable[[Sequence[Any]], list[int]]


def chat_encoder(tokenizer: str) -> ChatEncoder | None:
    """What makes ids of messages, with the beginning of an answer; None: the tokenizer has no chat template.

    Unlike in other texts, what spells a special token is that token.

    Args:
      tokenizer: see `get_tokenizer`.

    Raises:
      UserError: Jinja is not installed, or the template is not one that it can read.
    """
    if (template := chat_template(tokenizer)) is None:
        return None
    try:
        import jinja2.sandbox
        import tokenizers
    except ImportError as error:
        raise UserError(f"The chat template of {tokenizer} needs Jinja: pip install jinja2.") from error

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    # As transformers does, by which templates are written.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = fail
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    try:
        compiled = environment.from_string(template)
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
        raise UserError(f"The chat template of {tokenizer} cannot be read: {error}.") from error
    ours, library = get_tokenizer(tokenizer), tokenizers.Tokenizer.from_file(tokenizer)
    library.no_truncation()
    library.no_padding()
    end_of_text = ours.decode([ours.eot_id])

    def encode(messages: Sequence[Any]) -> list[int]:
        try:
            text = compiled.render(
                messages=messages, add_generation_prompt=True, eos_token=end_of_text, pad_token=end_of_text
            )
        except Exception as error:  # templates may fail in any way
            raise Refused(f"The chat template refuses these messages: {error}", "messages") from error
        return library.encode(text, add_special_tokens=False).ids

    return encode
