"""What one attempt at a mechanism may come to, beside that the mechanism holds."""


class NotTried(Exception):
    """The machine has not what the attempt needs; says what. That is no fault of the guard's."""


class Broken(Exception):
    """The mechanism does not do what it promises; says what it did."""


def expect(held: bool, otherwise: str) -> None:
    """Go on if something held.

    Args:
        held: Whether it did.
        otherwise: What is wrong where it did not.

    Raises:
        Broken: It did not; with ``otherwise`` as its words.
    """
    if not held:
        raise Broken(otherwise)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message that says something."""
    return next(filter(None, map(str.strip, str(error).splitlines())), "no message")
