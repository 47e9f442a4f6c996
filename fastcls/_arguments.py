"""Arguments as users write them (``2``, ``(2, 3)``, None) → arguments as the ops take them."""


def _pair(name, value):
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        if len(value) == 1:
            return (value[0], value[0])
        if len(value) == 2:
            return tuple(value)
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
        TypeError: an argument that is no int or pair of ints.
        ValueError: an activation other than "relu" and None.
        RuntimeError: a tuple of the wrong length.
    """
    if activation not in ("relu", None):
        raise ValueError(f'conv_block: activation must be "relu" or None, got {activation!r}')
    if not isinstance(groups, int):
        raise TypeError(f"conv_block: groups must be an int, got {groups!r}")
    pool = ((), (), ())
    if pool_size is not None:
        pool_size = _pair("pool_size", pool_size)
        pool = (
            pool_size,
            pool_size if pool_stride is None else _pair("pool_stride", pool_stride),
            _pair("pool_padding", pool_padding),
        )
    return (
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        groups,
        activation == "relu",
        *pool,
        bool(ceil_mode),
    )
