"""Checks of arguments: one sentence of fact, one of remedy.

Only numbers of Python and NumPy are checked. Arrays of jax and tracers pass, so a schedule in
`optax.inject_hyperparams` costs nothing and no check waits for a device.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from sophia_optax._arrays import is_numpy

SMALLEST = float(jnp.finfo(jnp.float32).tiny)
"""What float32 holds: hardware takes smaller numbers for zero."""

SCHEDULED = "optax.inject_hyperparams(sophia_h)(..., {name}=schedule)"
"""How a hyperparameter of the optimizers takes a schedule."""


def check_number(
    name: str,
    value: Any,
    low: int | float,
    high: int | float,
    interval: str,
    scheduled: str = SCHEDULED,
) -> None:
    """Checks that a number lies in an interval.

    Args:
      name: the name of the argument.
      value: a number, or an array of jax, which passes, traced or not.
      low: the lower end.
      high: the upper end.
      interval: the interval as text, e.g. `"[0, 1)"`; a square bracket includes the end.
      scheduled: code that takes a schedule instead of the number, where `{name}` is its name.

    Raises:
      TypeError: if the value is callable, not a number at all, or an array that has axes or is of
        half precision.
      ValueError: if the number lies outside of the interval.
    """
    if callable(value):
        raise TypeError(
            f"{name} is a callable ({value!r}), but only learning_rate takes a schedule directly. "
            f"Wrap the optimizer: {scheduled.format(name=name)}."
        )
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        decay, eps = (float(jnp.asarray(x, dtype)) for x in (0.99, 1e-12))
        raise TypeError(
            f"{name} is an array of {dtype}, which holds 0.99 as {decay:.4g} and 1e-12 as "
            f"{eps:.4g}. Pass a Python number or an array of float32; under inject_hyperparams, "
            "whose arrays have the dtype of the params, that is "
            "optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)."
        )
    if getattr(value, "shape", ()):
        raise TypeError(
            f"{name} is an array of shape {value.shape}. Pass a number or a scalar array."
        )
    if isinstance(value, jax.Array):
        return
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}. Pass a number in {interval} or a scalar array.")
    number = float(value)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (math.isfinite(number) and above and below):
        raise ValueError(f"{name} is {value!r}. It must be a finite number in {interval}.")


def check_interval(name: str, value: Any, scheduled: str = SCHEDULED) -> None:
    """Checks that a number of steps is whole and at least one.

    Args:
      name: the name of the argument.
      value: a number, or an array of jax, which passes, traced or not.
      scheduled: as in `check_number`.

    Raises:
      TypeError: if the value is callable or not a number at all.
      ValueError: if the number is below one or has a fraction.
    """
    check_number(name, value, 1, math.inf, "[1, ∞)", scheduled)
    if not isinstance(value, jax.Array) and float(value) % 1:
        raise ValueError(f"{name} is {value!r}. It must be a whole number of at least 1.")


def static_count(name: str, value: Any, least: int = 1) -> int:
    """Checks a number that decides shapes, so that it has to be known when the step is traced.

    Args:
      name: the name of the argument.
      value: a number; a float that is whole, such as 8 / 2, is taken.
      least: the smallest number to take.

    Returns:
      The number as an integer.

    Raises:
      TypeError: if the value is not a number of Python or NumPy.
      ValueError: if the number is too small or has a fraction.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} is an array of jax, but it decides shapes when the step is traced. Pass a "
            f'number, and name it in static_args=("{name}",) of optax.inject_hyperparams, or in '
            "static_argnames of jax.jit."
        )
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}. Pass a whole number of at least {least}.")
    number = float(value)
    if not (math.isfinite(number) and number >= least and number % 1 == 0):
        raise ValueError(f"{name} is {value!r}. It must be a whole number of at least {least}.")
    return int(number)


def check_flag(name: str, value: Any) -> None:
    """Checks that a value is True or False: "False" is true.

    Args:
      name: the name of the argument.
      value: the argument.

    Raises:
      TypeError: if it is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}. Pass True or False.")


def check_seed(value: Any) -> None:
    """Checks that a number is a seed: `jax.random.key` takes 32 bits and drops the others.

    Args:
      value: a number, or an array of jax, which passes if it holds integers, traced or not.

    Raises:
      TypeError: if the value is not an integer.
      ValueError: if the number has more than 32 bits.
    """
    if getattr(value, "shape", ()):
        raise TypeError(f"seed is an array of shape {value.shape}. Pass an integer.")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
        return
    if isinstance(value, bool) or not (isinstance(value, numbers.Integral) or is_numpy(value)):
        raise TypeError(f"seed is {value!r}. Pass an integer.")
    if not -(2**31) <= int(value) < 2**32:
        raise ValueError(f"seed is {value!r}. It must be an integer in [-2³¹, 2³²).")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Checks that a value is one of several names.

    Args:
      name: the name of the argument.
      value: the argument.
      choices: the allowed values.

    Raises:
      ValueError: if the value is not one of them.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}. Choose one of {', '.join(map(repr, choices))}.")


def check_dtype(name: str, value: Any) -> None:
    """Checks that a dtype can hold a moving average.

    Args:
      name: the name of the argument.
      value: a dtype, or None, which passes.

    Raises:
      TypeError: if it is not real floating point, or an array instead of a dtype.
    """
    if isinstance(value, jax.Array) or is_numpy(value):
        raise TypeError(
            f"{name} is an array of {value.dtype} instead of a dtype: optax.inject_hyperparams "
            "calls what is callable, and jnp.float32 is. Pass jnp.dtype('float32'), or name "
            f"{name} in static_args."
        )
    if value is not None and not jnp.issubdtype(value, jnp.floating):
        raise TypeError(f"{name} is {value!r}. Pass a floating point dtype, or None.")
