"""States of a training run: cut ones are recognised, and the whole one beside them is named."""

import pytest
import torch
from torch import nn

from diffsynth.errors import TrainingError
from diffsynth_train.checkpoint import drop_old, last_checkpoint, load_state, save_state, step_folder
from killed import killed_at_every_write

CPU = torch.device("cpu")


def network(width=3):
    module = nn.Linear(width, 2)
    return module, torch.optim.AdamW(module.parameters())


def save(root, step, width=3):
    module, optimizer = network(width)
    folder = step_folder(root, step)
    save_state(
        folder,
        step=step,
        seed=0,
        parameters=module.named_parameters(),
        optimizer=optimizer,
        ema=None,
        device=CPU,
    )
    return folder


def load(folder, width=3):
    module, optimizer = network(width)
    return load_state(folder, seed=0, parameters=module.named_parameters(), optimizer=optimizer, device=CPU)[0]


@pytest.fixture
def two(tmp_path):
    return save(tmp_path, 1), save(tmp_path, 2)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_newest_state_that_is_cut_names_the_whole_one(two, tmp_path, keep):
    older, newest = two
    content = (newest / "state.pt").read_bytes()
    (newest / "state.pt").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(TrainingError, match=r"step-0000002/state\.pt is empty or cut off.*--resume .*step-0000001"):
        last_checkpoint(tmp_path)
    with pytest.raises(TrainingError, match=r"step-0000002/state\.pt is damaged: .*--resume .*step-0000001"):
        load(newest)
    assert load(older) == 1
    drop_old(tmp_path, 1)
    assert load(older) == 1  # a state that cannot be read is none to keep instead


def test_the_only_state_is_cut(tmp_path):
    (save(tmp_path, 1) / "state.pt").write_bytes(b"")
    with pytest.raises(TrainingError, match="empty or cut off. There is no other whole checkpoint"):
        last_checkpoint(tmp_path)


def test_bytes_that_changed_on_the_disk(two):
    _, newest = two
    content = bytearray((newest / "state.pt").read_bytes())
    start = content.index(b"\x80\x02")  # the first bytes of the pickle in the archive
    content[start : start + 40] = b"\xff" * 40
    (newest / "state.pt").write_bytes(content)
    with pytest.raises(TrainingError, match="is damaged"):
        load(newest)


def test_something_else_under_that_name(two):
    _, newest = two
    torch.save({"step": 1}, newest / "state.pt")
    with pytest.raises(TrainingError, match="no state of a training run: it holds no ema, optimizer"):
        load(newest)
    torch.save([1], newest / "state.pt")
    with pytest.raises(TrainingError, match="it holds a list"):
        load(newest)


def test_networks_of_another_size(two):
    with pytest.raises(TrainingError, match=r"'weight' is \(2, 3\) there and \(2, 4\) here"):
        load(two[1], width=4)


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.RMSprop])
def test_another_optimizer(two, other):
    module, _ = network()
    before, optimizer = module.weight.clone(), other(module.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match=f"trained with AdamW, the recipe has {other.__name__}: resume with"):
        load_state(two[1], seed=0, parameters=module.named_parameters(), optimizer=optimizer, device=CPU)
    assert torch.equal(module.weight, before)


def test_settings_of_the_optimizer_are_those_of_the_recipe(two):
    module, _ = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.25, betas=(0.5, 0.75))
    load_state(two[1], seed=0, parameters=module.named_parameters(), optimizer=optimizer, device=CPU)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.5, 0.75))
    assert group["params"] == list(module.parameters())


def test_a_kill_while_a_state_is_written(two, tmp_path):
    for _ in killed_at_every_write(lambda: save(tmp_path, 2)):
        assert load(last_checkpoint(tmp_path)) == 2
    for _ in killed_at_every_write(lambda: save(tmp_path, 3)):
        assert load(last_checkpoint(tmp_path)) in (2, 3)
