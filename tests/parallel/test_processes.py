"""Processes keep in step; threads with a store in memory stand for them here."""

import itertools
import logging
import os
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sl_jax.parallel import processes as module
from sl_jax.parallel.interrupts import Terminated
from sl_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from sl_jax.parallel.processes import (
    ALONE,
    ProcessError,
    Processes,
    batch_rows,
    from_everywhere,
    from_local,
    to_everywhere,
    to_local,
)


class Memory:
    """A store that threads share."""

    def __init__(self):
        self.values, self._changed = {}, threading.Condition()

    def put(self, name, value):
        with self._changed:
            self.values[name] = value
            self._changed.notify_all()

    def get(self, name, seconds):
        with self._changed:
            self._changed.wait_for(lambda: name in self.values, seconds)
            return self.values.get(name)

    def delete(self, name):
        with self._changed:
            for known in [n for n in self.values if f"{n}/".startswith(f"{name}/")]:
                del self.values[known]


def run(count, work, store=None):
    """What `work(processes)` returns, or raises, in each of so many processes."""
    store = store or Memory()
    results = [None] * count

    def act(index):
        try:
            results[index] = work(Processes(index, count, store))
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=act, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


@pytest.fixture
def hasty(monkeypatch):
    """Nobody waits for long."""
    monkeypatch.setattr(module, "_LOOK", 0.02)
    monkeypatch.setattr(module, "_SAID", 0.05)
    monkeypatch.setattr(module, "_FAREWELL", 0.3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_get_the_values_of_all_in_order(count):
    def work(processes):
        first = processes.all_gather("first", {"index": processes.index, "no": None})
        second = processes.all_gather("second", [processes.index * 1.5, "text"])
        return first, second, processes.from_main("third", processes.index + 7)

    expected = (
        [{"index": index, "no": None} for index in range(count)],
        [[index * 1.5, "text"] for index in range(count)],
        7,
    )
    assert run(count, work) == [expected] * count


def test_arrays_arrive_to_the_last_bit_and_may_be_large():
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(3, 5)),
        np.array([np.nan, np.inf, -0.0], np.float32),
        np.zeros((0, 4), bool),
        rng.integers(0, 256, (3, 1024, 1024), np.uint8),  # several parts
    ]
    first, second = run(2, lambda p: p.all_gather("arrays", arrays if p.index else None))
    for told in (first[1], second[1]):
        for found, array in zip(told, arrays, strict=True):
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()


def test_the_store_does_not_grow():
    store = Memory()

    def work(processes):
        for number in range(40):
            processes.all_gather("value", "x" * number)
            processes.to_main("value", [number])

    run(3, work, store)
    assert len(store.values) <= 8


def test_the_main_process_alone_gets_what_is_sent_to_it():
    found = run(3, lambda p: (p.to_main("sent", p.index), p.all_gather("next", p.index)))
    assert found == [([0, 1, 2], [0, 1, 2]), ([], [0, 1, 2]), ([], [0, 1, 2])]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ends_the_block_in_all(failing):
    def work(processes):
        with processes.together("reading"):
            if processes.index == failing:
                raise OSError("no such disk")

    results = run(3, work)
    for index, error in enumerate(results):
        assert isinstance(error, OSError if index == failing else ProcessError)
        assert "no such disk" in str(error)
        if index != failing:
            assert f"process {failing} cannot go on: OSError" in str(error)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_before_an_exchange_in_the_block_is_told_in_it(failing, hasty):
    """One is at the block's end, the others are in the block: they run one program all the same."""

    def work(processes):
        with processes.open(), processes.together("finding the work directory"):
            if processes.index == failing:
                raise OSError("no such disk")
            processes.barrier("writing a file")

    results = run(3, work)
    for index, error in enumerate(results):
        assert isinstance(error, OSError if index == failing else ProcessError)
        assert "no such disk" in str(error)


def test_a_block_without_errors_ends_in_none():
    def work(processes):
        with processes.together("reading"):
            pass
        return processes.all_gather("after", processes.index)

    assert run(2, work) == [[0, 1]] * 2


