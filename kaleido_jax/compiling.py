"""How programs are compiled: `jit` with the options of this process's backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

# On a CPU, XLA hands matrix products, sums and convolutions to YNNPACK. Its convolutions with few
# channels take about twice the time of XLA's own, so they are left to XLA: the NestedUNet of 18.8
# million parameters of docs/scaling.md went from 1.33 to 1.02 s a step on two cores.
_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


@functools.cache
def options() -> dict[str, str] | None:
    """Compiler options for the default backend; None where there are none.

    They are an argument of each program, not a flag of the process: the command line and the
    library draw the same picture.
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda x: x + 1, compiler_options=_CPU)(0)
    except jax.errors.JaxRuntimeError:  # a jaxlib that does not know them
        return None
    return _CPU


def jit(function: Callable, **arguments: Any) -> Program:
    """`jax.jit` with `options`; the backend is not asked before the first call.

    Args:
      function: what to compile.
      arguments: as `jax.jit`.
    """
    return Program(function, arguments)


class Program:
    """A function that is compiled at its first call, and inlined in another that is traced."""

    def __init__(self, function: Callable, arguments: Mapping[str, Any]):
        functools.update_wrapper(self, function)
        self._arguments = arguments

    @functools.cached_property
    def jitted(self) -> Any:
        """What `jax.jit` gives."""
        return jax.jit(self.__wrapped__, compiler_options=options(), **self._arguments)

    @functools.cached_property
    def plain(self) -> Any:
        """The same without `options`."""
        return jax.jit(self.__wrapped__, **self._arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # jax takes options at the top level alone.
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return self.__wrapped__(*args, **kwargs)
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lowers for arguments or their shapes."""
        return self.jitted.lower(*args, **kwargs)
