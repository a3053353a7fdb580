import copy
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from diptych_contrast.errors import ContrastInputError
from diptych_contrast.state import (
    CrossBatchMemory,
    KeyQueue,
    MomentumEncoder,
    Temperature,
    cosine_momentum,
)


def descend(temperature, gradient_of_scale, steps=1, rate=0.5):
    """Descend along a loss whose derivative by log(1/tau) has the given sign."""
    for _ in range(steps):
        temperature.zero_grad()
        (-gradient_of_scale * torch.log(temperature())).backward()
        with torch.no_grad():
            temperature.log_scale -= rate * temperature.log_scale.grad
    return temperature().item()


class TestTemperature:
    @pytest.mark.parametrize("tau", [0.01, 0.07, 0.5, 1.0])
    def test_the_temperature_is_the_one_given(self, tau):
        assert Temperature(tau)().item() == pytest.approx(tau, rel=1e-6)
        assert not list(Temperature(tau).parameters())

    def test_a_learned_temperature_rests_at_its_bound_and_comes_back(self):
        temperature = Temperature(0.07, learnable=True)
        assert descend(temperature, gradient_of_scale=-1.0, steps=50) == pytest.approx(0.01)
        overshoot = temperature.log_scale.item()
        assert overshoot < math.log(100) + 0.5, "the gradient ran on beyond the bound"
        assert descend(temperature, gradient_of_scale=1.0, steps=50) == pytest.approx(1.0)
        assert descend(temperature, gradient_of_scale=-1.0, steps=3) < 1.0

    @pytest.mark.parametrize(("init", "outwards"), [(0.01, -1.0), (1.0, 1.0)])
    def test_at_a_bound_the_gradient_points_only_inwards(self, init, outwards):
        temperature = Temperature(init, learnable=True)
        for sign, expected in ((outwards, 0.0), (-outwards, -outwards)):
            temperature.zero_grad()
            (-sign * torch.log(temperature())).backward()
            assert temperature.log_scale.grad.item() == pytest.approx(expected)

    def test_the_derivative_within_the_bounds_is_exact_to_second_order(self):
        temperature = Temperature(0.3, learnable=True).double()

        def forward(log_scale):
            return torch.func.functional_call(temperature, {"log_scale": log_scale})

        point = temperature.log_scale.detach().requires_grad_()
        assert torch.autograd.gradcheck(forward, point)
        assert torch.autograd.gradgradcheck(forward, point)
        assert torch.func.grad(forward)(point).item() == pytest.approx(-0.3, rel=1e-6)

    def test_half_precision_weights_give_a_single_precision_temperature(self):
        assert Temperature(0.07, learnable=True).half()().dtype == torch.float32

    @pytest.mark.parametrize(
        ("arguments", "argument"),
        [
            ({"init": 0.0}, "init"),
            ({"init": -1.0}, "init"),
            ({"init": math.nan}, "init"),
            ({"init": 2.0}, "init"),
            ({"init": 0.5, "min": 0.0}, "min"),
            ({"init": 0.5, "min": 0.6, "max": 0.4}, "min"),
            ({"init": 0.5, "max": math.inf}, "min"),
        ],
    )
    def test_an_impossible_temperature_is_refused(self, arguments, argument):
        with pytest.raises(ContrastInputError) as caught:
            Temperature(**arguments)
        assert caught.value.argument == argument

    def test_a_state_of_a_later_version_is_refused_by_name(self):
        state = Temperature(0.1).state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        state["version"] += 1
        model = nn.ModuleDict({"tau": Temperature(0.2)})
        with pytest.raises(ContrastInputError, match=r"tau.version' is 2.*update"):
            model.load_state_dict({f"tau.{name}": value for name, value in state.items()})

    def test_the_printed_module_names_its_bounds(self):
        assert "min=0.01, max=1.0, learnable=True" in repr(Temperature(0.1, learnable=True))


def rows(start, count, dim=2):
    return torch.arange(start, start + count).float()[:, None].expand(count, dim).clone()