def test_a_process_that_is_elsewhere_is_noticed():
    results = run(2, lambda p: p.all_gather(f"place {p.index}"))
    for error in results:
        assert isinstance(error, ProcessError)
        assert "'place 1'" in str(error) and "'place 0'" in str(error)


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_process_that_stopped_is_not_waited_for(stopped, hasty):
    def work(processes):
        with processes.open():
            if processes.index == stopped:
                raise ZeroDivisionError("a defect")
            processes.barrier("never complete")

    results = run(3, work)
    assert isinstance(results.pop(stopped), ZeroDivisionError)
    for error in results:
        assert isinstance(error, ProcessError) and "a defect" in str(error)


def _ends_in(code):
    """As `sl_jax.train` is told: what the user has to put right ends in 1, other processes as they
    say, and all else in 70."""
    return lambda error: getattr(error, "code", code)


@pytest.mark.parametrize("code", [1, 70])
@pytest.mark.parametrize("where", ["in a block", "elsewhere", "after another"])
def test_all_end_with_the_exit_code_of_the_first(where, code, hasty):
    """Otherwise what starts them again is told by one to do so, and by others not to."""

    def work(processes):
        processes._code_of = _ends_in(code)
        with processes.open():
            if processes.index == 1 and where != "in a block":
                raise ZeroDivisionError("a defect")
            with processes.together("reading"):
                if processes.index == 1:
                    raise ZeroDivisionError("a defect")
            if where == "after another":
                processes.barrier("never complete")

    first, _, third = run(3, work)
    for error in (first, third):
        assert isinstance(error, ProcessError) and error.code == code


def test_a_process_that_fails_by_itself_has_to_be_put_right():
    first, second = run(2, lambda p: p.all_gather(f"place {p.index}"))
    assert (first.code, second.code) == (1, 1)


def test_waiting_is_said(hasty, caplog):
    def work(processes):
        if processes.index:
            time.sleep(0.3)
        processes.barrier("judging")

    run(2, work)
    said = [record.getMessage() for record in caplog.records]
    assert 1 <= len(said) <= 4  # at growing intervals
    assert said[0].startswith("Process 0 has waited") and said[0].endswith("process 1: judging.")


def test_leaving_together(hasty):
    assert run(3, lambda p: p.leave(KeyboardInterrupt(), 4)) == [True] * 3


def test_leaving_at_different_places(hasty, caplog):
    assert run(2, lambda p: p.leave(KeyboardInterrupt(), p.index)) == [False] * 2
    assert "nothing is saved" in caplog.text


def test_leaving_alone_does_not_last(hasty):
    assert run(2, lambda p: p.index or p.leave(KeyboardInterrupt(), 4))[0] is False


def test_who_hears_that_one_leaves_can_leave_with_it(hasty, monkeypatch):
    """An unexpected error of one process; the others learn of it, and all save together."""
    monkeypatch.setattr(module, "_FAREWELL", 5.0)

    def work(processes):
        try:
            if processes.index == 1:
                raise ZeroDivisionError("a defect")
            processes.barrier("never complete")
        except (ZeroDivisionError, ProcessError) as error:
            return processes.leave(error, 3)

    assert run(3, work) == [True] * 3


@pytest.mark.parametrize("failing", [0, 1])
def test_who_failed_between_exchanges_saves_with_those_that_were_in_one(
    failing, hasty, monkeypatch
):
    """These have counted it; what all do next is one exchange all the same."""
    monkeypatch.setattr(module, "_FAREWELL", 5.0)

    def work(processes):
        try:
            processes.barrier("learning")
            if processes.index == failing:
                raise ZeroDivisionError("a defect")
            processes.to_main("metrics", processes.index)
            processes.barrier("never complete")
        except (ZeroDivisionError, ProcessError) as error:
            assert processes.leave(error, 3)
            time.sleep(0.1 * processes.index)  # longer than a look: who is slow is waited for
            assert processes.from_main("looking for room", processes.index + 7) == 7
            return processes.all_gather("saving", processes.index)

    assert run(3, work) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("failing", [0, 1])
