"""Fits a thinking format to a model's chat template, and checks that they fit, before weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.formats.chat_template import check_has_template
from rlmt.formats.thinking import ThinkingFormat


def resolve_format(format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase, source: str) -> ThinkingFormat:
    """Completes a format for a model.

    `think` sets the chat template's own switch to thoughts, and expects completions without an opening tag if the
    template writes it. `no_think` sets the switch to no thoughts, which in most templates writes a closed, empty
    thought into the prompt: the way in which such a model answers without one.

    Args:
        format: The format as configured.
        tokenizer: The policy's tokenizer.
        source: Its folder or Hub name, for messages.

    Returns:
        The format to use with this model, checked. It resolves to itself.

    Raises:
        UserError: As `check_format`.
    """
    if format.zero:
        return format
    _check_template(format, tokenizer, source)
    with _named(source):
        template = format.template(tokenizer).with_thinking_switch(format.thinks)
        prefill = format.prefill or (format.thinks and template.thought(format.probe) == "open")
    resolved = replace(format, prefill=prefill, chat_template_kwargs=template.arguments)
    check_format(resolved, tokenizer, source)
    return resolved


def check_format(format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Checks that a tokenizer can render and end a format as it is.

    Args:
        format: The format, for example one that was saved with the model.
        tokenizer: The policy's tokenizer.
        source: Its folder or Hub name, for messages.

    Raises:
        UserError: For a chat format: there is no chat template, it fails `ChatTemplate.check`, it refuses or omits the
            system turn of the format's instruction, or it starts answers with a thought unlike the format.
    """
    if format.zero:
        return
    _check_template(format, tokenizer, source)
    template, probe = format.template(tokenizer), format.probe
    with _named(source):
        thought, prompt = template.thought(probe), template.prompt(probe)
        template.check()
    if format.instruction is not None and format.instruction.strip() not in prompt:
        raise UserError(f"{source}: the chat template omits the system turn; leave out the format's instruction.")
    if thought == "open" and not format.prefill:
        fix = "set prefill to true" if format.thinks else "use format think, or a model whose template does not"
        raise UserError(f"{source}: the chat template opens a thought, unlike format {format.name}; {fix}.")
    if thought == "closed" and format.thinks:
        given = f" with chat_template_kwargs {format.chat_template_kwargs}" if format.chat_template_kwargs else ""
        raise UserError(
            f"{source}: the chat template{given} closes an empty thought, unlike format {format.name}; use no_think."
        )


def _check_template(format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Checks that there is a chat template, and the arguments for it."""
    fix = "use an instruct model, or format zero_think or zero_no_think for a base model"
    check_has_template(tokenizer, source, f"format {format.name} requires", fix)
    with _named(source):
        format.template(tokenizer).check_arguments()


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Puts the name of a model before the messages of UserErrors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
