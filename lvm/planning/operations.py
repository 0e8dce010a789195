"""FLOPs of any step: its matrix products and convolutions, counted in the traced program."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of the products of a function of arrays or shapes; a multiply-add is two.

    A scan counts as often as it runs, branches as their most expensive one. Padding of convolutions counts.

    Raises:
      ValueError: products in a `while`, which may run any number of times.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    operands: list[Any] = [variable.aval for variable in equation.invars]
    out: Any = equation.outvars[0].aval if equation.outvars else None
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        return 2 * out.size * math.prod(operands[0].shape[axis] for axis in contracting)
    if name == "conv_general_dilated":
        kernel = operands[1]
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        flops = 2 * out.size * (kernel.size // outputs)
        return flops // math.prod(params["lhs_dilation"])  # zeros between the rows of a strided one's gradient
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = sum(_count(jaxpr) for value in params.values() for jaxpr in _jaxprs(value))
    if name == "while" and inner:
        raise ValueError("products in a while loop have no number; a scan, or a fori_loop of constant bounds, has one")
    return inner * params["length"] if name == "scan" else inner


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """The programs in a parameter of an operation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [jaxpr for each in value for jaxpr in _jaxprs(each)] if isinstance(value, tuple | list) else []
