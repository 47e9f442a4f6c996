"""``torch.compile(model, backend="fastcls")``: chains in Dynamo's graph, then Inductor."""

import torch
from torch import fx

from fastcls import functional
from fastcls.fusing import edits
from fastcls.fusing.chains import Chain, View
from fastcls.fusing.choice import TYPICAL_IMAGES, conv_block_pays
from fastcls.fusing.steps import input_of
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
    chains = View([Traced(gm, "", gm.graph)], gm).chains()
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


def _is_swapped(chain: Chain, regions: bool) -> bool:
    if chain.refusal or any(link.step.module is not None for link in chain.all_links):
        return False
    if chain.head.step.kind == "log_softmax":
        return not regions  # its dtype depends on the autocast region that it stands in
    return chain.head.step.kind == "cross_entropy" or _pays(chain)


def _pays(chain: Chain) -> bool:
    """By the sizes at hand; a batch size that may change counts as a typical one."""
    step = chain.head.step
    tensors = [_example(node) for node in (input_of(chain.head.node), step.arguments["weight"])]
    if any(t is None for t in tensors):
        return False
    input, weight = tensors
    if input.dim() != 4 or any(isinstance(n, torch.SymInt) for n in input.shape[1:]):
        return False
    images = input.shape[0] if isinstance(input.shape[0], int) else TYPICAL_IMAGES
    needs_grad = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return conv_block_pays(input, weight, _pool_size(chain), needs_grad, images)


def _example(node):
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _pool_size(chain):
    return edits.pool_arguments(chain)["pool_size"]
