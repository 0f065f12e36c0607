"""Your own loop, saved and resumed: run it twice, and the second run goes on where the first was stopped.

python examples/own_loop_resume.py runs/own
torchrun --nproc-per-node 2 examples/own_loop_resume.py runs/own --stop-after 100
torchrun --nproc-per-node 2 examples/own_loop_resume.py runs/own
"""

import argparse

import torch
from torch import Tensor, nn

import hvdtrain
from hvdtrain.data.digits import digits

EPOCHS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--stop-after", type=int, metavar="STEPS")
    options = parser.parse_args()
    hvdtrain.seed_everything(0)  # on every rank alike: so are models and data
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    with hvdtrain.init() as backend:
        model.to(backend.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.3)
        replica = backend.replicate(model, optimizer)
        data = digits(train=True)
        loader = backend.loader(data, batch_size=32, shuffle=True)
        checkpoints = hvdtrain.Checkpoints(options.folder, keep=2)
        state = hvdtrain.LoopState(backend, replica, schedule=schedule, loader=loader)

        def rehearsal(model: nn.Module) -> Tensor:
            x, y = next(iter(backend.loader(data, batch_size=2)))
            return nn.functional.cross_entropy(model(x), y)

        with hvdtrain.OwnRandomNumbers(backend):  # dropout differs between ranks
            steps = state.load(checkpoints, rehearsal)
            while loader.epoch < EPOCHS:
                model.train()
                for x, y in loader:
                    loss = nn.functional.cross_entropy(replica.model(x), y)
                    replica.backward(loss, samples=len(x))
                    replica.step()
                    steps += 1
                    if steps % 20 == 0 or steps == options.stop_after:
                        state.save(checkpoints, steps)
                    if steps == options.stop_after:
                        return
                schedule.step()
        if backend.rank == 0:
            norm = float(sum(p.detach().double().square().sum() for p in model.parameters())) ** 0.5
            print(f"{backend.world_size} rank(s), {steps} steps: the parameters' norm is {norm!r}")


if __name__ == "__main__":
    main()
