"""Disk, host, device: the least recently used goes first, and what is in use or pinned never goes."""

import random
import time

from perseid_server.adapters.state import ResidencyEvents, Resident

# --- the way to the device ------------------------------------------------------------------------------------------


def test_an_adapter_comes_from_disk_over_host_to_the_device(stage):
    stage = stage(num_pages=4)
    version = stage.adapter(1, rank=20)
    assert stage.places(version) == ["disk"]
    assert stage.residency.acquire(version) == "loading"
    events = stage.settle()
    assert events.moved == (version,)
    assert stage.places(version) == ["device"]
    assert stage.residency.acquire(version) == "ready"
    assert len(stage.residency._adapters[version].pages) == 2
    stage.assert_pages_hold(version)


def test_residents_are_told_as_they_are(stage):
    stage = stage(num_pages=4)
    used, pinned, idle = stage.adapter(1, rank=20), stage.adapter(2), stage.adapter(3)
    stage.use(used)
    stage.residency.pin(pinned, True)
    assert [one.is_loading for one in stage.residency.residents()] == [False, True, False]
    stage.settle()
    assert list(stage.residency.residents()) == [
        Resident(used, "adapter", "device", 2, 1),
        Resident(pinned, "adapter", "device", 1, 0, is_pinned=True),
        Resident(idle, "adapter", "disk"),
    ]


def test_events_are_reported_once(stage):
    stage = stage(num_pages=1)
    version = stage.adapter(1)
    stage.residency.acquire(version)
    assert stage.settle().moved == (version,)
    assert stage.residency.poll() == ResidencyEvents((), {})


def test_prefetching_stops_at_the_host(stage):
    stage = stage(num_pages=1)
    version = stage.adapter(1)
    stage.residency.prefetch(version)
    stage.residency.prefetch(version)
    stage.residency.prefetch("unknown")
    stage.settle()
    assert stage.places(version) == ["host"]
    assert stage.pool.num_free == 1


def test_a_lookup_is_a_hit_when_the_first_ask_is_answered_at_once(stage):
    stage = stage(num_pages=1)
    version = stage.adapter(1)
    stage.touch(version)
    stage.touch(version)
    stats = stage.residency.stats()
    assert (stats.lookups, stats.hits, stats.pages_used, stats.pages_total) == (2, 1, 1, 1)


# --- eviction -------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_leaves_the_device_first(stage):
    stage = stage(num_pages=3)
    a, b, c, d, e = (stage.adapter(seed) for seed in range(5))
    for version in (a, b, c, a):
        stage.touch(version)
    stage.touch(d)
    assert stage.places(a, b, c, d) == ["device", "host", "device", "device"]
    stage.touch(e)
    assert stage.places(a, b, c, d, e) == ["device", "host", "host", "device", "device"]


def test_an_adapter_in_use_is_never_evicted(stage):
    stage = stage(num_pages=2)
    a, b, c = (stage.adapter(seed) for seed in range(3))
    stage.use(a)
    stage.use(a)
    stage.touch(b)
    stage.use(c)
    assert stage.places(a, b, c) == ["device", "host", "device"]
    assert stage.residency.acquire(b) == "no_room"
    stage.residency.release(a)
    assert stage.residency.acquire(b) == "no_room", "it has another user"
    stage.residency.release(a)
    stage.use(b)
    assert stage.places(a, b, c) == ["host", "device", "device"]
    stage.assert_pages_hold(b)
    stage.assert_pages_hold(c)


def test_nothing_is_evicted_when_it_would_not_suffice(stage):
    stage = stage(num_pages=3)
    idle, busy, wide = stage.adapter(1), stage.adapter(2, rank=20), stage.adapter(3, rank=30)
    stage.touch(idle)
    stage.use(busy)
    stage.residency.prefetch(wide)
    stage.settle()
    assert stage.residency.acquire(wide) == "no_room"
    assert stage.places(idle) == ["device"]


def test_a_wide_adapter_takes_the_pages_of_several(stage):
    stage = stage(num_pages=3)
    small = [stage.adapter(seed) for seed in range(3)]
    for version in small:
        stage.touch(version)
    wide = stage.adapter(9, rank=30)
    stage.use(wide)
    assert stage.places(*small, wide) == ["host", "host", "device", "device"]
    stage.assert_pages_hold(wide)
    stage.assert_pages_hold(small[2])


