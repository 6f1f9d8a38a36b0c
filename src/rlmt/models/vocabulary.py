"""Check that a model has an embedding row for every token that its tokenizer can produce."""

from __future__ import annotations

from rlmt.annotations import PretrainedConfig, PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.formats.chat_template import ChatTemplate
from rlmt.formats.tokenizer import control_strings
from rlmt.types import Message

_TAGS = ("<think>", "</think>", "<response>", "</response>")
_CONVERSATION = [
    Message(role="user", content="a"),
    Message(role="assistant", content="b"),
    Message(role="user", content="c"),
]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, source: str) -> None:
    """Checks that every token that can occur in a text has a row in the model's embedding.

    A model with more rows than tokens is fine. So is a special token without a row that neither the chat template nor
    the tokenizer writes, because texts never contain it: typed, it is encoded as plain characters or removed. Gemma 3
    1B has such a token, for images.

    Args:
        tokenizer: Tokenizer of the model.
        config: Config of the model.
        source: Folder or hub name for the message.

    Raises:
        UserError: A token has no row, and the forward pass would fail on it.
    """
    rows = config.get_text_config().vocab_size
    beyond = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}
    if not beyond:
        return
    missing = sorted(beyond.keys() - (set(control_strings(tokenizer, _TAGS).values()) - _written(tokenizer)))
    if missing:
        others = f" (nor for {len(missing) - 1:,} other tokens)" if len(missing) > 1 else ""
        raise UserError(
            f"{source}: the tokenizer's token {beyond[missing[0]]!r} has id {missing[0]:,}, but the model has {rows:,} "
            f"embedding rows and none for it{others}; resize the embeddings to the tokenizer and save the model again, "
            "or use the model's own tokenizer."
        )


def _written(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that the tokenizer or its chat template adds to texts."""
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    written = {token_id for token_id in roles if isinstance(token_id, int)}
    if isinstance(tokenizer.chat_template, str):
        written.update(tokenizer(ChatTemplate(tokenizer).prompt(_CONVERSATION), add_special_tokens=False)["input_ids"])
    return written
