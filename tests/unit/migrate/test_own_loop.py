"""The second form: what the usual pattern becomes, and what is said where a script has not that shape."""

from __future__ import annotations

import libcst as cst
import pytest

from hvdtrain.migrate.own_loop import own_loop

SCRIPT = """\
import torch
import horovod.torch as hvd

hvd.init()
# Pin the GPU.
torch.cuda.set_device(hvd.local_rank())
sampler = torch.utils.data.distributed.DistributedSampler(data, num_replicas=hvd.size(), rank=hvd.rank())
loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * hvd.size())
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)

for epoch in range(3):
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    if hvd.rank() == 0:
        print(loss)
"""
OWN = """\
import torch
import hvdtrain

with hvdtrain.init() as backend:
    sampler = torch.utils.data.distributed.DistributedSampler(data, num_replicas=backend.world_size, rank=backend.rank)
    loader = backend.loader(torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * backend.world_size)
    replica = backend.replicate(model.to(backend.device), optimizer)

    for epoch in range(3):
        loader.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            replica.backward(loss, samples=len(x))
            replica.step()
        if backend.rank == 0:
            print(loss)
"""


def moved(script: str) -> tuple[str, list[tuple[int, str, bool]]]:
    module, remarks = own_loop(cst.parse_module(script))
    compile(module.code, "script", "exec")
    return module.code, [(remark.line, remark.text, remark.yours) for remark in remarks]


def changed(old: str, new: str) -> str:
    assert old in SCRIPT
    return SCRIPT.replace(old, new)


def test_the_usual_pattern_becomes_a_loop_of_its_own():
    assert moved(SCRIPT) == (OWN, [])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("print(hvd.local_size())", "print(backend.local_world_size)"),
        ("hvd.barrier()", "backend.barrier()"),
        ("v = hvd.allreduce(t, name='x')", 'v = backend.all_reduce(t, "mean")'),
        ("v = hvd.allreduce(t, average=False)", 'v = backend.all_reduce(t, "sum")'),
        ("hvd.allreduce_(t, op=hvd.Max)", 'backend.all_reduce_(t, "max")'),
        ("v = hvd.allgather(t)", "v = torch.cat(backend.all_gather(t))"),
        ("v = hvd.broadcast(t, root_rank=2, name='b').item()", "v = backend.broadcast(t, 2).item()"),
        ("v = hvd.broadcast_object(o)", "v = backend.broadcast_object(o, 0)"),
        ("v = hvd.allgather_object(o)", "v = backend.all_gather_object(o)"),
        ("hvd.shutdown()", "backend.stop()"),
    ],
)
def test_single_calls_are_in_a_backends_words(before, after):
    code, remarks = moved(changed("        print(loss)", f"        {before}"))
    assert (f"            {after}\n" in code, remarks) == (True, [])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "optimizer.synchronize()\n        clip_grad_norm_(model.parameters(), 1.0)\n"
            "        with optimizer.skip_synchronize():\n            optimizer.step()",
            "replica.step(clip_norm=1.0)",
        ),
        (
            "scaler.unscale_(optimizer)\n        scaler.step(optimizer)\n        scaler.update()",
            "replica.step(scaler=scaler)",
        ),
        (
            "optimizer.synchronize()\n        norms.append([p.grad.norm() for p in model.parameters()])\n"
            "        with optimizer.skip_synchronize():\n            optimizer.step()",
            "replica.reduce_gradients()\n            norms.append([p.grad.norm() for p in model.parameters()])\n"
            "            optimizer.step()\n            replica.clear()",
        ),
    ],
)
def test_what_stands_between_backward_and_step_keeps_its_order(before, after):
    code, remarks = moved(changed("optimizer.step()", before))
    assert f"            replica.backward(loss, samples=len(x))\n            {after}\n" in code
    assert [remark for remark in remarks if remark[2]] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.named_parameters()", "pairs"),  # the optimizer's own line says which model
        ("for x, y in loader:", "for batch in loader:\n        x, y = batch[0], batch[1]"),
        ("for x, y in loader:", "for i, (x, y) in enumerate(tqdm(loader)):"),
        ("hvd.broadcast_optimizer_state(optimizer, root_rank=0)\n", ""),
    ],
)
def test_other_spellings_of_the_pattern_are_understood(old, new):
    code, remarks = moved(changed(old, new))
    assert ("replica.backward(loss, samples=len(x))" in code, remarks) == (True, [])


