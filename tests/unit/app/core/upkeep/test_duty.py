from __future__ import annotations

from redis import Redis

from app.core.changes.redis_keys import duty_key
from app.core.upkeep.duty import Duty


def test_one_of_several_does_the_work_until_it_leaves(redis: Redis) -> None:
    done: list[str] = []
    first, second = (Duty(redis, "janitor", 100.0) for _ in range(2))
    first_turn = first.doing(lambda: done.append("first"))
    second_turn = second.doing(lambda: done.append("second"))
    for turn in (first_turn, second_turn, first_turn):
        turn()
    assert done == ["first", "first"]
    second.leave()  # it has nothing to leave
    second_turn()
    assert done == ["first", "first"]
    first.leave()
    second_turn()
    assert done[2:] == ["second"]


def test_a_duty_whose_holder_died_is_taken(redis: Redis) -> None:
    done: list[str] = []
    Duty(redis, "janitor", 100.0).doing(lambda: done.append("dead"))()
    assert 100_000 < redis.pttl(duty_key("janitor")) <= 150_000
    redis.delete(duty_key("janitor"))  # as its expiry does
    Duty(redis, "janitor", 100.0).doing(lambda: done.append("next"))()
    Duty(redis, "turns", 100.0).doing(lambda: done.append("another duty"))()
    assert done == ["dead", "next", "another duty"]
