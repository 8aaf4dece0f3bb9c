"""What checks the shapes and types that functions state (conftest.py)."""

from beartype import beartype


def checked(function):
    """The function with its arguments and result checked at each call; a constructor as it is, for JAX makes the
    dataclasses of whatever stands for arrays: shardings, shapes, arrays stacked over a loop."""
    return function if function.__name__ == "__init__" else beartype(function)
