"""What the fuzz tests share: how many draws there are, and tensors that lie anyhow in memory."""

import os

import torch
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st

LONG = int(os.environ.get("FASTCLS_FUZZ_DRAWS", 0))


def draws(count):
    """Settings of a fuzz test: ``count`` draws, always the same; or FASTCLS_FUZZ_DRAWS new ones."""
    return settings(
        max_examples=LONG or count,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def one_in(draw, n):
    """True in about one draw of ``n``; shrinks to False."""
    return draw(st.integers(0, n - 1)) == n - 1


def one_of(draw, *values):
    """One of the values; shrinks to the first."""
    return draw(st.sampled_from(values))


def generator(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**20)))


def laid_out(draw, t):
    """``t`` somewhere in memory: (tensor, its whole storage as bytes).

    Any order of dimensions, steps between elements, gaps between rows, an offset; NaN all around,
    or the greatest integer. Dimensions may be repeated by a stride of 0: then only the first
    element along them is taken over.
    """
    kind = one_of(draw, "contiguous", "anyhow", "channels_last", "anyhow")
    order, step, gap, offset, repeated = list(range(t.dim())), 1, 0, 0, ()
    if kind == "channels_last" and t.dim() > 2:
        order = [0, *range(2, t.dim()), 1]
    if kind == "anyhow":
        order = draw(st.permutations(order))
        step, gap, offset = (draw(st.integers(least, least + 2)) for least in (1, 0, 0))
        if t.dim() and one_in(draw, 4):
            repeated = draw(st.sets(st.sampled_from(order), min_size=1))
    for d in repeated:
        t = t.narrow(d, 0, min(1, t.shape[d])).expand(t.shape)
    strides, reach = [0] * t.dim(), step
    for d in reversed(order):
        if d not in repeated:
            strides[d] = reach
            reach = reach * max(t.shape[d], 1) + gap
    around = torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max
    memory = torch.full((offset + reach + 1,), around, dtype=t.dtype, device=t.device)
    view = memory.as_strided(t.shape, strides, offset)
    first = t[tuple(slice(0, 1) if d in repeated else slice(None) for d in range(t.dim()))]
    memory.as_strided(first.shape, strides, offset).copy_(first)
    return view


def memory_of(*tensors):
    """The bytes of the tensors' storages, what lies around them included."""
    return [
        None if t is None else torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()
        for t in tensors
    ]


def same_memory(before, after):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(before, after, strict=True))


def outcome(function, *args, **kwargs):
    """(result, None), or (None, the kind of error).

    NotImplementedError is the RuntimeError with which PyTorch refuses some dtypes.
    """
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        kind = RuntimeError if isinstance(error, RuntimeError) else type(error)
        event(f"error: {kind.__name__}")
        return None, (kind, str(error))
