"""What keys and values are made of, by data flow: maps of latents in every spelling, and what is left as it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from reattend.cost_model.mesh.core import roles
from reattend.patterns.evaluate import evaluate
from reattend.patterns.passes.absorb import Absorbed, absorb
from reattend.patterns.verdict import Obstacle
from reattend.rewriter.capture import export
from reattend.rewriter.find.detect import Found, find
from reattend.rewriter.find.upstream import Reached, projection_width, upstream
from reattend.rewriter.graph.aliases import Aliases

from .helpers import values_of

B, M, D, H, E, R, V, C = 2, 7, 24, 4, 6, 2, 5, 8


class Net(nn.Module):
    """An attention whose keys and values a function of the tokens makes."""

    def __init__(self, made: Callable[..., tuple[Tensor, Tensor]], value: int = V, key: int = E) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.made = made
        self.ask = nn.Parameter(torch.randn(D, H * key, generator=g) * 0.3)
        self.squeeze = nn.Linear(D, C, bias=False)
        self.scale = nn.Parameter(torch.rand(C, generator=g) + 0.5)
        self.grow = nn.Linear(C, H * (E + V), bias=False)
        self.grow_k, self.grow_v = nn.Linear(C, H * E, bias=False), nn.Linear(C, H * V, bias=False)
        self.biased = nn.Linear(C, H * V)
        self.side = nn.Linear(D, R, bias=False)
        self.k_weight, self.v_weight = (nn.Parameter(torch.randn(H, n, C, generator=g)) for n in (E, V))
        self.group_k, self.group_v = (nn.Parameter(torch.randn(2, 2, n, C // 2, generator=g)) for n in (E, V))
        self.out = nn.Linear(H * V, 17, bias=False)
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        q = (x @ self.ask).view(*x.shape[:2], H, self.key).transpose(1, 2)
        k, v = self.made(self, x)
        a = torch.softmax(q @ k.transpose(-1, -2) * 0.4, -1) @ v
        out: Tensor = self.out(a[..., :V].transpose(1, 2).flatten(2))
        return out


def norm(net: Any, x: Tensor) -> Tensor:
    c = net.squeeze(x)
    normed: Tensor = c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6) * net.scale
    return normed


def heads(x: Tensor, n: int) -> Tensor:
    return x.view(*x.shape[:2], H, n).transpose(1, 2)


def one_linear(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = torch.split(heads(net.grow(norm(net, x)), E + V), [E, V], -1)
    return k, v


def two_linears(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    c = net.squeeze(x)
    return heads(net.grow_k(c), E), heads(net.grow_v(c), V)


def by_einsum(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    c = norm(net, x)
    return torch.einsum("bmc,hec->bhme", c, net.k_weight), torch.einsum("hfc,bmc->bhmf", net.v_weight, c)


def by_matmul(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    c = norm(net, x)[:, None]
    return c @ net.k_weight.mT, torch.matmul(c, net.v_weight.transpose(1, 2))


def padded(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = one_linear(net, x)
    return k, F.pad(v, (0, 1))


def joined(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = one_linear(net, x)
    return torch.cat([k, torch.tanh(net.side(x))[:, None].expand(B, H, M, R)], -1), v


def copied(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = one_linear(net, x)
    whole = k.new_empty(B, H, M, E + R)
    whole[..., R:].copy_(k)
    whole[..., :R].copy_(torch.tanh(net.side(x))[:, None].expand(B, H, M, R))
    return whole, v


def grouped(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    c = norm(net, x).view(*x.shape[:2], 2, C // 2)
    k = torch.einsum("bmgc,gnec->bgnme", c, net.group_k)
    return k.flatten(1, 2), torch.einsum("bmgc,gnfc->bgnmf", c, net.group_v).flatten(1, 2)


def by_addmm(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    c = norm(net, x)
    k = torch.addmm(torch.ones(H * E), c.flatten(0, 1), net.grow_k.weight.t()).view(B, M, H * E)
    return heads(k, E), heads(net.grow_v(c), V)


SPELLINGS = {
    "one linear, split": (one_linear, E), "two linears, no norm": (two_linears, E), "einsum": (by_einsum, E),
    "matmul": (by_matmul, E), "addmm with a bias": (by_addmm, E), "padded values": (padded, E), "a shared part joined": (joined, E + R),
    "copied into a fresh tensor": (copied, E + R), "a latent for each group of heads": (grouped, E),
}


def captured(model: nn.Module, *args: Tensor) -> tuple[fx.GraphModule, Found]:
    with torch.no_grad():
        gm = export.from_export(model.eval(), args, {}).graph
    (found,) = find(gm)[0]
    return gm, found


def reached(made: Callable[..., Any], key: int = E) -> tuple[Reached | Obstacle, Found, dict[fx.Node, Any]]:
    torch.manual_seed(1)
    x = torch.randn(B, M, D)
    model = Net(made, key=key)
    gm, found = captured(model, x)
    return upstream(gm.graph, Aliases(gm.graph), found), found, values_of(gm, [x])


@pytest.mark.parametrize(("made", "key"), SPELLINGS.values(), ids=SPELLINGS)
def test_keys_and_values_are_lifted_to_their_latent(made: Callable[..., Any], key: int) -> None:
    """The wider cascade and both forms of it compute what the model does; nothing wide is left that belongs to tokens."""
    made_of, found, values = reached(made, key)
    assert isinstance(made_of, Reached), made_of
    who = roles(found.cascade)
    tensors = {n: values[node] for n, node in made_of.tensors.items()}
    reference = values[found.output]
    forms = [absorb(made_of.cascade, who.key, who.tokens, expand=e) for e in (False, True)]
    for form in [made_of.cascade, *(f.cascade for f in forms if isinstance(f, Absorbed))]:
        out = evaluate(form, tensors)["O"]
        assert (out - reference.reshape(out.shape)).abs().max() < 1e-5 * reference.abs().max()
    absorbed = forms[0]
    assert isinstance(absorbed, Absorbed), absorbed
    kept = {str(x.attr) for e in absorbed.cascade.einsums for x in e.reads if who.key in x.ranks} - set(absorbed.cascade.producers)
    assert sum(values[made_of.tensors[n]].numel() for n in kept) == B * M * (C + key - E)


def test_inputs_are_named_after_what_makes_them() -> None:
    made_of, _, _ = reached(joined, E + R)
    assert isinstance(made_of, Reached)
    assert {"grow_weight", "side"} <= {t.name for t in made_of.cascade.inputs}


def test_what_follows_the_attention_says_how_wide_the_model_is() -> None:
    _, found, _ = reached(one_linear)
    # a slice of padded values, a transpose and a flatten on the way
    assert projection_width(found.output) == 17


def turned(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Positions turn the keys after they are made, and values are squashed."""
    k, v = two_linears(net, x)
    at = torch.arange(M)[:, None] * torch.ones(E)
    return k * at.cos() + k.flip(-1) * at.sin(), v.tanh()


