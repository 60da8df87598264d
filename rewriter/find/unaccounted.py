"""Places between two products that neither an attention nor a miss accounts for: nothing vanishes without a word.

    scores ─ softmax ─ permute ─ linear (mixes heads) ─ permute ─ matmul      the matmul, and that `linear` stands between
    k ⊗ v ─ cumsum ─ state ─ matmul with q                                    the matmul, and that `cumsum` does
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import Tensor, fx

from ..capture.weights import weights_of
from ..graph.node import arguments, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift.operators_contract import CONTRACTIONS
from .final import NOT_BETWEEN, SHAPE_ONLY, SOFTMAXES, is_product_sum

# What multiplies tokens with tokens, or measures how far they are apart, whether or not a rule reads it.
PRODUCTS = CONTRACTIONS | {"linalg_multi_dot", "chain_matmul"}
# Layers of weights that may mix scores or probabilities, and norms over them.
_MIXES = frozenset(("linear", "conv1d", "conv2d", "convolution"))
_NORMS = frozenset(("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"))
# How many of them scores pass; behind more stand other things than scores.
_PASSED = 3
# What keeps a sum over tokens a sum over tokens: states are scaled, masked, shifted, joined and added up.
_ADDITIVE = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "t", "permute",
    "movedim", "expand", "contiguous", "clone", "slice", "select", "to", "_to_copy", "type_as", "getitem", "cat", "stack",
    "split", "chunk", "unbind", "index", "pad",
    "constant_pad_nd", "add", "sub", "mul", "multiply", "div", "neg", "cumsum", "sum", "where",
    "masked_fill", "tril", "triu", "lerp", "copy", "slice_scatter", "select_scatter", "nan_to_num", "mT", "swapaxes", "flip",
    "roll", "addcmul",
))
# What leaves scores and weights what they are, each where they were or moved.
_MOVES = (SHAPE_ONLY - CONTRACTIONS - {"cat", "stack", "getitem"}) | {
    "mT", "swapaxes", "movedim", "dropout", "type_as", "float", "add", "masked_fill",
}
_LIMIT = 256
PAIRS = "its states are made by a tree of pairs (an associative scan), in which no loop of steps is there to be folded"
# What a tree is made of, and how many of these are looked at.
_MADE_OF_PAIRS = frozenset((
    "mul", "add", "slice", "stack", "flatten", "cat", "pad", "constant_pad_nd", "movedim", "transpose", "permute", "view",
    "reshape", "unsqueeze", "squeeze", "to", "_to_copy", "select", "clone", "contiguous", "getitem", "split_with_sizes",
))
_LIMIT_OF_PAIRS = 512


def unaccounted(
    graph: fx.Graph, known: Collection[fx.Node], dismissed: Collection[fx.Node] = ()
) -> Iterator[tuple[fx.Node, str]]:
    """The last product of each place that no known product is reached from, and why it is left alone.

    `dismissed` are products that were tried and found to be no attention between tokens.
    """
    given = weights_of(graph)
    named = dict(_softmaxes(graph, {*known, *dismissed}, given))
    named |= _made_by_layers(graph, {*known, *named}, given)
    yield from named.items()
    yield from _states(graph, {*known, *named}, given)


# --- a softmax between two products -------------------------------------------------------------------------------


def _softmaxes(
    graph: fx.Graph, known: Collection[fx.Node], weights: Collection[fx.Node]
) -> Iterator[tuple[fx.Node, str]]:
    def pairs(n: fx.Node) -> bool:
        return _pairs(n, weights)

    for n in graph.nodes:
        if op_name(n) not in SOFTMAXES:
            continue
        before = _nearest(n, lambda x: x.all_input_nodes, pairs)
        after = _nearest(n, lambda x: x.users, is_product_sum)
        if before is None:
            continue
        if after is None and not before[1] and _is_of_tokens(before[0], weights) and _leaves(n, known):
            yield n, "a softmax of a product leaves its graph before it meets values: behind a graph break, or the end"
        if after is None or after[0] in known or _reaches(n, known):
            continue
        layers = [*before[1], *after[1]]
        # a router's softmax is over experts, which no product before it has
        if not _size(n) <= _sizes(before[0]) & _sizes(*after[0].all_input_nodes):
            continue
        if sum(op_name(x) in _MIXES for x in layers) > 1 and not all(_mixes_heads(x, before[0]) for x in layers):
            continue
        if _size(n) == {"1"}:
            yield after[0], "one key only"
            continue
        why = _between(layers, before[0], after[0], pairs(before[0]))
        yield after[0], f"a softmax stands between two products, but {why}"


def _made_by_layers(
    graph: fx.Graph, known: Collection[fx.Node], weights: Collection[fx.Node]
) -> Iterator[tuple[fx.Node, str]]:
    """Products with the softmax of what a layer makes: pooling with learned queries, convolutions made of tokens."""
    for n in graph.nodes:
        if op_name(n) not in SOFTMAXES:
            continue
        made, after = _moved_by(n, lambda x: x.all_input_nodes), _moved_by(n, lambda x: x.users)
        if made is None or after is None or after in known or op_name(made) not in _MIXES:
            continue
        operands = _operands(after)
        held = any(x in weights or x.op == "get_attr" for x in operands)
        # a gate's softmax is over what no value has
        if op_name(after) in CONTRACTIONS and not held and all(_size(n) <= _sizes(x) for x in operands):
            yield after, f"a softmax weighs values, but its scores are made by a layer ({op_name(made)}), not by a product"


def _moved_by(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> fx.Node | None:
    """The first node in one direction that does more than move, round or mask what is given."""
    for n in step(start):
        while (op_name(n) in _MOVES or _is_scaled(n)) and (further := list(step(n))):
            n = further[0]
        if op_name(n) in _MIXES | PRODUCTS:
            return n
    return None


def _is_scaled(n: fx.Node) -> bool:
    """Is a node a value times, or over, a number?"""
    return op_name(n) in ("mul", "multiply", "div") and len(n.all_input_nodes) == 1


def _between(layers: list[fx.Node], first: fx.Node, last: fx.Node, in_pairs: bool) -> str:
    """What is in the way, in words."""
    if in_pairs:
        return f"its scores are made pair by pair (by {op_name(first)}), not by a product"
    if mixing := [op_name(x) for x in layers if op_name(x) in _MIXES]:
        return f"{' and '.join(dict.fromkeys(mixing))} mixes them"
    if layers:
        return f"{op_name(layers[0])} changes what it weighs"
    unread = [op_name(x) for x in (first, last) if op_name(x) not in CONTRACTIONS]
    if unread or op_name(last) in ("addmm", "baddbmm"):
        return f"{(unread or [op_name(last)])[0]} is read as no product of two operands"
    return "something in between has no term"


def _mixes_heads(layer: fx.Node, scores: fx.Node) -> bool:
    """Does a layer take as many channels as the scores have in a dimension of their own?"""
    if op_name(layer) not in _MIXES:
        return True
    weight = layer.args[1] if len(layer.args) > 1 else layer.kwargs.get("weight")
    shape = shape_of(tensor_of(weight)) if isinstance(weight, fx.Node) else ()
    return len(shape) > 1 and str(shape[1]) in _sizes(scores)


def _size(softmax: fx.Node) -> set[str]:
    """The size of the dimension that is normalised."""
    shape, dim = shape_of(tensor_of(softmax)), arguments(softmax)["dim"]
    return {str(shape[dim])} if shape and isinstance(dim, int) else set()


def _sizes(*nodes: fx.Node) -> set[str]:
    return {str(s) for n in nodes if isinstance(n.meta.get("val"), Tensor) for s in shape_of(tensor_of(n))}


def _nearest(
    start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]], also: Callable[[fx.Node], bool]
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The nearest product in one direction, or what is `also` taken for one, with the layers passed on the way to it."""
    queue: deque[tuple[fx.Node, tuple[fx.Node, ...]]] = deque([(start, ())])
    seen: set[fx.Node] = set()
    while queue and len(seen) < _LIMIT:
        n, passed = queue.popleft()
        if n in seen:
            continue
        seen.add(n)
        name = op_name(n)
        if n is not start and (name in PRODUCTS or also(n)):
            return n, passed
        if name in _MIXES or name in _NORMS:
            passed = (*passed, n)
        if len(passed) > _PASSED or n.op in ("placeholder", "get_attr") or name in NOT_BETWEEN - _MIXES - _NORMS:
            continue
        queue.extend((x, passed) for x in step(n))
    return None


