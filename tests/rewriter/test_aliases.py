"""Aliases: what operators' schemas say, and what they do not; never less than a list of names said before."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from reattend.rewriter.graph.aliases import Aliases
from reattend.rewriter.graph.torch_private import OpOverload, schema, tree_leaves

aten = torch.ops.aten


@cache
def overloads() -> tuple[OpOverload, ...]:
    """Every ATen operator that this PyTorch has, without those that write into arguments named `out`."""
    names = {n.partition(".")[0].removeprefix("aten::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    found = (getattr(getattr(aten, name), o) for name in sorted(names) for o in getattr(aten, name).overloads())
    return tuple(f for f in found if "out" not in {a.name for a in schema(f).arguments})


def call_of(target: OpOverload) -> tuple[fx.Graph, fx.Node]:
    """A graph that calls the operator on inputs of its own, as many in each list as show a list."""
    graph = fx.Graph()
    given: list[Any] = []
    for a in schema(target).arguments:
        kind = str(a.type)
        if "List[Tensor]" in kind or "List[Optional[Tensor]]" in kind:
            given.append([graph.placeholder(f"{a.name}{i}") for i in range(2)])
        else:
            given.append(graph.placeholder(a.name) if "Tensor" in kind else a.default_value)
    return graph, graph.call_function(target, tuple(given))


def said_before(n: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that the value shares storage with, and those that are written, as a list of names had it."""
    names = ("reshape", "contiguous", "flatten", "to", "type_as", "reshape_as", "dropout", "unflatten", "expand_as",
             "view_as", "movedim")
    shared, written = set[fx.Node](), set[fx.Node]()
    said = schema(n.target)  # type: ignore[arg-type]
    for i, a in enumerate(said.arguments):
        value = n.args[i]
        nodes = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, fx.Node)]
        if a.alias_info is not None and any(r.alias_info is not None for r in said.returns):
            shared |= set(nodes)
        if a.alias_info is not None and a.alias_info.is_write:
            written |= set(nodes)
    if said.name.removeprefix("aten::") in names and isinstance(n.args[0], fx.Node):
        shared.add(n.args[0])
    return shared, written


def test_no_operator_aliases_or_writes_less_than_before() -> None:
    more = set()
    assert len(overloads()) > 1500
    for target in overloads():
        graph, n = call_of(target)
        aliases = Aliases(graph)
        shared = {i for i in graph.nodes if i is not n and aliases.storage(i) is aliases.storage(n)}
        written = {i for i in graph.nodes if i is not n and aliases.is_written(i)}
        before, before_written = said_before(n)
        assert shared >= before, target
        # what shares storage with what is written is written as well
        assert written >= before_written, target
        assert written <= before_written | shared, target
        if shared > before:
            more.add(schema(target).name.removeprefix("aten::"))
    assert {"meshgrid", "unsafe_split", "_unsafe_view", "feature_dropout", "_cast_Float"} <= more
    assert not more & {"matmul", "add", "cat", "softmax", "clone", "native_dropout"}


X = torch.randn(4, 4)
# Calls that answer (a view of) what they are given, while the schema says that they make something new.
UNSAID: tuple[tuple[OpOverload, tuple[Any, ...]], ...] = (
    (aten.type_as.default, (X, X)), (aten.to_dense.default, (X,)), (aten.dequantize.self, (X,)),
    (aten.conj_physical.default, (X,)), (aten.lift.default, (X,)), (aten.sum_to_size.default, (X, [4, 4])),
    (aten._unsafe_view.default, (X, [16])), (aten.flatten_dense_tensors.default, ([X],)),
    (aten.dropout.default, (X, 0.5, False)), (aten.feature_dropout.default, (X, 0.5, False)),
    (aten.alpha_dropout.default, (X, 0.5, False)), (aten.feature_alpha_dropout.default, (X, 0.5, False)),
    (aten.atleast_1d.default, (X,)), (aten.atleast_2d.Sequence, ([X],)), (aten.atleast_3d.default, (X,)),
    (aten.broadcast_tensors.default, ([X, X[0]],)), (aten.meshgrid.default, ([X[0]],)),
    (aten.unsafe_chunk.default, (X, 2)), (aten.unsafe_split.Tensor, (X, 2)),
    (aten.unsafe_split_with_sizes.default, (X, [2, 2])), (aten._cast_Float.default, (X,)),
    (aten.einsum.default, ("ij->ji", [X])), (aten.cartesian_prod.default, ([X[0]],)),
)
MADE: tuple[tuple[OpOverload, tuple[Any, ...]], ...] = (
    (aten.einsum.default, ("ij,jk->ik", [X, X])), (aten.cat.default, ([X],)), (aten.clone.default, (X,)),
    (aten.softmax.int, (X, -1)), (aten.matmul.default, (X, X)), (aten.repeat.default, (X, [1, 1])),
    (aten.native_dropout.default, (X, 0.5, False)), (aten.pad.default, (X, [0, 0])),
)


def seen(target: OpOverload, args: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether a call shares storage with a tensor that it is given: in truth, and as the graph of the call says."""
    given = {id(t): t for t in tree_leaves(args) if isinstance(t, Tensor)}
    made = (t for t in tree_leaves(target(*args)) if isinstance(t, Tensor))
    places = {t.untyped_storage().data_ptr() for t in given.values()}
    graph = fx.Graph()
    inputs = {i: graph.placeholder(f"x{k}") for k, i in enumerate(given)}
    n = graph.call_function(target, _replaced(args, inputs))
    aliases = Aliases(graph)
    said = any(aliases.storage(i) is aliases.storage(n) for i in inputs.values())
    return any(t.untyped_storage().data_ptr() in places for t in made), said


def _replaced(value: Any, inputs: dict[int, fx.Node]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(v, inputs) for v in value)
    return inputs[id(value)] if isinstance(value, Tensor) else value


@pytest.mark.parametrize(("target", "args"), UNSAID, ids=lambda x: str(x) if isinstance(x, OpOverload) else "")
def test_what_a_schema_does_not_say_is_known(target: OpOverload, args: tuple[Any, ...]) -> None:
    assert not any(r.alias_info for r in schema(target).returns)
    assert seen(target, args) == (True, True)


@pytest.mark.parametrize(("target", "args"), MADE, ids=lambda x: str(x) if isinstance(x, OpOverload) else "")
def test_what_is_made_shares_nothing(target: OpOverload, args: tuple[Any, ...]) -> None:
    assert seen(target, args) == (False, False)


def test_a_write_through_an_unsaid_view_is_seen() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    turned = graph.call_function(aten.einsum.default, ("ij->ji", [x]))
    write = graph.call_function(aten.add_.Tensor, (x, 1.0))
    read = graph.call_function(aten.exp.default, (turned,))
    aliases = Aliases(graph)
    assert aliases.written_between(turned, turned, read)
    assert aliases.writers(turned) == (write,)
    assert not aliases.written_between(turned, write, read)


def test_nodes_that_are_put_in_later_stand_where_they_were_put() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    write = graph.call_function(aten.add_.Tensor, (x, 1.0))
    read = graph.call_function(aten.exp.default, (x,))
    aliases = Aliases(graph)
    with graph.inserting_before(read):
        made = graph.call_function(aten.view.default, (x, [-1]))
        again = graph.call_function(aten.exp.default, (made,))
    aliases.insert([made, again], read)
    assert sorted(graph.nodes, key=aliases.position.__getitem__) == list(graph.nodes)
    assert aliases.storage(made) is aliases.storage(x) is not aliases.storage(again)
    assert aliases.written_between(made, x, read)
    assert not aliases.written_between(made, write, read)
