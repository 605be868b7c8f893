import pytest
from torch import nn

from diffsynth_train.ema import Ema


def test_ema_follows_and_is_put_back():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = Ema(net.named_parameters(), decay=0.5)
    nn.init.ones_(net.weight)
    ema.update(100)
    with ema.applied():
        assert net.weight.item() == 0.5
    assert net.weight.item() == 1.0


def test_ema_starts_fast():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = Ema(net.named_parameters(), decay=0.999)
    nn.init.ones_(net.weight)
    ema.update(0)
    assert ema.state_dict()["weight"].item() == pytest.approx(0.9)
