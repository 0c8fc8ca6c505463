"""Changes of JSON that somebody could make: another kind, a huge number, deep nesting, a lost key."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

HUGE = [2**31, 2**32 - 1, 2**63, 2**64, 10**10, 10**19, 10**400, -1, -(2**63), 1e10, 1e300, float("inf"), float("nan")]
numbers = st.one_of(st.sampled_from(HUGE), st.integers(), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
NESTED = "[" * 100_000
DIGITS = "9" * 5_000  # Python refuses to read such a number


def replaced(draw: st.DataObject, content: Any) -> Any:
    """Returns JSON in which one value, at any depth, is another one or absent."""
    choices: list[Any] = list(content) if isinstance(content, dict) else list(range(len(content)))
    place = draw.draw(st.sampled_from(choices))
    copy = content.copy()
    if isinstance(content[place], dict | list) and content[place] and draw.draw(st.booleans()):
        copy[place] = replaced(draw, content[place])
    elif isinstance(copy, dict) and draw.draw(st.booleans()):
        del copy[place]
    else:
        copy[place] = draw.draw(values)
    return copy
