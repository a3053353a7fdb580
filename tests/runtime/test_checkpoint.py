"""Checkpoints: whole or absent, checked byte by byte, exact."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diptych import checkpoint
from diptych.errors import DataError, UsageError

FILES = ["model.safetensors", "optim.safetensors", "state.json", "sha256.json"]


def modules(seed=0):
    torch.manual_seed(seed)
    return {"net": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "head": nn.Linear(4, 2)}


def write(folder, step, seed=None, optim=None, **state):
    tensors = {n: m.state_dict() for n, m in modules(step if seed is None else seed).items()}
    checkpoint.save(folder, checkpoint.name_of(step), tensors, optim or {}, {"step": step, **state})


def names(folder):
    return sorted(entry.name for entry in (folder / "checkpoints").iterdir())


def newest(folder):
    found, skipped = checkpoint.newest_intact(folder)
    return (found.name if found else None), skipped


def test_weights_optimizers_and_schedules_come_back_bit_by_bit(tmp_path):
    net = modules()["net"]
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.8, 0.9), amsgrad=True)
    schedules = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3]),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 100),
    ]
    for _ in range(3):
        net(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    stored = [optimizer.state_dict(), *(schedule.state_dict() for schedule in schedules)]
    checkpoint.save(tmp_path, "step-00000003", {"net": net.state_dict()}, stored, {"a": [1, None]})
    found, skipped = checkpoint.newest_intact(tmp_path)
    assert skipped == []
    assert found.state == {"a": [1, None]}
    for key, tensor in net.state_dict().items():
        assert torch.equal(found.tensors["net"][key], tensor)
    assert_same(found.optim, stored)
    assert found.optim[1]["best"] == math.inf
    assert isinstance(found.optim[0]["param_groups"][0]["betas"], tuple)


def assert_same(one, other):
    if isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            assert_same(one[key], other[key])
    elif isinstance(other, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other
        assert type(one) is type(other)


def test_tied_and_sliced_tensors_are_stored_each_on_its_own(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net.register_buffer("part", torch.arange(100.0)[10:20:2])
    net.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    checkpoint.write_tensors(tmp_path / "a.safetensors", {"net": net.state_dict()})
    found = checkpoint.read_tensors(tmp_path / "a.safetensors")["net"]
    assert torch.equal(found["1.weight"], net[0].weight)
    assert found["part"].tolist() == [10, 12, 14, 16, 18]
    assert torch.equal(found["turned"], net.turned)
    assert (tmp_path / "a.safetensors").stat().st_size < 1500


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "shortened", "changed", "empty"])
def test_a_checkpoint_damaged_in_any_file_is_named_and_the_one_before_is_used(
    file, damage, tmp_path
):
    write(tmp_path, 10)
    write(tmp_path, 20)
    target = tmp_path / "checkpoints/step-00000020" / file
    content = target.read_bytes()
    if damage == "missing":
        target.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        target.write_bytes({"shortened": content[:-2], "changed": changed, "empty": b""}[damage])
    name, (line,) = newest(tmp_path)
    assert name == "step-00000010"
    assert "step-00000020: damaged checkpoint" in line
    assert file in line or file == "sha256.json"


def test_a_digest_of_the_wrong_form_is_damage_not_a_crash(tmp_path):
    write(tmp_path, 10)
    for text in ("[]", "3", '{"state.json": 3}', "\x00\xff"):
        (tmp_path / "checkpoints/step-00000010/sha256.json").write_text(text)
        name, (line,) = newest(tmp_path)
        assert name is None
        assert "damaged" in line


class Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True], ids=["new", "same step"])
def test_a_process_killed_at_any_point_of_writing_leaves_a_checkpoint(again, tmp_path, monkeypatch):
    """The writer dies, without its clean-up, at each call that touches the disk."""
    calls = {"count": 0, "stop": None}

    def counted(real):
        def call(*arguments, **keywords):
            calls["count"] += 1
            if calls["count"] == calls["stop"]:
                raise Killed
            return real(*arguments, **keywords)

        return call

    for name in ("fsync", "replace", "rename", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    real_rmtree = checkpoint.shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)
    step = 10 if again else 20
    stops = 0
    for stop in range(1, 100):
        folder = tmp_path / str(stop)
        calls.update(count=0, stop=None)
        write(folder, 10)
        calls.update(count=0, stop=stop)
        try:
            write(folder, step, seed=20, new=True)
            checkpoint.prune(folder, None, newest=1)
        except Killed:
            stops += 1
        else:
            break
        calls.update(count=0, stop=None)
        found, skipped = checkpoint.newest_intact(folder)
        assert skipped == []
        assert found is not None
        assert found.name in ("step-00000010", f"step-{step:08d}")
        expected = modules(20 if found.state.get("new") else 10)["net"].state_dict()
        for key, tensor in expected.items():
            assert torch.equal(found.tensors["net"][key], tensor)
    assert stops >= 8
    calls.update(count=0, stop=None)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", real_rmtree)
    checkpoint.newest_intact(tmp_path / "1")
    assert not [name for name in names(tmp_path / "1") if name.startswith(".")]


def test_the_two_newest_and_the_best_are_kept_and_a_finished_fit_keeps_the_best(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
        if step == 10:
            checkpoint.point(tmp_path, "best", "step-00000010")
        checkpoint.prune(tmp_path, "step-00000010")
    kept = ["step-00000010", "step-00000030", "step-00000040"]
    assert names(tmp_path) == ["best", "last", *kept]
    assert checkpoint.best(tmp_path).name == "step-00000010"
    assert checkpoint.best(tmp_path, "last").name == "step-00000040"
    checkpoint.finalize(tmp_path)
    assert names(tmp_path) == ["best", "last", "step-00000010"]
    assert checkpoint.best(tmp_path, "last").name == "step-00000010"


def test_without_a_best_checkpoint_the_last_is_best(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 20)
    assert checkpoint.best(tmp_path).name == "step-00000020"
    (tmp_path / "checkpoints/best").write_text("../../elsewhere")
    assert checkpoint.best(tmp_path).name == "step-00000020"
    with pytest.raises(DataError, match="no checkpoint"):
        checkpoint.best(tmp_path / "other")


def test_modules_are_loaded_strictly_and_the_misfit_is_named(tmp_path):
    write(tmp_path, 1, seed=5)
    own = modules(9)
    checkpoint.load_modules(tmp_path, {"net": own["net"]})
    assert torch.equal(own["net"][0].weight, modules(5)["net"][0].weight)
    with pytest.raises(DataError, match=r"'weight' has shape \(2, 4\), the model's is \(7, 4\)"):
        checkpoint.load_modules(tmp_path, {"head": nn.Linear(4, 7)})
    with pytest.raises(DataError, match=r"'bias' is unknown"):
        checkpoint.load_modules(tmp_path, {"head": nn.Linear(4, 2, bias=False)})
    with pytest.raises(DataError, match="'tail' does not fit: no such module"):
        checkpoint.load_modules(tmp_path, {"tail": nn.Linear(4, 2)})


def test_a_damaged_best_checkpoint_is_refused_by_name(tmp_path):
    write(tmp_path, 1)
    file = tmp_path / "checkpoints/step-00000001/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"step-00000001.*model\.safetensors differs"):
        checkpoint.best_tensors(tmp_path)


def test_initial_weights_are_copied_strictly_or_in_part():
    source, own = modules(1), modules(2)
    tensors = {name: module.state_dict() for name, module in source.items()}
    before = own["head"].weight.clone()
    lines = checkpoint.init_from(own, tensors, carries=("net",), partial=False)
    assert lines == ["net: 7 of 7 tensors matched", "head: not taken: as initialised"]
    assert torch.equal(own["net"][0].weight, source["net"][0].weight)
    assert torch.equal(own["head"].weight, before)
    own["head"] = nn.Linear(4, 3)
    with pytest.raises(UsageError, match=r"2 tensors do not fit.*--init-partial"):
        checkpoint.init_from(own, tensors, carries=(), partial=False)
    lines = checkpoint.init_from(own, tensors, carries=(), partial=True)
    assert "head: 0 of 2 tensors matched" in lines
    assert any("'weight' has shape (2, 4), the model's is (3, 4): left out" in x for x in lines)


def test_initial_weights_without_a_common_module_are_refused():
    with pytest.raises(UsageError, match="no module in common"):
        checkpoint.init_from(modules(), {"other": {}}, carries=(), partial=True)
    with pytest.raises(UsageError, match="no module other to carry"):
        checkpoint.init_from(modules(), {"net": {}}, carries=("other",), partial=True)


def test_a_file_that_is_no_safetensors_or_has_other_names_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        checkpoint.read_tensors(file)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="'weight' is not named module/parameter"):
        checkpoint.read_tensors(file)


def test_state_that_would_need_pickle_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="optim/a is a object"):
        checkpoint.save(tmp_path, "step-00000001", {}, {"a": object()}, {})
    with pytest.raises(TypeError, match="keep state in buffers"):
        checkpoint.save(tmp_path, "step-00000001", {"net": {"extra": 3}}, {}, {})
    with pytest.raises(ValueError, match="'/' separates"):
        checkpoint.save(tmp_path, "step-00000001", {"a/b": {"x": torch.zeros(1)}}, {}, {})
    assert newest(tmp_path) == (None, [])


def test_a_snapshot_is_not_changed_by_later_steps():
    net = nn.Linear(2, 2)
    taken = checkpoint.snapshot({"a": [net.weight, 3], "b": (net.weight[0],)})
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1.0)
    assert torch.equal(taken["a"][0], before)
    assert torch.equal(taken["b"][0], before[0])


def test_the_state_is_json_without_nan(tmp_path):
    write(tmp_path, 1, optim={"best": math.nan, "low": -math.inf})
    text = (tmp_path / "checkpoints/step-00000001/state.json").read_text()

    def refuse(word):
        raise AssertionError(word)

    json.loads(text, parse_constant=refuse)
    found, _ = checkpoint.newest_intact(tmp_path)
    assert math.isnan(found.optim["best"])
    assert found.optim["low"] == -math.inf