class TestKeyQueue:
    @hypothesis.given(
        size=st.integers(1, 9), batches=st.lists(st.integers(0, 9), min_size=1, max_size=8)
    )
    @hypothesis.settings(max_examples=60, deadline=None)
    def test_the_queue_holds_the_newest_keys_whatever_the_batches(self, size, batches):
        queue = KeyQueue(size, 2, labels=True)
        seen = []
        for count in (min(each, size) for each in batches):
            keys = rows(len(seen), count)
            queue.enqueue(keys, labels=keys[:, 0].long())
            seen += list(range(len(seen), len(seen) + count))
        newest = seen[-size:]
        assert sorted(queue.stored()[:, 0].tolist()) == newest
        assert sorted(queue.labels[queue.valid()].tolist()) == newest
        assert int(queue.index) == len(seen) % size

    def test_a_partly_filled_queue_offers_no_empty_slot(self):
        queue = KeyQueue(5, 2)
        assert queue.stored().shape == (0, 2)
        queue.enqueue(rows(1, 3))
        assert queue.valid().tolist() == [True] * 3 + [False] * 2
        assert torch.equal(queue.stored(), rows(1, 3))

    def test_a_resumed_queue_goes_on_bit_identically(self):
        torch.manual_seed(0)
        queue = KeyQueue(7, 3, labels=True, ids=True, steps=True)

        def go_on(queue, generator):
            for step in range(4):
                keys = torch.randn(3, 3, generator=generator)
                queue.enqueue(keys, labels=torch.arange(3), ids=torch.arange(3) + step, step=step)

        go_on(queue, torch.Generator().manual_seed(1))
        resumed = KeyQueue(7, 3, labels=True, ids=True, steps=True)
        resumed.load_state_dict(copy.deepcopy(queue.state_dict()))
        for each in (queue, resumed):
            go_on(each, torch.Generator().manual_seed(2))
        assert all(
            torch.equal(value, resumed.state_dict()[name])
            for name, value in queue.state_dict().items()
        )

    def test_stored_keys_carry_no_graph_and_do_not_follow_the_batch(self):
        keys = torch.ones(2, 2, requires_grad=True)
        queue = KeyQueue(4, 2)
        queue.enqueue(keys)
        with torch.no_grad():
            keys.zero_()
        assert not queue.keys.requires_grad
        assert torch.equal(queue.stored(), torch.ones(2, 2))

    def test_half_precision_keys_are_stored_in_the_queues_dtype(self):
        queue = KeyQueue(4, 2)
        queue.enqueue(rows(1, 2).bfloat16())
        assert torch.equal(queue.stored(), rows(1, 2))

    def test_random_keys_are_full_unit_vectors_of_the_generator(self):
        first, second = (
            KeyQueue(6, 3, init="random", generator=torch.Generator().manual_seed(4))
            for _ in range(2)
        )
        assert bool(first.valid().all())
        assert torch.equal(first.keys, second.keys)
        torch.testing.assert_close(first.keys.norm(dim=1), torch.ones(6))

    @pytest.mark.parametrize(
        ("arguments", "argument"),
        [
            ({"size": 0, "dim": 2}, "size"),
            ({"size": 2, "dim": 0}, "dim"),
            ({"size": 2, "dim": 2, "init": "zeros"}, "init"),
            ({"size": 2, "dim": 2, "init": "random"}, "generator"),
        ],
    )
    def test_an_impossible_queue_is_refused(self, arguments, argument):
        with pytest.raises(ContrastInputError) as caught:
            KeyQueue(**arguments)
        assert caught.value.argument == argument

    @pytest.mark.parametrize(
        ("keys", "marks", "argument", "words"),
        [
            (rows(0, 4), {"labels": torch.zeros(4).long()}, "keys", "has 4 rows, the queue has 3"),
            (rows(0, 2, dim=5), {"labels": torch.zeros(2).long()}, "keys", "holds rows of 2"),
            (rows(0, 2)[0], {"labels": torch.zeros(2).long()}, "keys", r"has shape \(2,\)"),
            (rows(0, 2), {}, "labels", "is missing"),
            (rows(0, 2), {"labels": torch.zeros(3).long()}, "labels", "pass 2 integers"),
            (rows(0, 2), {"labels": torch.zeros(2)}, "labels", "float32"),
            (rows(0, 2), {"labels": torch.zeros(2).long(), "step": 1}, "step", "steps=True"),
        ],
    )
    def test_a_batch_that_does_not_fit_is_refused_and_stores_nothing(
        self, keys, marks, argument, words
    ):
        queue = KeyQueue(3, 2, labels=True)
        before = copy.deepcopy(queue.state_dict())
        with pytest.raises(ContrastInputError, match=words) as caught:
            queue.enqueue(keys, **marks)
        assert caught.value.argument == argument
        assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


