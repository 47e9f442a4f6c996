"""Arguments as users write them (``2``, ``(2, 3)``, None) → arguments as the ops take them."""

from operator import index


def _is_int(value):
    return hasattr(value, "__index__") and not isinstance(value, bool)


def pair(name, value):
    """2 or (2, 3) → two ints; anything with ``__index__`` (NumPy's ints too) is an int."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    if _is_int(value):
        return (index(value),) * 2
    if isinstance(value, (tuple, list)) and all(map(_is_int, value)):
        if len(value) in (1, 2):
            return index(value[0]), index(value[-1])
        raise RuntimeError(f"conv_block: {name} must be an int or 2 ints, got {tuple(value)}")
    raise TypeError(f"conv_block: {name} must be an int or 2 ints, got {value!r}")


def conv_block_arguments(
    stride,
    padding,
    dilation,
    groups,
    activation,
    pool_size,
    pool_stride,
    pool_padding,
    ceil_mode,
):
    """The geometry arguments of ``torch.ops.fastcls.conv_block_*``, in their order.

    Raises:
        TypeError: an argument that is no int, pair of ints or bool where one must be.
        ValueError: an activation other than "relu" and None.
        RuntimeError: a tuple of the wrong length.
    """
    if activation not in ("relu", None):
        raise ValueError(f'conv_block: activation must be "relu" or None, got {activation!r}')
    if type(groups) is not int and not _is_int(groups):
        raise TypeError(f"conv_block: groups must be an int, got {groups!r}")
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"conv_block: ceil_mode must be a bool, got {ceil_mode!r}")
    pool = ((), (), ())
    if pool_size is not None:
        pool_size = pair("pool_size", pool_size)
        pool = (
            pool_size,
            pool_size if pool_stride is None else pair("pool_stride", pool_stride),
            pair("pool_padding", pool_padding),
        )
    return (
        pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
        index(groups),
        activation == "relu",
        *pool,
        ceil_mode,
    )
