"""What a person reads when something can't be done: what happened, with the numbers, and what to change.

Every such message is a function in this package, which takes the numbers. Whoever finds the problem raises what the
function returns, or hands its words on. `tests/unit/test_errors.py` calls each of them; `docs/troubleshooting.md` has
an entry for each. SGLang's own messages, which clients may match on, are in `sglang_words.py`, unchanged.
"""


class UserError(ValueError):
    """A message for people. `status`: the HTTP status where it is the answer to a request."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
