"""What is freed in small pieces goes back to the system, at a bounded pace."""

import psutil

from dgpo.coldstart import heap

MIB = 2**20


def test_holes_between_blocks_in_use_go_back_to_the_system():
    blocks = [b"x" * 2**16 for _ in range(4096)]  # 256 MiB, too small to be mapped one by one
    in_use = blocks[::64]
    del blocks
    held = psutil.Process().memory_info().rss
    heap.give_back_heap()
    assert held - psutil.Process().memory_info().rss > 200 * MIB
    assert all(block == b"x" * 2**16 for block in in_use)


def test_the_callback_gives_back_every_ten_seconds(monkeypatch):
    now, given_back = [0.0], []
    monkeypatch.setattr(heap.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heap, "give_back_heap", lambda: given_back.append(now[0]))
    callback = heap.GiveBackHeap()
    for now[0] in (4.0, 9.0, 11.0, 14.0, 20.0, 21.0, 30.0, 31.0):
        callback.on_step_end(None, None, None)
    assert given_back == [11.0, 21.0, 31.0]
