"""Edits of torch.fx graphs: the functions of a chain out, a fused one in."""

import operator

from torch import fx

from fastcls import functional
from fastcls.fusing import choice
from fastcls.fusing.chains import Chain, Link
from fastcls.fusing.steps import input_of, read


def drop(link: Link) -> None:
    """Let the step's users have its input."""
    _put(link, input_of(link.node))


def pool_arguments(chain: Chain) -> dict:
    """The chain's max-pool in the names of ``conv_block``."""
    pool = chain.link("max_pool")
    if pool is None:
        return {"pool_size": None}
    given = pool.step.arguments
    return {
        "pool_size": given["kernel_size"],
        "pool_stride": given["stride"] or None,
        "pool_padding": given["padding"],
        "ceil_mode": given["ceil_mode"],
    }


def activation(chain: Chain) -> str | None:
    return None if chain.link("relu") is None else "relu"


def replace_conv(chain: Chain, conv_block) -> None:
    """Call ``conv_block`` in the place of conv2d; the steps after it are dropped elsewhere."""
    head, graph = chain.head, chain.head.traced.graph
    given = read(head.node, head.traced.owner).arguments
    weight, bias, *geometry = given.values()
    with graph.inserting_before(head.node):
        batch_norm = chain.link("batch_norm")
        if batch_norm is not None:
            names = ("running_mean", "running_var", "weight", "bias", "eps")
            parts = [_at_hand(graph, batch_norm.step.arguments[name]) for name in names]
            folded = graph.call_function(choice.fold_batch_norm, (weight, bias, *parts))
            weight, bias = (graph.call_function(operator.getitem, (folded, i)) for i in range(2))
        new = graph.call_function(
            conv_block,
            (input_of(head.node), weight, bias, *geometry),
            {"activation": activation(chain), **pool_arguments(chain)},
        )
    _put(head, new)


def replace_loss(link: Link, log_softmax: Link | None) -> None:
    """Call the fused cross-entropy in the place of cross_entropy, or of nll_loss."""
    given, graph = read(link.node, link.traced.owner).arguments, link.traced.graph
    named = ("target", "weight", "ignore_index", "reduction")
    arguments = (input_of(link.node), *(given[name] for name in named))
    with graph.inserting_before(link.node):
        if log_softmax is None:
            new = graph.call_function(
                functional.cross_entropy, (*arguments, given["label_smoothing"])
            )
        else:
            dim = log_softmax.step.arguments["dim"]
            new = graph.call_function(choice.nll_of_log_softmax, arguments, {"dim": dim})
    _put(link, new)


def _put(link, value):
    link.node.replace_all_uses_with(value)
    link.traced.graph.erase_node(link.node)


def _at_hand(graph, value):
    """A parameter read before the current place: fx reads it where forward does, which is later."""
    is_attribute = isinstance(value, fx.Node) and value.op == "get_attr"
    return graph.get_attr(value.target) if is_attribute else value