def test_a_rotation_after_the_map_is_no_map() -> None:
    obstacle, _, _ = reached(turned)
    assert isinstance(obstacle, Obstacle)
    assert "no product with weights stands behind keys or values (K comes from add, V comes from tanh)" in obstacle.reason


def biased(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    c = norm(net, x)
    return heads(net.grow_k(c), E), heads(net.biased(c), V)


def test_a_bias_of_values_is_refused_and_one_of_keys_is_not() -> None:
    made_of, found, _ = reached(biased)
    assert isinstance(made_of, Reached)
    who = roles(found.cascade)
    obstacle = absorb(made_of.cascade, who.key, who.tokens)
    assert isinstance(obstacle, Obstacle)
    assert obstacle.reason == "the values of O[b,h,p,f] have a bias beside the map: their share is a sum of its own"


class Cached(nn.Module):
    """Keys of earlier tokens are there expanded: they are no map of anything that is at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(one_linear)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own_k, own_v = one_linear(self.net, x)
        q = (x @ self.net.ask).view(*x.shape[:2], H, E).transpose(1, 2)
        k, v = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
        return torch.softmax(q @ k.mT, -1) @ v


def test_expanded_keys_in_a_cache_are_refused() -> None:
    gm, found = captured(Cached(), torch.randn(B, 3, D), torch.randn(B, H, M, E), torch.randn(B, H, M, V))
    made_of = upstream(gm.graph, Aliases(gm.graph), found)
    assert isinstance(made_of, Reached)
    who = roles(found.cascade)
    obstacle = absorb(made_of.cascade, who.key, who.tokens)
    assert isinstance(obstacle, Obstacle)
    assert "earlier tokens" in obstacle.reason


class Interleaved(nn.Module):
    """Copies into every second channel of a fresh tensor: what it then holds is read as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(one_linear)

    def forward(self, x: Tensor) -> Tensor:
        own, v = one_linear(self.net, x)
        k = own.new_empty(B, H, M, E)
        k[..., ::2].copy_(own[..., : E // 2])
        k[..., 1::2].copy_(own[..., E // 2 :])
        q = (x @ self.net.ask).view(*x.shape[:2], H, E).transpose(1, 2)
        return torch.softmax(q @ k.mT, -1) @ v


def test_copies_with_a_step_are_not_followed() -> None:
    gm, found = captured(Interleaved(), torch.randn(B, M, D))
    made_of = upstream(gm.graph, Aliases(gm.graph), found)
    assert isinstance(made_of, Reached)
    assert any(n.target is torch.ops.aten.new_empty.default for n in made_of.tensors.values())
