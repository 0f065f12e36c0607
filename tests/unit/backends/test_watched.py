import torch
from torch import nn

from hvdtrain.backends.watched import Watched, without_compile


def made():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


CHANGES = {
    "frozen": lambda net, optimizer: net[0].requires_grad_(False),
    "one frozen": lambda net, optimizer: net[1].bias.requires_grad_(False),
    "swapped": lambda net, optimizer: setattr(net, "1", nn.Linear(2, 1)),
    "added": lambda net, optimizer: net.append(nn.Linear(1, 1)),
    "a parameter added": lambda net, optimizer: net[0].register_parameter("more", nn.Parameter(torch.zeros(1))),
    "a parameter replaced": lambda net, optimizer: setattr(net[0], "bias", nn.Parameter(torch.zeros(2))),
    "a parameter removed": lambda net, optimizer: setattr(net[0], "bias", None),
    "removed": lambda net, optimizer: net.pop(1),
    "nested": lambda net, optimizer: setattr(net[0], "child", nn.Linear(1, 1)),
    "group added": lambda net, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "group changed": lambda net, optimizer: optimizer.param_groups[0]["params"].pop(),
}


def test_every_change_is_seen_once():
    for name, change in CHANGES.items():
        net, optimizer = made()
        watched = Watched(net, optimizer)
        assert not watched.changed(), name
        change(net, optimizer)
        assert watched.changed(), name
        watched.take()
        assert not watched.changed(), name
        assert [id(p) for p in watched.trained] == [id(p) for p in net.parameters() if p.requires_grad], name


def test_values_gradients_and_modes_are_no_change():
    net, optimizer = made()
    watched = Watched(net, optimizer)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    net.eval()
    net[0].register_buffer("kept", torch.zeros(1))
    assert not watched.changed()


def test_only_what_was_never_seen_is_new():
    net, optimizer = made()
    watched = Watched(net, optimizer)
    net[0].requires_grad_(False)
    assert watched.take() == []
    net[0].requires_grad_(True)
    net.append(nn.Linear(1, 1))
    new = watched.take()
    assert [id(p) for p in new] == [id(p) for p in net[2].parameters()]


def test_parameters_that_no_group_steps_are_outside():
    net, _ = made()
    optimizer = torch.optim.SGD([*net[0].parameters(), net[1].weight], lr=0.1)
    assert [id(p) for p in Watched(net, optimizer).outside] == [id(net[1].bias)]
    net[1].bias.requires_grad_(False)  # nor need it be
    assert Watched(net, optimizer).outside == []


def test_without_an_optimizer_nothing_is_outside_and_changes_are_seen():
    net, _ = made()
    watched = Watched(net, None)
    assert watched.outside == []
    net[0].requires_grad_(False)
    assert watched.changed()


def test_names_are_those_without_torch_compile():
    names = ["0.weight", "_orig_mod.0.weight", "_orig_mod.0._orig_mod.weight", "my_orig_mod.weight"]
    assert [without_compile(name) for name in names] == ["0.weight", "0.weight", "0.weight", "my_orig_mod.weight"]