def test_who_cannot_save_after_all_left_is_not_waited_for(failing, hasty):
    def work(processes):
        with processes.open():
            processes.leave(KeyboardInterrupt(), 3)
            if processes.index == failing:
                raise OSError("no room")
            processes.barrier("saving")

    results = run(3, work)
    assert isinstance(results.pop(failing), OSError)
    for error in results:
        assert isinstance(error, ProcessError) and "stopped: OSError: no room" in str(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_comes_through_in_all_at_the_same_exchange(number):
    def work(processes):
        for exchange in itertools.count():
            if (processes.index, exchange) == (1, 5):
                processes._interrupts.received = number
            try:
                processes.barrier("a round")
            except KeyboardInterrupt as error:
                return exchange, type(error) is Terminated

    assert run(3, work) == [(5, number == signal.SIGTERM)] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("count", [1, 3])
def test_what_belongs_together_is_finished_first_in_all(number, count):
    """Exchanges in an uninterrupted block tell of a signal, and its end raises it; once."""

    def work(processes):
        done = []
        try:
            with processes.uninterrupted():
                if processes.index == count - 1:
                    processes._interrupts.received = number
                with processes.together("writing metrics"):
                    done.append("metrics")
                processes.barrier("saving")
                done.append("checkpoint")
            done.append("next epoch")
        except KeyboardInterrupt as error:
            done.append(type(error) is Terminated)
        with processes.uninterrupted():  # as when all save after it
            processes.barrier("saving")
        return done

    assert run(count, work) == [["metrics", "checkpoint", number == signal.SIGTERM]] * count


def test_waiting_for_devices_can_be_interrupted():
    """Of a computation that takes long, to copy what is not there yet."""

    @jax.jit
    def long(x):
        return jax.lax.fori_loop(0, 30_000, lambda _, x: jnp.sin(x @ x), x)

    result = long(jnp.ones((200, 200)))  # its own 10 s, and much more on a busy machine
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Terminated), Processes().open():
        to_local(result)
    assert not result.is_ready()


@pytest.fixture
def ended(monkeypatch):
    """What ends the program, in place of ending it; signs of life are given often."""
    said = []
    monkeypatch.setattr(module, "end_now", lambda message, code: said.append((message, code)))
    monkeypatch.setattr(module, "_BEAT", 0.02)
    monkeypatch.setattr(module, "_LOST", 0.5)
    return said


def test_a_process_without_signs_of_life_ends_all(ended):
    """The first sees it, the second is told; the third was killed."""

    def work(processes):
        with processes._watched():
            if processes.index == 2:
                raise SystemExit  # without a word
            while len(ended) < 2:
                time.sleep(0.01)

    run(3, work)
    for message, code in ended[:2]:
        assert "OthersGoneError: process 2 is gone (it was killed, or its host was" in message
        assert "please start all again" in message and code == 143


def test_who_ends_all_has_the_code_of_the_one_that_is_gone(ended):
    def work(processes):
        processes._code_of = _ends_in(70)
        with processes._watched():
            if processes.index == 1:
                processes._tell("leaving", ZeroDivisionError("a defect"), -1)
                raise SystemExit
            while len(ended) < 1:
                time.sleep(0.01)

    run(2, work)
    message, code = ended[0]
    assert "process 1 is gone (ZeroDivisionError: a defect)" in message and code == 70


def test_a_process_that_is_done_may_be_silent(ended):
    def work(processes):
        with processes.open():
            processes.barrier("begun")
            time.sleep(1.2 * processes.index)

    assert run(2, work) == [None, None]
    assert ended == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_noted_comes_through_at_the_next_exchange(number):
    processes = Processes()
    with pytest.raises(KeyboardInterrupt) as raised, processes.open():
        processes._interrupts._collecting = True  # where nothing can be raised
        signal.raise_signal(number)
        processes.barrier("going on")
    assert type(raised.value) is (Terminated if number == signal.SIGTERM else KeyboardInterrupt)
    processes.barrier("afterwards")


def test_one_process_alone_waits_for_nobody(caplog):
    with ALONE.open() as processes:
        assert processes.is_main
        assert processes.all_gather("value", {1, 2}) == [{1, 2}]  # as it is
        assert processes.to_main("value", 3) == [3]
        processes.barrier("here")
        assert Processes().leave(OSError("x"), 2)
    with pytest.raises(OSError, match="x"), ALONE.together("reading"):
        raise OSError("x")
    assert caplog.records == []