def small_model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class TestMomentumEncoder:
    def test_after_100_updates_the_weights_are_the_closed_form(self):
        torch.manual_seed(0)
        model = small_model()
        teacher = MomentumEncoder(model, m=0.97)
        start = [each.double().clone() for each in teacher.encoder.parameters()]
        with torch.no_grad():
            for each in model.parameters():
                each.normal_()
        for step in range(100):
            teacher.update(step)
        kept = 0.97**100
        for own, first, online in zip(
            teacher.encoder.parameters(), start, model.parameters(), strict=True
        ):
            expected = kept * first + (1 - kept) * online.double()
            torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-6)

    def test_a_second_update_of_one_step_changes_nothing_also_after_loading(self):
        model = small_model()
        teacher = MomentumEncoder(model, m=0.5)
        with torch.no_grad():
            model[0].weight += 1
        teacher.update(3)
        once = teacher.encoder[0].weight.clone()
        teacher.update(3)
        resumed = MomentumEncoder(model, m=0.5)
        resumed.load_state_dict(teacher.state_dict())
        resumed.update(3)
        assert torch.equal(teacher.encoder[0].weight, once)
        assert torch.equal(resumed.encoder[0].weight, once)
        teacher.update(4)
        assert not torch.equal(teacher.encoder[0].weight, once)

    @pytest.mark.parametrize(("buffers", "share"), [("copy", 1.0), ("ema", 0.25)])
    def test_buffers_are_copied_or_averaged_and_counters_always_copied(self, buffers, share):
        model = small_model()
        teacher = MomentumEncoder(model, m=0.75, buffers=buffers)
        model[1].running_mean.fill_(8.0)
        model[1].num_batches_tracked.fill_(11)
        teacher.update(0)
        assert torch.equal(teacher.encoder[1].running_mean, torch.full((4,), 8.0 * share))
        assert int(teacher.encoder[1].num_batches_tracked) == 11

    def test_the_copy_is_frozen_and_the_model_is_not_part_of_its_state(self):
        model = small_model()
        teacher = MomentumEncoder(model)
        assert not any(each.requires_grad for each in teacher.parameters())
        assert all(each.requires_grad for each in model.parameters())
        assert not teacher(torch.randn(5, 3, requires_grad=True)).requires_grad
        assert len(list(teacher.parameters())) == len(list(model.parameters()))
        names = set(teacher.state_dict()) - {"version", "last_step"}
        assert names == {f"encoder.{name}" for name in model.state_dict()}

    def test_the_schedule_decides_the_momentum(self):
        model = nn.Linear(1, 1, bias=False)
        teacher = MomentumEncoder(model, schedule=cosine_momentum(0.5, 1.0, 10))
        with torch.no_grad():
            model.weight.copy_(teacher.encoder.weight + 1)
        start = teacher.encoder.weight.item()
        teacher.update(0)
        assert teacher.encoder.weight.item() == pytest.approx(start + 0.5)
        teacher.update(10)
        assert teacher.encoder.weight.item() == pytest.approx(start + 0.5)

    def test_what_cannot_be_followed_is_refused(self):
        with pytest.raises(ContrastInputError, match=r"momentum of 1\.5"):
            MomentumEncoder(nn.Linear(1, 1), m=1.5)
        with pytest.raises(ContrastInputError, match="pass one of 'copy', 'ema'"):
            MomentumEncoder(nn.Linear(1, 1), buffers="none")
        model = nn.Linear(1, 1)
        teacher = MomentumEncoder(model, schedule=lambda step: 2.0)
        with pytest.raises(ContrastInputError, match=r"'schedule' gives a momentum of 2\.0"):
            teacher.update(0)
        with pytest.raises(ContrastInputError, match="at least 0"):
            teacher.update(-1)
        unscheduled = MomentumEncoder(model)
        del model.bias
        with pytest.raises(ContrastInputError, match=r"gained or lost \['bias'\]"):
            unscheduled.update(0)


