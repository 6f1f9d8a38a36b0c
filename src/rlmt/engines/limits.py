"""Checks that every engine makes."""

from rlmt.errors import UserError


def room(prompt_tokens: int, max_model_len: int) -> int:
    """Tokens that fit behind a prompt.

    Raises:
        UserError: not one does.
    """
    if prompt_tokens >= max_model_len:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens leaves no room for a completion within {max_model_len} tokens: "
            "lower data.max_prompt_tokens or raise data.max_new_tokens"
        )
    return max_model_len - prompt_tokens
