"""The trace is a whole Chrome trace, and says what was done under which name."""

import json

import pytest
import torch

from hvdtrain.errors import OutputError


def test_the_trace_names_every_operation_and_nothing_outside_it(one_rank, tmp_path):
    hvd, file = one_rank, tmp_path / "trace.json"
    hvd.allreduce(torch.ones(2), name="before")
    hvd.start_timeline(file, mark_cycles=True)
    hvd.allreduce(torch.ones(2, 3), name="mine")
    hvd.broadcast_object({"a": 1})
    hvd.stop_timeline()
    hvd.allreduce(torch.ones(2), name="after")
    events = json.loads(file.read_text())
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert list(lanes) == ["mine", "broadcast_object"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["tid"]) for event in spans] == [
        ("NEGOTIATE_ALLREDUCE", lanes["mine"]),
        ("ALLREDUCE", lanes["mine"]),
        ("NEGOTIATE_BROADCAST_OBJECT", lanes["broadcast_object"]),
        ("BROADCAST_OBJECT", lanes["broadcast_object"]),
    ]
    assert all(event["dur"] >= 0 for event in spans)
    assert spans[0]["args"]["tensors"] == ["float32[2, 3]"]
    assert len([event for event in events if event["name"] == "CYCLE_START"]) == 2


def test_what_cannot_be_recorded_is_said(one_rank, tmp_path):
    hvd = one_rank
    hvd.stop_timeline()  # nothing is recorded: nothing to complete
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        hvd.start_timeline(tmp_path / "gone" / "trace.json")
    hvd.start_timeline(tmp_path / "one.json")
    with pytest.raises(ValueError, match="stop_timeline"):
        hvd.start_timeline(tmp_path / "two.json")
    hvd.stop_timeline()


def test_a_full_disk_ends_the_trace_and_not_the_training(one_rank, caplog):
    hvd = one_rank
    hvd.start_timeline("/dev/full")
    for i in range(200):
        assert hvd.allreduce(torch.ones(2), name=f"x{i}").tolist() == [1, 1]
    hvd.stop_timeline()
    assert "the timeline ends here" in caplog.text


def test_before_init_it_is_refused(tmp_path):
    import hvdtrain.horovod as hvd

    with pytest.raises(ValueError, match=r"hvd\.init"):
        hvd.start_timeline(tmp_path / "trace.json")
