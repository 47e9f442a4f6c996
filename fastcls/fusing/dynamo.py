"""``torch.compile(model, backend="fastcls")``: chains in Dynamo's graph, then Inductor."""

import torch
from torch import fx

from fastcls import functional
from fastcls.fusing import edits
from fastcls.fusing.chains import Chain, View
from fastcls.fusing.choice import conv_block_pays, is_one
from fastcls.fusing.steps import STATE, input_of
from fastcls.fusing.tracing import Traced


def fastcls(gm: fx.GraphModule, example_inputs, *, mode=None, options=None):
    """Backend for ``torch.compile``: fused ops where they are faster, Inductor for the rest.

    Args:
        mode, options: Inductor's, as ``torch.compile`` takes them.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode) if mode else {}) | dict(options or {})
    swap_chains(gm)
    return compile_fx(gm, example_inputs, config_patches=patches or None)


def swap_chains(gm: fx.GraphModule) -> None:
    """Swap the chains of functions in ``gm`` in place, where the fused op is faster."""
    regions = any(n.target is torch.amp.autocast_mode._enter_autocast for n in gm.graph.nodes)
    _note_modes(gm.graph)
    chains = View([Traced(gm, "", gm.graph)], gm, opaque={}).chains()
    # All are chosen before the first edit, which leaves nodes of unknown sizes behind.
    for chain in [chain for chain in chains if _is_swapped(chain, regions)]:
        if chain.head.step.kind == "cross_entropy":
            edits.replace_loss(chain.head, None)
        elif chain.head.step.kind == "log_softmax":
            edits.replace_loss(chain.links[0], chain.head)
            edits.drop(chain.head)
        else:
            for link in chain.links:
                edits.drop(link)
            edits.replace_conv(chain, functional.conv_block)
    gm.recompile()


_MODES = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
}


def _note_modes(graph):
    """Which stretch between changes of grad mode and autocast a node stands in."""
    stretch = 0
    for node in graph.nodes:
        stretch += node.target in _MODES
        node.meta[STATE] = stretch


def _is_swapped(chain: Chain, regions: bool) -> bool:
    if chain.refusal or any(link.step.module is not None for link in chain.all_links):
        return False
    if chain.head.step.kind == "log_softmax":
        return not regions  # its dtype depends on the autocast region that it stands in
    return chain.head.step.kind == "cross_entropy" or _pays(chain)


def _pays(chain: Chain) -> bool:
    step = chain.head.step
    nodes = input_of(chain.head.node), step.arguments["weight"]
    examples = [n.meta.get("example_value") for n in nodes if isinstance(n, fx.Node)]
    if len(examples) < 2 or None in examples or examples[0].dim() != 4:
        return False
    grads = [torch.is_grad_enabled() and t.requires_grad for t in examples]
    input, weight = map(_at_hand, examples)
    if input is None or weight is None:
        return False
    stride, dilation = step.arguments["stride"], step.arguments["dilation"]
    return conv_block_pays(
        input,
        weight,
        _pool_size(chain),
        any(grads),
        dense=is_one(stride) and is_one(dilation),
        device_type=examples[0].device.type,
        strided_grad=grads[0] and not is_one(stride),
    )


def _at_hand(tensor):
    """Of a tensor with sizes that may change, one with the sizes that it has now, without data.

    To compare the sizes themselves would tie the graph to the outcome. None if a size is not known
    before the graph runs.
    """
    sizes = [n if isinstance(n, int) else n.node.hint for n in tensor.shape]
    return None if None in sizes else torch.empty(sizes, dtype=tensor.dtype, device="meta")


def _pool_size(chain):
    return edits.pool_arguments(chain)["pool_size"]