@pytest.mark.parametrize(
    ("loop", "samples"),
    [
        ("for i, (x, y) in tqdm(enumerate(loader)):", "x"),
        ("for i, (x, y) in enumerate(tqdm(loader), 1):", "x"),
        ("for x, y in prefetched(loader):", "x"),
    ],
)
def test_samples_are_those_of_a_batch_and_not_its_number(loop, samples):
    code, remarks = moved(changed("for x, y in loader:", loop).replace("model(x)", "model(x.cuda())"))
    assert (f"replica.backward(loss, samples=len({samples}))" in code, remarks) == (True, [])


def test_a_step_in_every_branch_is_a_step_of_every_batch():
    code, remarks = moved(
        changed(
            "        optimizer.step()",
            "        if clip:\n            optimizer.synchronize()\n            clip_grad_norm_(model.parameters(), clip)\n"
            "            with optimizer.skip_synchronize():\n                optimizer.step()\n"
            "        elif x:\n            optimizer.step()\n        else:\n            optimizer.step()\n            log()",
        )
    )
    assert remarks == []
    assert "            if clip:\n                replica.step(clip_norm=clip)\n            elif x:\n" in code
    assert (
        "            elif x:\n                replica.step()\n            else:\n                replica.step()\n"
        in code
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, horovod.torch as hvd\n",
        "import horovod.torch as hvd, torch\n",
        "import torch\ntry:\n    import horovod.torch as hvd\nexcept ImportError:\n    hvd = None\n",
    ],
)
def test_hvdtrain_is_imported_however_horovod_was(imports):
    code, remarks = moved(changed("import torch\nimport horovod.torch as hvd\n", imports))
    assert (remarks, "horovod" in code) == ([], False)
    assert "import hvdtrain\n" in code
    assert "import torch\n" in code


def test_each_function_that_imports_horovod_imports_hvdtrain():
    before, after = SCRIPT.split("hvd.init()\n")
    inside = "".join(f"    {line}\n" for line in after.splitlines())
    name = "import horovod.torch as hvd\n"
    script = f"{before.replace(name, '')}def pin():\n    {name}    set(hvd.rank())\ndef main():\n    {name}    hvd.init()\n{inside}"
    code, remarks = moved(script)
    assert remarks == []
    assert "    import hvdtrain\n    with hvdtrain.init() as backend:" in code


def test_torch_cat_is_written_only_where_torch_is_torch():
    script = changed("print(loss)", "hvd.allgather(loss)").replace("import torch\n", "import torch as th\n")
    code, remarks = moved(script)
    assert "hvd.allgather(loss)" in code
    assert [(line, "where the file has `import torch`" in text) for line, text, yours in remarks if yours] == [
        (22, True)
    ]


@pytest.mark.parametrize("quote", ['"', "'", '"""'])
def test_a_text_in_an_f_string_has_the_other_quote(quote):
    code, _ = moved(changed("print(loss)", f"print(f{quote}{{hvd.allreduce(loss)}} {{hvd.nccl_built()}}{quote})"))
    other = '"' if quote == "'" else "'"
    assert f"backend.all_reduce(loss, {other}mean{other})" in code
    assert f"backend.engine == {other}nccl{other}" in code


def test_clipping_a_part_of_the_model_is_not_clipping_the_model():
    clipped = "clip_grad_norm_(model.head.parameters(), 1.0)\n        optimizer.step()"
    code, remarks = moved(changed("optimizer.step()", clipped))
    assert "replica.reduce_gradients()\n            clip_grad_norm_(model.head.parameters(), 1.0)" in code
    assert [yours for _, _, yours in remarks] == [False]