# Axes: data, fsdp, tensor, sequence.
def _mesh(shape, per_process, order=None):
    """A stand-in for a mesh over hosts, each with so many devices."""
    count = int(np.prod(shape))
    order = range(count) if order is None else order
    devices = np.array([SimpleNamespace(process_index=i // per_process) for i in order], object)
    names = ("data", "fsdp", "tensor", "sequence")
    return SimpleNamespace(
        devices=devices.reshape(shape), axis_names=names, shape=dict(zip(names, shape, strict=True))
    )


def _rows(mesh, size, processes):
    return [batch_rows(mesh, size, process) for process in range(processes)]


def test_rows_of_processes_that_hold_parts_of_their_own():
    for shape in ((1, 8, 1, 1), (8, 1, 1, 1), (2, 4, 1, 1)):
        first, second = _rows(_mesh(shape, 4), 16, 2)
        assert first == (tuple(range(8)),) * 2 and second == (tuple(range(8, 16)),) * 2
    first, second = _rows(_mesh((2, 2, 2, 1), 4), 4, 2)
    assert first.judged == (0, 1) and second.judged == (2, 3)


def test_rows_follow_the_order_of_devices():
    """A ring over the chips of two hosts visits them in turns."""
    first, second = _rows(_mesh((1, 8, 1, 1), 4, (0, 1, 4, 5, 6, 7, 2, 3)), 8, 2)
    assert first.held == (0, 1, 6, 7) and second.held == (2, 3, 4, 5)


def test_the_first_replica_judges():
    first, second, third, fourth = _rows(_mesh((1, 2, 4, 1), 2), 4, 4)
    assert first == ((0, 1), (0, 1)) and second == ((0, 1), ())
    assert third == ((2, 3), (2, 3)) and fourth == ((2, 3), ())


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 8, 1)])
@pytest.mark.parametrize("per_process", [1, 2, 4, 8])
def test_every_row_is_judged_once(shape, per_process):
    rows = _rows(_mesh(shape, per_process), 16, 8 // per_process)
    assert sorted(row for entry in rows for row in entry.judged) == list(range(16))
    assert all(set(entry.judged) <= set(entry.held) for entry in rows)


def test_meshes_that_do_not_fit_the_processes():
    with pytest.raises(ValueError, match="different parts of a batch"):
        batch_rows(_mesh((1, 2, 3, 1), 2), 4, 0)
    with pytest.raises(ValueError, match="5 rows"):
        batch_rows(_mesh((1, 2, 1, 1), 1), 5, 0)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 2, 1), (1, 1, 8, 1)])
def test_rows_go_to_devices_and_back(shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices())
    rows = np.arange(48, dtype=np.float32).reshape(8, 3, 2)
    array = from_local(rows, batch_sharding(mesh), 8)
    assert array.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    assert np.array_equal(to_local(array), rows)
    assert np.array_equal(to_local(from_everywhere(rows, batch_sharding(mesh))), rows)
    wide = NamedSharding(mesh, PartitionSpec(None, None, ("fsdp",)))
    tree = {"a": array, "b": from_everywhere(np.arange(64.0).reshape(8, 1, 8), wide)}
    whole = to_everywhere(tree, mesh)
    assert np.array_equal(whole["a"], rows) and whole["b"].sum() == 64 * 63 / 2
    if shape[1] > 1:
        with pytest.raises(ValueError, match="only rows may be"):
            to_local(tree["b"])


def test_messages_of_one_exchange_are_few():
    """By way of the main process: what a process reads does not grow with their number."""
    reads = []

    class Counting(Memory):
        def get(self, name, seconds):
            reads.append(name)
            return super().get(name, seconds)

    run(6, lambda p: p.all_gather("value", p.index), Counting())
    assert len(reads) <= 2 * 6


def test_nothing_is_logged_where_nobody_waits(caplog):
    caplog.set_level(logging.DEBUG, "sl_jax")
    run(2, lambda p: p.barrier("here"))
    assert caplog.records == []