def _is_of_tokens(n: fx.Node, weights: Collection[fx.Node]) -> bool:
    return op_name(n) in PRODUCTS - {"linear"} and not any(x in weights or x.op == "get_attr" for x in n.all_input_nodes)


def _leaves(start: fx.Node, known: Collection[fx.Node]) -> bool:
    """Does a value leave the graph, moved at most, and is it none that an attention accounts for?"""
    queue, seen, leaves = deque([start]), set[fx.Node](), False
    while queue and len(seen) < _LIMIT:
        n = queue.popleft()
        if n in known:
            return False
        if n not in seen:
            seen.add(n)
            leaves |= any(u.op == "output" for u in n.users)
            queue.extend(u for u in n.users if op_name(u) in _MOVES)
    return leaves


def _reaches(start: fx.Node, known: Collection[fx.Node]) -> bool:
    """Is a product that is accounted for reached before any other?"""
    queue, seen = deque([start]), set[fx.Node]()
    while queue and len(seen) < _LIMIT:
        n = queue.popleft()
        if n in known:
            return True
        if n in seen or (n is not start and op_name(n) in PRODUCTS):
            continue
        seen.add(n)
        queue.extend(n.users)
    return False


# --- a sum over tokens between two products -----------------------------------------------------------------------


def _states(
    graph: fx.Graph, known: Collection[fx.Node], weights: Collection[fx.Node]
) -> Iterator[tuple[fx.Node, str]]:
    """Products with a state: with a sum of products of keys and values, however that is added up."""
    for n in graph.nodes:
        if n in known or not (op_name(n) in PRODUCTS or is_product_sum(n)) or not isinstance(n.meta.get("val"), Tensor):
            continue
        operands = _operands(n)
        if len(operands) < 2 or any(x in weights for x in operands):
            continue
        for x in operands:
            way = _way_to_joint(x, known, weights)
            # positions laid across slopes, in the scores of an attention, are a joint as well
            if way is not None and not _reaches(n, known):
                yield n, _stands(n, way)
                break