def test_functions_share_what_main_makes():
    script = """\
import torch
from horovod.torch import init, rank, DistributedOptimizer


def train(model, optimizer, batches):
    for x, y in batches:
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()


def main():
    \"\"\"The program.\"\"\"
    init()
    optimizer = DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    train(net, optimizer, batches)
    return rank()
"""
    code, remarks = moved(script)
    assert remarks == []
    assert '    """The program."""\n    global replica\n' in code
    assert 'with hvdtrain.init(device="cpu") as backend:\n' in code
    assert "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n        replica = backend.replicate(net.to(" in code


def test_names_that_the_script_has_are_left_to_it():
    code, _ = moved(changed("        print(loss)", "        backend, replica = 1, 2"))
    assert "as hvd_backend:" in code
    assert "hvd_replica.step()" in code


def test_what_rank_0_loads_before_the_broadcast_reaches_the_others():
    load = "if hvd.rank() == 0:\n    model.load_state_dict(torch.load('c'))\n"
    code, _ = moved(changed("hvd.broadcast_parameters", f"{load}hvd.broadcast_parameters"))
    assert code.index("load_state_dict") < code.index("backend.replicate")


@pytest.mark.parametrize(
    ("old", "new", "line", "word"),
    [
        ("hvd.init()", "if fast:\n    hvd.init()", 5, "stands under a condition"),
        ("hvd.init()", "hvd.init()\nhvd.init()", 5, "called more than once"),
        ("optimizer = hvd.DistributedOptimizer(", "optimizer = other(", 4, "no hvd.DistributedOptimizer"),
        ("hvd.init()", "start()", 1, "not a statement of this file"),
        ("model.named_parameters())", "model.named_parameters(), op=hvd.Sum)", 10, "op=hvd.Sum"),
        ("model.named_parameters())", "model.named_parameters(), backward_passes_per_step=2)", 10, "accumulate"),
        ("root_rank=0)\n\n", "root_rank=1)\n\n", 12, "root_rank=1"),
        ("loss.backward()", "for part in parts: part.backward()", 10, "no loss.backward()"),
        ("loss.backward()", "loss.backward()\n        other.backward()", 21, "several backward passes"),
        (
            "for x, y in loader:\n        optimizer.zero_grad()\n        loss = criterion(model(x), y)",
            "for x in loader:\n        loss = model(**x)",
            18,
            "how many samples",
        ),
        ("loss.backward()", "loss.backward(torch.ones(()))", 19, "with arguments"),
        ("        optimizer.step()", "        if x:\n            optimizer.step()", 21, "accumulate"),
        ("optimizer.step()", "opt.step()", 20, "opt.step(): if this steps optimizer"),
        ("print(loss)", "hvd.alltoall(t)", 22, "hvd.alltoall"),
        ("print(loss)", "f(hvd.size)", 22, "hvd.size"),
        ("print(loss)", "hvd.allreduce(t, op=op)", 22, "hvd.allreduce"),
        ("import torch\n", "import torch\nimport horovod.tensorflow as tf\n", 2, "TensorFlow"),
        (
            "        optimizer.step()",
            "        if x:\n            pass\n        else:\n            optimizer.step()",
            23,
            "may be left out",
        ),
        (
            "        optimizer.step()",
            "        if x:\n            continue\n        optimizer.step()",
            22,
            "between backward() and step()",
        ),
        ("hvd.init()", "hvd.init([0, 1])", 4, "hvd.init([0, 1])"),
        ("print(loss)", "report(hvd)", 22, "hvd itself is used here"),
        ("print(loss)", "print(hvd is None)", 22, "hvd itself is used here"),
        (
            "hvd.broadcast_p",
            "hvd.broadcast_parameters(teacher.state_dict())\nhvd.broadcast_p",
            11,
            "hvd.broadcast_parameters",
        ),
        (
            "hvd.broadcast_p",
            "hvd.broadcast_optimizer_state(other, 0)\nhvd.broadcast_p",
            11,
            "hvd.broadcast_optimizer_state",
        ),
        (
            "optimizer = hvd",
            "hvd.broadcast_parameters({'scale': s}, 0)\noptimizer = hvd",
            10,
            "hvd.broadcast_parameters",
        ),
        (
            "for x, y in loader:\n        optimizer.zero_grad()\n        loss = criterion(model(x), y)",
            "for i, x in enumerate(loader):\n        loss = model(x)",
            18,
            "how many samples",
        ),
        (
            "for x, y in loader:\n        optimizer.zero_grad()\n        loss = criterion(model(x), y)",
            "for i, (x, y) in zip(range(9), loader):\n        loss = model(x.cuda())",
            18,
            "how many samples",
        ),
        ("optimizer.step()", "optimizer.step(closure)", 20, "without a closure"),
        (
            "loss.backward()",
            "if fast:\n            optimizer.synchronize()\n        loss.backward()",
            20,
            "optimizer.synchronize()",
        ),
        (
            "    if hvd.rank",
            "    for x, y in rest:\n        f(x).backward()\n        opt.step()\n    if hvd.rank",
            23,
            "opt.step(): if this steps optimizer",
        ),
    ],
)
def test_what_cannot_be_translated_is_named_with_its_line(old, new, line, word):
    _, remarks = moved(changed(old, new))
    told = [(line, text) for line, text, yours in remarks if yours]
    assert [at for at, text in told if word in text] == [line]