class TestCosineMomentum:
    def test_it_starts_and_ends_where_it_says_and_only_rises(self):
        momentum = cosine_momentum(0.99, 1.0, 50)
        values = [momentum(step) for step in range(51)]
        assert values[0] == pytest.approx(0.99)
        assert values[25] == pytest.approx(0.995)
        assert values[50] == momentum(80) == 1.0
        assert values == sorted(values)

    @pytest.mark.parametrize(
        ("arguments", "argument"),
        [((0.9, 1.0, 0), "steps"), ((-0.1, 1.0, 5), "m0"), ((0.9, 1.1, 5), "m1")],
    )
    def test_an_impossible_schedule_is_refused(self, arguments, argument):
        with pytest.raises(ContrastInputError) as caught:
            cosine_momentum(*arguments)
        assert caught.value.argument == argument


@pytest.mark.slow
def test_temperature_and_queue_compile_without_a_graph_break():
    temperature, queue = Temperature(0.07, learnable=True), KeyQueue(24, 2, labels=True)

    def step(keys, labels):
        queue.enqueue(keys, labels=labels)
        return temperature() * queue.valid().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for stored in (16, 24, 24):
        compiled(rows(0, 16), torch.arange(16)).backward()
        assert temperature.log_scale.grad.item() == pytest.approx(-0.07 * stored)
        assert len(queue.stored()) == stored
        temperature.zero_grad()


class TestCrossBatchMemory:
    def memory(self):
        memory = CrossBatchMemory(6, 3, start_step=10)
        z = torch.eye(3)
        memory.enqueue(z, torch.tensor([0, 0, 1]), torch.tensor([5, 6, 7]))
        return memory

    def test_it_gives_nothing_before_its_first_step(self):
        z, labels, ids = self.memory().others(torch.tensor([1]), step=9)
        assert z.shape == (0, 3)
        assert len(labels) == len(ids) == 0

    def test_copies_of_the_batch_and_empty_slots_are_left_out(self):
        z, labels, ids = self.memory().others(torch.tensor([6, 99, -1]), step=10)
        torch.testing.assert_close(z, torch.eye(3)[[0, 2]])
        assert labels.tolist() == [0, 1]
        assert ids.tolist() == [5, 7]
        assert not z.requires_grad

    def test_a_graph_survives_the_next_enqueue(self):
        memory = self.memory()
        x = torch.randn(2, 3, requires_grad=True)
        rows, _, _ = memory.others(torch.tensor([1, 2]), step=10)
        loss = (x @ rows.t()).square().sum()
        memory.enqueue(x.detach(), torch.tensor([0, 1]), torch.tensor([1, 2]))
        loss.backward()
        assert torch.isfinite(x.grad).all()

    def test_drift_compares_with_the_newest_copy(self):
        memory = self.memory()
        now = torch.tensor([[0.0, 1, 0], [0, 1, 0]])
        assert memory.drift(now, torch.tensor([5, 6])) == pytest.approx(0.5)
        memory.enqueue(now[:1], torch.tensor([0]), torch.tensor([5]))
        assert memory.drift(now, torch.tensor([5, 6])) == pytest.approx(1.0)
        assert math.isnan(memory.drift(now, torch.tensor([50, 60])))

    def test_it_resumes_bit_for_bit(self):
        memory, again = self.memory(), CrossBatchMemory(6, 3, start_step=10)
        again.load_state_dict(memory.state_dict())
        for one in (memory, again):
            one.enqueue(2 * torch.eye(3), torch.tensor([2, 2, 2]), torch.tensor([8, 9, 10]))
            one.enqueue(3 * torch.eye(3), torch.tensor([3, 3, 3]), torch.tensor([1, 2, 3]))
        for name, value in memory.state_dict().items():
            assert torch.equal(value, again.state_dict()[name])
        assert memory.others(torch.tensor([0]), step=10)[2].tolist() == [1, 2, 3, 8, 9, 10]
