"""Plants one mistake in our code, in memory, and takes it out again."""

import contextlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from parity_tests import rungs, sides


@dataclass(frozen=True)
class Mutant:
    """A mistake: text of one function replaced, and the rung that must notice it."""

    name: str
    target: str
    """module:function or module:Class.method, below jaxllm."""
    old: str
    """Text that occurs once in its source."""
    new: str
    rung: str
    precision: str = "fp64"


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Replaces the function wherever our modules hold it; undoes it at the end."""
    module_name, _, path = mutant.target.partition(":")
    module = importlib.import_module(f"jaxllm.{module_name}")
    *parents, name = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent)
    original = owner.__dict__[name]
    changed = _changed(mutant, original, module)
    holders = [(owner, name)]
    if not parents:
        # `from x import f` leaves further references, in our tests too.
        holders += [
            (other, key)
            for other_name, other in list(sys.modules.items())
            if other_name.startswith(("jaxllm", "parity_tests"))
            for key, value in list(vars(other).items())
            if value is original and (other, key) != (owner, name)
        ]
    _forget(module_name)
    try:
        for holder, key in holders:
            setattr(holder, key, changed)
        yield
    finally:
        for holder, key in holders:
            setattr(holder, key, original)
        _forget(module_name)


def _changed(mutant: Mutant, original: Any, module: Any) -> Callable:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
    count = source.count(mutant.old)
    assert count == 1, (
        f"mutant {mutant.name!r}: its text occurs {count} times in {mutant.target}; "
        f"the code has changed, so write the mistake anew"
    )
    code = compile(source.replace(mutant.old, mutant.new), mutant.target, "exec")
    space = dict(vars(module))
    exec(code, space)
    return space[original.__name__]


def _forget(module_name: str) -> None:
    sides.forget()
    rungs.steps_of.cache_clear()
    rungs.long_of.cache_clear()
    if module_name.startswith("kernels"):
        # Functions with a gradient of their own: JAX may keep their traces.
        jax.clear_caches()