def test_what_has_no_effect_any_more_is_said_and_the_script_still_runs():
    given = "model.named_parameters(), compression=hvd.Compression.fp16, op=hvd.Adasum if a else hvd.Average)"
    _, remarks = moved(changed("model.named_parameters())", given))
    assert [(line, yours) for line, _, yours in remarks] == [(10, False), (10, False)]


INITS = """\
import torch
import horovod.torch as hvd


def setup():
    hvd.init()
    seed()


class Program:
    def __init__(self):
        self.model = Net()
        self.optimizer = hvd.DistributedOptimizer(torch.optim.SGD(self.model.parameters(), lr=hvd.size()))

    def train(self, batches):
        for x, y in batches:
            loss = criterion(self.model(x), y)
            loss.backward()
            self.optimizer.step()


def main():
    setup()
    Program().train(batches)
"""


def test_a_function_that_only_begins_is_no_place_for_a_block_around_the_work():
    code, remarks = moved(INITS)
    assert "import hvdtrain.horovod as hvd" in code
    assert [(line, "function that ends before the work" in text) for line, text, _ in remarks] == [(6, True)]


def test_an_object_that_begins_and_is_trained_later_is_no_place_either():
    script = INITS.replace("        self.model = Net()", "        hvd.init()\n        self.model = Net()")
    _, remarks = moved(script.replace("    hvd.init()\n    seed()", "    seed()"))
    assert [(line, "function that ends before the work" in text) for line, text, _ in remarks] == [(11, True)]


def test_work_in_a_class_that_is_made_after_init_is_inside_the_block():
    code, remarks = moved(
        INITS.replace("    setup()\n    Prog", "    hvd.init()\n    Prog").replace(
            "    hvd.init()\n    seed()", "    seed()"
        )
    )
    assert remarks == []
    assert "self.replica = backend.replicate(self.model.to(backend.device), self.optimizer)" in code
    assert "self.replica.backward(loss, samples=len(x))\n            self.replica.step()" in code
    assert 'def main():\n    global backend\n    with hvdtrain.init(device="cpu") as backend:' in code


@pytest.mark.parametrize(
    "source", [OWN, "", "print(1)\n", "# horovodrun\nfrom .horovod import torch\nimport my.horovod\n"]
)
def test_what_has_nothing_of_horovods_is_left_as_it_is_without_a_word(source):
    module = cst.parse_module(source)
    new, remarks = own_loop(module)
    assert (new.code, remarks) == (source, [])