def test_the_least_recently_used_leaves_the_host_first_and_is_read_again(stage):
    probe = stage(num_pages=1)
    size = probe.adapter(0)
    probe.touch(size)
    small = stage(num_pages=1, host_bytes=2 * probe.host_bytes_of(size))
    a, b, c = (small.adapter(seed) for seed in range(3))
    for version in (a, b, a, c):
        small.touch(version)
    assert small.places(a, b, c) == ["host", "disk", "device"]
    assert small.residency._host.nbytes == 2 * small.host_bytes_of(a)
    small.touch(b)
    small.assert_pages_hold(b)


def test_a_copy_larger_than_all_host_memory_still_passes_through(stage):
    stage = stage(num_pages=1, host_bytes=0)
    for seed in range(3):
        stage.touch(stage.adapter(seed))
    assert stage.residency._host.nbytes == stage.host_bytes_of(list(stage.folders)[-1])


def test_five_hundred_adapters_work_with_room_for_eight(stage):
    stage = stage(num_pages=8, host_bytes=200_000)
    versions = [stage.adapter(seed) for seed in range(500)]
    order = random.Random(5)
    held: list[str] = []
    for _ in range(700):
        version = order.choice(versions[:12] if order.random() < 0.3 else versions)
        if len(held) == 8:
            stage.residency.release(held.pop(order.randrange(8)))
        stage.use(version)
        held.append(version)
        pages = {stage.residency._adapters[other].pages for other in held}
        assert len(pages) == len(set(held)), "no page is shared"
    assert stage.residency.stats().pages_used <= 8
    for version in held:
        stage.assert_pages_hold(version)


def test_requests_that_wait_for_the_same_room_all_come_to_their_turn(stage):
    """A load that ends while nobody asks must not take the place of one that has landed and waits to be acquired."""
    stage = stage(num_pages=1, host_bytes=0)
    waiting = [stage.adapter(seed) for seed in range(3)]
    residency = stage.residency
    for _ in range(20):
        while (
            residency._loader._done.qsize() < residency._loader._num_jobs
        ):  # a slow step: all loads end before the next poll
            time.sleep(0)
        residency.poll()
        for version in list(waiting):  # as the scheduler does: oldest first, none before one that finds no room
            admission = residency.acquire(version)
            if admission == "ready":
                waiting.remove(version)
                residency.release(version)
            if admission == "no_room":
                break
    assert waiting == []


# --- pins -----------------------------------------------------------------------------------------------------------


def test_a_pinned_adapter_comes_by_itself_and_stays(stage):
    stage = stage(num_pages=2)
    pinned, a, b = (stage.adapter(seed) for seed in range(3))
    stage.residency.pin(pinned, True)
    stage.settle()
    for version in (a, b, a):
        stage.touch(version)
    assert stage.residency.is_pinned(pinned)
    assert stage.places(pinned, a, b) == ["device", "device", "host"]
    stage.use(a)
    assert stage.residency.acquire(b) == "no_room"
    stage.residency.release(a)
    stage.residency.pin(pinned, False)
    stage.touch(b)
    assert stage.places(pinned, a, b) == ["host", "device", "device"]


def test_a_pin_waits_for_room_and_takes_it_when_it_is_there(stage):
    stage = stage(num_pages=1)
    busy, pinned = stage.adapter(1), stage.adapter(2)
    stage.use(busy)
    stage.residency.pin(pinned, True)
    stage.settle()
    assert stage.places(busy, pinned) == ["device", "host"]
    stage.residency.release(busy)
    stage.settle()
    assert stage.places(busy, pinned) == ["host", "device"]


def test_letting_go_of_a_pin_brings_nothing_to_the_device(stage):
    stage = stage(num_pages=1)
    idle, elsewhere = stage.adapter(1), stage.adapter(2)
    stage.touch(elsewhere)
    stage.touch(idle)
    stage.residency.pin(elsewhere, False)
    stage.settle()
    assert stage.places(idle, elsewhere) == ["device", "host"]
