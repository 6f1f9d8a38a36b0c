"""cot_length.png: the quantiles of a step by hand, and a resumed run that draws the whole run."""

import struct

import pytest
import torch

from rlmt.callbacks import CoTLength
from rlmt.errors import UserError


def test_points_are_the_quantiles_of_each_step(world, tmp_path):
    lengths = CoTLength(every_n_steps=0)
    world.fit(tmp_path, [lengths], steps=2)
    state = lengths.state_dict()
    # thoughts of 10 to 60 tokens: rank 0.05 * 5 = 0.25 between 10 and 20, and so on; responses of 0 to 5
    assert state["steps"] == [0, 1]
    assert state["lengths"]["thought"] == [pytest.approx([12.5, 22.5, 35.0, 47.5, 57.5])] * 2
    assert state["lengths"]["response"] == [pytest.approx([0.25, 1.25, 2.5, 3.75, 4.75])] * 2
    head = (tmp_path / "cot_length.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:]) == (1650, 630)


def test_resumed_run_keeps_its_points_through_a_safe_checkpoint(tmp_path):
    state = {"steps": [0], "lengths": {"thought": [[1.0, 2.0, 3.0, 4.0, 5.0]], "response": [[0.0] * 5]}}
    torch.save(state, tmp_path / "state.pt")
    lengths = CoTLength()
    lengths.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert lengths.state_dict() == state
    assert lengths.draw(tmp_path / "one.png") == tmp_path / "one.png"


def test_nothing_is_drawn_before_the_first_step(tmp_path):
    assert CoTLength().draw(tmp_path / "none.png") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [-1, 1.5])
def test_interval_out_of_range_is_refused(value):
    with pytest.raises(UserError, match="CoTLength"):
        CoTLength(every_n_steps=value)
