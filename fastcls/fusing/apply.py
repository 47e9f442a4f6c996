"""Carries a plan out: classes of modules change, forwards are written anew where they must be."""

from fastcls.fusing import edits
from fastcls.fusing.chains import Chain, Link
from fastcls.fusing.choice import conv_block
from fastcls.fusing.plan import Plan
from fastcls.fusing.rewritten import Forward, rewritten_class
from fastcls.fusing.swapped import (
    absorb,
    absorb_batch_norm,
    bond,
    change_class,
    swap_conv,
    swap_cross_entropy,
    swap_nll_loss,
)


def apply(plan: Plan) -> None:
    """Change the modules that the plan was made from."""
    chains = plan.accepted()
    edited = _edit_graphs(plan, chains)
    changes = []
    for owner in {link.traced.owner: None for chain in chains for link in chain.all_links} | edited:
        train, evaluation = (view.by_owner[id(owner)] for view in (plan.views[0], plan.views[-1]))
        reads, forwards = train.reads | evaluation.reads, (None, None)
        if owner in edited:
            forwards = Forward.of(train.graph), Forward.of(evaluation.graph)
        elif not reads:
            continue
        changes.append((owner, rewritten_class(type(owner), *forwards, reads)))
    _swap_modules(plan, chains)
    for owner, cls in changes:
        change_class(owner, cls)


def _edit_graphs(plan: Plan, chains: list[Chain]) -> dict:
    """Take the steps that no change of class takes out; the modules whose forwards call them."""
    edited, done = {}, set()
    for chain in chains:
        for link in (*chain.links, chain.head):
            if link.node in done or not _is_edited(plan, chain, link):
                continue
            done.add(link.node)
            edited[link.traced.owner] = None
            _edit(chain, link)
    return edited


def _is_edited(plan, chain, link):
    module = link.step.module
    if module is None:
        return True
    is_conv = link is chain.head and link.step.kind == "conv"
    return not is_conv and id(module) not in plan.by_class


def _edit(chain, link):
    if link.step.kind == "conv":
        edits.replace_conv(chain, conv_block)
    elif link.step.kind == "nll_loss":
        edits.replace_loss(link, chain.head)
    elif link.step.kind == "cross_entropy":
        edits.replace_loss(link, None)
    else:
        edits.drop(link)


def _swap_modules(plan: Plan, chains: list[Chain]) -> None:
    swapped, bonded = set(), {}
    for chain in chains:
        conv = chain.head.step.module
        if chain.head.step.kind == "conv" and conv is not None and id(conv) not in swapped:
            swapped.add(id(conv))
            swap_conv(
                conv,
                _absorbed_batch_norm(chain.link("batch_norm")),
                activation=edits.activation(chain),
                **edits.pool_arguments(chain),
            )
        for link in chain.all_links:
            module = link.step.module
            if module is None or id(module) not in plan.by_class:
                continue
            if link.step.kind == "batch_norm":
                continue  # with its convolution
            if conv is not None and link.step.kind in ("relu", "max_pool"):
                bonded[id(conv), id(module)] = (conv, module)
            if id(module) in swapped:
                continue
            swapped.add(id(module))
            if link.step.kind == "nll_loss":
                swap_nll_loss(module, chain.head.step.arguments["dim"])
            else:
                absorb(module)
    for pair in bonded.values():
        bond(*pair)
    for row, (_, loss) in zip(plan.loss_rows(), plan.losses, strict=True):
        if not row.reason:
            swap_cross_entropy(loss)


def _absorbed_batch_norm(link: Link | None):
    if link is None:
        return None
    path, _, name = link.node.target.rpartition(".")
    return absorb_batch_norm(link.traced.owner.get_submodule(path), name)