def _operands(n: fx.Node) -> list[fx.Node]:
    if op_name(n) == "sum":
        factors = (x for x in n.all_input_nodes if op_name(x) in ("mul", "multiply"))
        return [y for x in factors for y in x.all_input_nodes if isinstance(y.meta.get("val"), Tensor)]
    return [x for x in n.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]


def _way_to_joint(
    start: fx.Node, known: Collection[fx.Node], weights: Collection[fx.Node]
) -> list[fx.Node] | None:
    """From an operand up to the nearest joint of keys and values, through sums and what moves them; None without one."""
    came: dict[fx.Node, fx.Node | None] = {start: None}
    queue = deque([start])
    while queue and len(came) < _LIMIT:
        n = queue.popleft()
        if n in known:
            continue
        if _joins(n, weights):
            way: list[fx.Node] = []
            at: fx.Node | None = n
            while at is not None:
                way.append(at)
                at = came[at]
            return way
        if op_name(n) in _ADDITIVE and not is_product_sum(n):
            for x in n.all_input_nodes:
                if x not in came and isinstance(x.meta.get("val"), (Tensor, list, tuple)):
                    came[x] = n
                    queue.append(x)
    return None


def _joins(n: fx.Node, weights: Collection[fx.Node]) -> bool:
    """Is a node a product of two computed tensors that keeps a dimension of each: Kᵀ · V, or k ⊗ v at every token?"""
    if op_name(n) in PRODUCTS:
        return not any(x in weights for x in n.all_input_nodes)
    return op_name(n) in ("mul", "multiply") and _pairs(n, weights)


def _pairs(n: fx.Node, weights: Collection[fx.Node]) -> bool:
    """Does a pointwise operator lay two computed tensors across each other: q[:, None] − k[None], an element a pair?"""
    if op_name(n) not in ("add", "sub", "mul", "multiply"):
        return False
    shapes = [shape_of(tensor_of(x)) for x in n.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    if len(shapes) != 2 or any(x in weights for x in n.all_input_nodes):
        return False
    pairs = list(zip(reversed(shapes[0]), reversed(shapes[1])))
    return any(a == 1 != b for a, b in pairs) and any(b == 1 != a for a, b in pairs)


def _stands(n: fx.Node, way: list[fx.Node]) -> str:
    """What is in the way of one cascade, in words; `way` leads from the joint to the operand."""
    names = [op_name(x) for x in way[1:]]
    joint = "keys and values are multiplied first"
    if "cumsum" in names:
        return f"{joint}, and a running sum (cumsum) stands between them and the queries: a scan, which is not built yet"
    if any(name in ("add", "lerp", "addcmul", "sub") for name in names):
        return f"{joint} and added to a state (by add): a recurrence, which is not folded yet"
    if op_name(n) not in CONTRACTIONS and op_name(n) != "sum":
        return f"{joint}, and {op_name(n)} is read as no product of two operands"
    if len(_operands(n)) > 2:
        return f"{joint}, and {op_name(n)} multiplies {len(_operands(n))} operands at once"
    moved = next((x for x in names if x not in ("view", "transpose", "permute", "to")), "")
    return f"{joint}, and {moved or op_name(n)} between them and the queries has no term here"


# --- trees of pairs -----------------------------------------------------------------------------------------------


def made_by_pairs(start: fx.Node) -> bool:
    """Is a value made of neighbours that were combined at two levels or more?

        x[0::2], x[1::2]  →  y = x[1::2] ∘ x[0::2]  →  y[0::2], y[1::2]  → …            (an associative scan)

    No such tree is read back as the recurrence that it computes: it is named.
    """
    queue, seen = deque([start]), set[fx.Node]()
    while queue and len(seen) < _LIMIT_OF_PAIRS:
        n = queue.popleft()
        if n in seen or op_name(n) not in _MADE_OF_PAIRS:
            continue
        seen.add(n)
        if _is_every_second(n) and any(map(_is_every_second, _combined(n.all_input_nodes[0]))):
            return True
        queue.extend(n.all_input_nodes)
    return False


def _combined(n: fx.Node) -> list[fx.Node]:
    """What a sum of products combines."""
    if op_name(n) not in ("mul", "add"):
        return []
    return [y for x in n.all_input_nodes for y in (x, *_combined(x))]


def _is_every_second(n: fx.Node) -> bool:
    return op_name(n) == "slice" and arguments(n)["step"] == 2
