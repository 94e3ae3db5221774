"""The generate stage."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from jobdaemon.domain.artifact import Artifact
from jobdaemon.domain.fallback import FallbackRules, Move, Settle
from jobdaemon.domain.job import Job, Task
from jobdaemon.domain.outcome import Done
from jobdaemon.domain.write import CallAccepted, CallEnded, CallSubmitted, ImageFailed, ImageGenerated
from jobdaemon.errors import (
    AnswerLostError,
    InvalidOrderError,
    KeyMissingError,
    LeaseLostError,
    OrderEndedError,
    ProviderRefusedError,
    ProviderUnavailableError,
    PutOffError,
    RateLimitedError,
    RetryableError,
    StoreRefusedError,
    StoreUnavailableError,
    UnsupportedFeatureError,
)
from jobdaemon.ports import Charged, ImageMade, ImageRefused, ProviderCall, ProviderEvent, Submitting, TaskAccepted, TaskOver
from jobdaemon.spool import Spool
from jobdaemon.stages import arrivals, generate
from jobdaemon.stages.generate import GenerateStage
from tests.fakes import JPEG, FakeArtifacts, FakeAttempt, FakeOrders, FakeProvider, image_row, order_row

JOB = Job(9, "generate.fake", Task.GENERATE, 300, {"order_id": 1, "images": [1, 2]}, token=1)
OPEN_CALL = ProviderCall(7, "t1", (1, 2), None, datetime(2026, 1, 1, tzinfo=UTC))
PHOTO = Artifact("work/1/beautified-0.jpg", "0" * 64, 5, JPEG)


@dataclass(slots=True)
class BusyArtifacts(FakeArtifacts):
    """A store that is away for its first calls."""

    busy: int = 0

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        if self.busy > 0:
            self.busy -= 1
            raise StoreUnavailableError("away")
        self.objects[key] = content
        return Artifact(key, "0" * 64, len(content), media_type)


@dataclass(slots=True)
class SlowArtifacts(FakeArtifacts):
    """A store that lets others in before it is done; *most* were in at once."""

    inside: int = 0
    most: int = 0

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        self.inside += 1
        self.most = max(self.most, self.inside)
        for _ in range(10):
            await asyncio.sleep(0)
        self.inside -= 1
        return await FakeArtifacts.put(self, key, content, media_type)


class RefusingArtifacts(FakeArtifacts):
    """A store that takes nothing."""

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        raise StoreRefusedError("no")


def _orders(*images: Any, **changes: Any) -> FakeOrders:
    return FakeOrders(order_row(beautified=PHOTO), list(images) or [image_row(1), image_row(2)], **changes)


def _stage(orders: FakeOrders, provider: FakeProvider, store: FakeArtifacts | None = None) -> GenerateStage:
    return GenerateStage(orders=orders, store=store or FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100)


async def test_images_are_noted_as_they_arrive() -> None:
    """
    Task id first, then each image with its upload job: inline bytes into the store, URLs as they are. The call ends with its last
    image: the order may end with that, and nothing is to be open then.
    """
    orders, store = _orders(), FakeArtifacts({PHOTO.key: b"photo"})
    provider = FakeProvider([TaskAccepted("t1"), ImageMade(2, b"two", JPEG), None, ImageMade(1, url="https://p.example/1"), None])
    attempt = FakeAttempt(JOB, orders)
    assert await _stage(orders, provider, store).run(attempt) == Done(writes=(CallEnded(1, 9, "succeeded"),))
    noted, second, first, ended = attempt.checkpoints
    assert ended == CallEnded(1, 9, "succeeded")
    assert noted == CallSubmitted(1, 9, "fake", (1, 2), "t1")
    assert isinstance(second, ImageGenerated)
    assert isinstance(first, ImageGenerated)
    assert store.objects[second.locator.removeprefix("artifact:")] == b"two"
    assert first.locator == "https://p.example/1"
    assert [job.args for write in (second, first) for job in write.then] == [
        {"order_id": 1, "image": 2},
        {"order_id": 1, "image": 1},
    ]
    [request] = provider.requests
    assert await request.load_photo() == b"photo"
    assert (request.prompt, request.images, request.params, request.resume) == ("p", ((1, 0), (2, 1)), {"seed": 3}, None)
    assert provider.closed == 1


async def test_an_image_in_a_file_is_stored_as_its_bytes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inline bytes may come in a spool: they lie under the same key, and a store that is away for a moment gets them later."""
    monkeypatch.setattr(generate, "_STORE_RESTS_S", (0.0, 0.0))
    keys: set[str] = set()
    for content in (b"one", Spool()):
        if isinstance(content, Spool):
            content.write(b"one")
        orders, store = _orders(image_row(1)), BusyArtifacts(busy=1)
        await _stage(orders, FakeProvider([ImageMade(1, content, JPEG)]), store).run(FakeAttempt(JOB, orders))
        assert list(store.objects.values()) == [b"one"]
        keys |= store.objects.keys()
    assert len(keys) == 1


async def test_images_that_come_with_the_end_are_committed_with_it() -> None:
    """An answer that is the end of its call costs one commit, however many images it holds."""
    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    provider = FakeProvider([Submitting(), ImageMade(1, b"one", JPEG), ImageMade(2, url="https://p.example/2")])
    done = await _stage(orders, provider).run(attempt)
    assert attempt.checkpoints == [CallSubmitted(1, 9, "fake", (1, 2))]
    one, two, ended = sorted(done.writes, key=lambda write: getattr(write, "index", 3))
    assert isinstance(one, ImageGenerated)
    assert isinstance(two, ImageGenerated)
    assert [job.args for write in (one, two) for job in write.then] == [
        {"order_id": 1, "image": 1},
        {"order_id": 1, "image": 2},
    ]
    assert ended == CallEnded(1, 9, "succeeded")


async def test_ordinals_count_the_images_of_the_same_prompt() -> None:
    """An image's ordinal is its place among the order's images of its prompt, whatever is still missing."""
    orders = _orders(image_row(1, "a"), image_row(2, "b", "stored"), image_row(3, "b"), image_row(4, "b"))
    provider = FakeProvider([ImageMade(3, b"3", JPEG), ImageMade(4, b"4", JPEG)])
    job = Job(9, "generate.fake", Task.GENERATE, 300, {"order_id": 1, "images": [2, 3, 4]})
    await _stage(orders, provider).run(FakeAttempt(job, orders))
    assert provider.requests[0].images == ((3, 1), (4, 2))


async def test_a_later_attempt_asks_only_for_what_is_missing_and_resumes() -> None:
    """What arrived before is not made again, and a noted task id is handed back to the provider."""
    orders = _orders(image_row(1, status="generated"), image_row(2), call=OPEN_CALL)
    provider = FakeProvider([ImageMade(1, b"one", JPEG), ImageMade(2, b"two", JPEG)])
    attempt = FakeAttempt(JOB, orders)
    done = await _stage(orders, provider).run(attempt)
    assert provider.requests[0].images == ((2, 1),)
    assert provider.requests[0].resume == OPEN_CALL
    assert attempt.checkpoints == []
    assert [(type(write), getattr(write, "index", None)) for write in done.writes] == [(ImageGenerated, 2), (CallEnded, None)]


async def test_a_call_is_noted_before_it_is_bought() -> None:
    """Submitting is a row without an id, TaskAccepted gives it one, the attempt's end closes it."""
    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    made = [ImageMade(index, b"x", JPEG) for index in (1, 2)]
    done = await _stage(orders, FakeProvider([Submitting(), TaskAccepted("t1"), *made])).run(attempt)
    assert attempt.checkpoints == [CallSubmitted(1, 9, "fake", (1, 2)), CallAccepted(1, 9, "t1")]
    assert done.writes[-1] == CallEnded(1, 9, "succeeded")


async def test_each_call_of_an_attempt_is_noted_for_itself() -> None:
    """A provider that asks for the rest in a second call: the first one is closed, the second asks for what is still missing."""
    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    script: list[Any] = [Submitting(), ImageMade(1, b"1", JPEG), Submitting(), ImageMade(2, b"2", JPEG)]
    done = await _stage(orders, FakeProvider(script)).run(attempt)
    submitted, first, ended, again = attempt.checkpoints
    assert isinstance(first, ImageGenerated), "noted while the call that made it is the open one"
    assert (submitted, ended) == (CallSubmitted(1, 9, "fake", (1, 2)), CallEnded(1, 9, "partial"))
    assert again == CallSubmitted(1, 9, "fake", (2,))
    assert [type(write) for write in done.writes] == [ImageGenerated, CallEnded]


@pytest.mark.parametrize(
    ("script", "closed"),
    [
        ([Submitting(), AnswerLostError("?")], None),
        ([Submitting(), RateLimitedError("busy")], "failed"),
        ([Submitting(), ProviderRefusedError("no")], "failed"),
        ([Submitting(), TaskAccepted("t1"), ProviderUnavailableError("away")], None),
        ([Submitting(), TaskAccepted("t1"), TaskOver(), ProviderUnavailableError("it failed")], "failed"),
        ([Submitting(), TaskAccepted("t1"), ProviderRefusedError("unsafe")], "failed"),
        ([Submitting(), ImageMade(1, b"one", JPEG), ProviderRefusedError("the other one")], "partial"),
    ],
    ids=["lost answer", "busy", "refused", "poll failed", "task failed", "task refused", "half"],
)
async def test_a_call_stays_open_only_while_something_may_come_of_it(script: list[Any], closed: str | None) -> None:
    """A lost submit and a task not asked to its end stay open for the next attempt; every other failed call is closed."""
    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    with pytest.raises(type(script[-1])):
        await _stage(orders, FakeProvider(script)).run(attempt)
    ends = [write.outcome for write in attempt.checkpoints if isinstance(write, CallEnded)]
    assert ends == ([] if closed is None else [closed])


LOST_CALL = replace(OPEN_CALL, task_id=None)


async def test_a_lost_submit_is_looked_for() -> None:
    """Where the provider can be asked, the task that a lost answer named is found and gone on with."""
    orders, provider = _orders(call=LOST_CALL), FakeProvider([ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)], found="t9")
    attempt = FakeAttempt(JOB, orders)
    await _stage(orders, provider).run(attempt)
    assert attempt.checkpoints[0] == CallAccepted(1, 9, "t9")
    assert provider.requests[0].resume == replace(OPEN_CALL, task_id="t9")


async def test_a_lost_submit_is_bought_again_or_fails_as_set() -> None:
    """A submit that cannot be found is listed as unknown; then it is bought again, or its images fail, as the provider is set."""
    orders, provider = _orders(call=LOST_CALL), FakeProvider([ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)])
    attempt = FakeAttempt(JOB, orders)
    await _stage(orders, provider).run(attempt)
    assert attempt.checkpoints[0] == CallEnded(1, 9, "unknown")
    assert provider.requests[0].resume is None
    orders, provider = _orders(call=LOST_CALL), FakeProvider(on_unknown_submit="fail")
    attempt = FakeAttempt(JOB, orders)
    with pytest.raises(ProviderRefusedError, match="on_unknown_submit"):
        await _stage(orders, provider).run(attempt)
    assert (attempt.checkpoints, provider.requests) == ([CallEnded(1, 9, "unknown")], [])


async def test_an_image_is_collected_once_more_from_the_call_that_made_it() -> None:
    """A job made for an expired link resumes that call, and buys anew only once the provider has forgotten it."""
    orders = _orders(image_row(1, status="stored"), image_row(2), ended_calls={7: OPEN_CALL})
    job = Job(10, "generate.fake", Task.GENERATE, 300, {"order_id": 1, "images": [2], "call": 7})
    provider = FakeProvider([ImageMade(2, url="https://p.example/2-again")])
    attempt = FakeAttempt(job, orders)
    done = await _stage(orders, provider).run(attempt)
    assert provider.requests[0].resume == OPEN_CALL
    [generated] = done.writes
    assert isinstance(generated, ImageGenerated)
    assert generated.call_id == 7

    orders.images = [image_row(1, status="stored"), image_row(2)]
    attempt = FakeAttempt(job, orders)
    with pytest.raises(ProviderUnavailableError):
        await _stage(orders, FakeProvider([TaskOver(), ProviderUnavailableError("forgotten")])).run(attempt)
    assert attempt.checkpoints == [CallEnded(1, 10, "expired", 7)]


async def test_a_task_whose_id_could_not_be_noted_is_given_up() -> None:
    """An order that was cancelled while its call was accepted leaves no task running at the provider."""
    orders, provider = _orders(), FakeProvider([Submitting(), TaskAccepted("t1")])
    with pytest.raises(LeaseLostError):
        await _stage(orders, provider).run(FakeAttempt(JOB, orders, lost_after=1))
    assert [call.task_id for call in provider.cancelled] == ["t1"]


async def test_a_task_whose_id_was_noted_is_left_to_whoever_has_the_job_now() -> None:
    """An id that was chosen here and noted before the submit is known to the next attempt: losing the lease cancels nothing."""
    provider = FakeProvider([Submitting("t1"), TaskAccepted("t1")])
    orders = _orders()
    with pytest.raises(LeaseLostError):
        await _stage(orders, provider).run(FakeAttempt(JOB, orders, lost_after=1))
    assert provider.cancelled == []


async def test_a_paid_image_outlives_a_store_that_is_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inline bytes are kept and put again when the store does not answer: asking the provider again would cost money."""
    monkeypatch.setattr(generate, "_STORE_RESTS_S", (0.0, 0.0))
    orders, store = _orders(), BusyArtifacts(busy=2)
    provider = FakeProvider([Submitting(), ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)])
    await _stage(orders, provider, store).run(FakeAttempt(JOB, orders))
    assert sorted(store.objects.values()) == [b"1", b"2"]


async def test_a_call_is_made_and_noted_with_the_attempts_key() -> None:
    """The provider is told which key to use, and the call that it takes remembers it."""
    orders, provider = _orders(), FakeProvider([Submitting(), ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)])
    attempt = FakeAttempt(replace(JOB, key_alias="a"), orders)
    await _stage(orders, provider).run(attempt)
    assert provider.requests[0].key == "a"
    assert attempt.checkpoints[0] == CallSubmitted(1, 9, "fake", (1, 2), None, "a")


async def test_nothing_missing_calls_nobody() -> None:
    """An attempt whose images are all there costs no call."""
    orders, provider = _orders(image_row(1, status="stored"), image_row(2, status="failed")), FakeProvider()
    assert await _stage(orders, provider).run(FakeAttempt(JOB, orders)) == Done()
    assert provider.requests == []


async def test_a_refused_image_fails_alone() -> None:
    """What the provider will not make fails with its reason; its sibling is made."""
    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    done = await _stage(orders, FakeProvider([ImageRefused(1, "policy"), ImageMade(2, b"two", JPEG)])).run(attempt)
    assert ImageFailed(1, 1, "policy", was="pending") in done.writes
    assert [write.index for write in done.writes if isinstance(write, ImageGenerated)] == [2]


@pytest.mark.parametrize("script", [[], [ImageMade(1, b"one", JPEG)], [ImageMade(1), ImageMade(2)]])
async def test_an_image_left_out_without_a_word_is_retried(script: list[Any]) -> None:
    """A call that ends before every image was made or refused failed, retryably; what arrived is kept."""
    orders = _orders()
    with pytest.raises(ProviderUnavailableError):
        await _stage(orders, FakeProvider(script)).run(FakeAttempt(JOB, orders))
    assert orders.images[1].status == "pending"


async def test_the_call_is_closed_when_the_lease_is_lost() -> None:
    """A lost lease stops the stream at once, so that nothing more is fetched or bought."""
    asked: list[Any] = [ImageMade(1, b"one", JPEG), None, ImageMade(2, b"two", JPEG), Submitting()]
    orders, provider = _orders(), FakeProvider(asked)
    attempt = FakeAttempt(JOB, orders, lost_after=0)
    with pytest.raises(LeaseLostError):
        await _stage(orders, provider).run(attempt)
    assert (attempt.checkpoints, provider.closed) == ([], 1)


@pytest.mark.parametrize(
    ("orders", "queue", "error"),
    [
        (FakeOrders(None), "generate.fake", InvalidOrderError),
        (FakeOrders(), "generate.fake", InvalidOrderError),
        (_orders(), "generate.other", UnsupportedFeatureError),
    ],
    ids=["no order", "no photo", "no provider"],
)
async def test_what_cannot_be_is_permanent(orders: FakeOrders, queue: str, error: type[Exception]) -> None:
    """No order, no beautified photo or no such provider ends the batch with a reason."""
    job = Job(9, queue, Task.GENERATE, 300, {"order_id": 1, "images": [1, 2]})
    with pytest.raises(error):
        await _stage(orders, FakeProvider()).run(FakeAttempt(job, orders))


async def test_images_that_arrived_are_stored_side_by_side_whatever_comes_after() -> None:
    """A slow store holds no sibling up, and a provider that breaks off loses nothing of what it sent before."""
    orders, store = _orders(), SlowArtifacts()
    provider = FakeProvider([ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG), ProviderUnavailableError("broke off")])
    with pytest.raises(ProviderUnavailableError, match="broke off"):
        await _stage(orders, provider, store).run(FakeAttempt(JOB, orders))
    assert store.most == 2
    assert [image.status for image in orders.images] == ["generated", "generated"]


async def test_what_cannot_be_stored_ends_the_attempt() -> None:
    """A store that refuses is the attempt's error, though it was noticed beside the stream."""
    orders, store = _orders(), RefusingArtifacts()
    with pytest.raises(StoreRefusedError):
        await _stage(orders, FakeProvider([ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)]), store).run(
            FakeAttempt(JOB, orders)
        )
    assert [image.status for image in orders.images] == ["pending", "pending"]


CHAIN = FallbackRules(chains={"fake": ("other",)}, images_per_call=lambda name: 3)
SPENT = replace(JOB, attempts=3)


async def _failed(
    script: list[Any], *, orders: FakeOrders | None = None, rules: FallbackRules = CHAIN, **changes: Any
) -> tuple[FakeAttempt, FakeProvider, Exception]:
    """An attempt that failed, with somebody else to ask."""
    orders = orders or _orders()
    provider = FakeProvider(script, **changes)
    attempt = FakeAttempt(SPENT, orders, is_spent=orders.call is not None)
    stage = GenerateStage(orders=orders, store=FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100, fallback=rules)
    with pytest.raises(RetryableError) as caught:
        await stage.run(attempt)
    return attempt, provider, caught.value


@pytest.mark.parametrize(
    ("script", "is_owed"),
    [
        ([ProviderUnavailableError("away")], False),
        ([Submitting(), ProviderUnavailableError("refused")], False),
        ([Submitting(), TaskAccepted("t1"), TaskOver(), ProviderUnavailableError("it failed")], False),
        ([Submitting(), ImageMade(1, b"1", JPEG), ProviderUnavailableError("half")], False),
        ([Submitting(), AnswerLostError("?")], True),
        ([Submitting(), TaskAccepted("t1"), ProviderUnavailableError("no answer")], True),
    ],
    ids=["not bought", "refused", "task over", "half", "lost answer", "still runs"],
)
async def test_only_a_batch_that_has_bought_nothing_goes_elsewhere(script: list[Any], is_owed: bool) -> None:
    """While the provider may still give something for a call, the batch stays and asks it."""
    attempt, _, _ = await _failed(script)
    assert attempt.instead() == (Settle() if is_owed else Move("other", 3))


async def test_nobody_to_ask_is_no_instead() -> None:
    """Without a chain the images fail as before."""
    attempt, _, _ = await _failed([ProviderUnavailableError("away")], rules=FallbackRules())
    assert attempt.instead() is None


async def test_out_of_attempts_a_call_is_stopped_before_anybody_else_is_asked() -> None:
    """The provider stopped it: the row is closed, nothing is asked for any more, and the batch may go."""
    attempt, provider, _ = await _failed([ImageMade(1, b"1", JPEG)], orders=_orders(call=OPEN_CALL))
    assert [call.task_id for call in provider.cancelled] == ["t1"]
    assert attempt.checkpoints == [CallEnded(1, 9, "cancelled")]
    assert (provider.requests, attempt.instead()) == ([], Move("other", 3))


async def test_a_late_result_is_used() -> None:
    """A call that had ended when it was to be stopped is collected, and nobody else is asked."""
    orders = _orders(call=OPEN_CALL)
    provider = FakeProvider([ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)], stops=False)
    stage = GenerateStage(orders=orders, store=FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100, fallback=CHAIN)
    done = await stage.run(FakeAttempt(SPENT, orders, is_spent=True))
    assert sorted(write.index for write in done.writes if isinstance(write, ImageGenerated)) == [1, 2]
    assert done.writes[-1] == CallEnded(1, 9, "succeeded")
    [request] = provider.requests
    assert request.resume == OPEN_CALL


async def test_part_of_a_late_result_is_used() -> None:
    """What a task made before it failed is kept; the rest may go."""
    script = [ImageMade(1, b"1", JPEG), TaskOver(), ProviderUnavailableError("it failed")]
    attempt, _, _ = await _failed(script, orders=_orders(call=OPEN_CALL), stops=False)
    assert [image.status for image in attempt.orders.images] == ["generated", "pending"]
    assert attempt.instead() == Move("other", 3)


async def test_out_of_attempts_nothing_is_bought() -> None:
    """A provider that would submit anew, its task being forgotten, is stopped before it does."""
    attempt, _, _ = await _failed([TaskOver(), Submitting(), TaskAccepted("t2")], orders=_orders(call=OPEN_CALL), stops=False)
    assert attempt.checkpoints == [CallEnded(1, 9, "failed")]
    assert attempt.instead() == Move("other", 3)


async def test_a_paid_call_is_waited_for_and_a_free_one_is_not() -> None:
    """A provider that cannot say what became of a call holds the batch where that cost money; else the call is closed."""
    away = ProviderUnavailableError("away")
    attempt, _, _ = await _failed([], orders=_orders(call=OPEN_CALL), stops=away)
    assert attempt.instead() == Settle()
    attempt, _, _ = await _failed([], orders=_orders(call=OPEN_CALL), stops=away, rules=replace(CHAIN, unpaid={"fake"}))
    assert attempt.instead() == Move("other", 3, (CallEnded(1, 9, "cancelled"),))


async def test_a_lost_submit_is_looked_for_before_anybody_else_is_asked() -> None:
    """Found, it is stopped; not found it is unknown, and bought elsewhere only where it may be bought again."""
    attempt, provider, _ = await _failed([], orders=_orders(call=LOST_CALL), found="t9")
    assert attempt.checkpoints == [CallAccepted(1, 9, "t9"), CallEnded(1, 9, "cancelled")]
    assert [call.task_id for call in provider.cancelled] == ["t9"]
    attempt, _, _ = await _failed([], orders=_orders(call=LOST_CALL))
    assert (attempt.checkpoints, attempt.instead()) == ([CallEnded(1, 9, "unknown")], Move("other", 3))
    orders = _orders(call=LOST_CALL)
    provider = FakeProvider(on_unknown_submit="fail")
    stage = GenerateStage(orders=orders, store=FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100, fallback=CHAIN)
    with pytest.raises(ProviderRefusedError):
        await stage.run(FakeAttempt(SPENT, orders, is_spent=True))


async def test_an_ended_orders_task_is_given_up_even_if_its_id_was_noted() -> None:
    """It may have been looked for before it was there, and nobody has the job now."""
    orders, provider = _orders(), FakeProvider([Submitting("t1"), TaskAccepted("t1")])
    with pytest.raises(OrderEndedError):
        await _stage(orders, provider).run(FakeAttempt(JOB, orders, lost_after=1, loss=OrderEndedError))
    assert [call.task_id for call in provider.cancelled] == ["t1"]


@dataclass(slots=True)
class StuckArtifacts(FakeArtifacts):
    """A store in which one image's bytes get stuck until they are let go."""

    stuck: bytes = b"2"
    is_stuck: asyncio.Event = field(default_factory=asyncio.Event)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        if content == self.stuck:
            self.is_stuck.set()
            await self.let_go.wait()
        return await FakeArtifacts.put(self, key, content, media_type)


async def test_an_image_does_not_wait_for_a_sibling_that_is_slow_to_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is noted after a moment, though a sibling is not in and nothing more is to come."""
    monkeypatch.setattr(arrivals, "_GATHER_S", 0.001)
    orders, store = _orders(), StuckArtifacts()
    provider = FakeProvider([ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)])
    attempt = FakeAttempt(JOB, orders, on_checkpoint=lambda write: store.let_go.set())
    done = await _stage(orders, provider, store).run(attempt)
    assert [write.index for write in attempt.checkpoints if isinstance(write, ImageGenerated)] == [1]
    assert [write.index for write in done.writes if isinstance(write, ImageGenerated)] == [2]


async def test_an_attempt_that_is_cut_short_notes_what_is_stored() -> None:
    """A daemon that stops while a sibling is being stored loses nothing that is in the store: it is paid for."""
    orders, store = _orders(), StuckArtifacts()
    provider = FakeProvider([ImageMade(1, b"1", JPEG), ImageMade(2, b"2", JPEG)])
    running = asyncio.create_task(_stage(orders, provider, store).run(FakeAttempt(JOB, orders)))
    await store.is_stuck.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [image.status for image in orders.images] == ["generated", "pending"]


ELSEWHERE = replace(OPEN_CALL, key="b")


async def test_a_call_made_with_another_daemons_key_is_not_asked_for_here() -> None:
    """This daemon would only be refused: nothing is asked, noted or bought, and the job is for who has the key."""
    provider, orders = FakeProvider([Submitting()]), _orders(call=ELSEWHERE)
    attempt = FakeAttempt(replace(JOB, key_alias="a"), orders)
    stage = GenerateStage(
        orders=orders, store=FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100, keys={"fake": ("a",)}
    )
    with pytest.raises(KeyMissingError, match="the key b"):
        await stage.run(attempt)
    assert (provider.requests, attempt.checkpoints) == ([], [])


async def test_a_key_that_nobody_has_any_more_gives_way_to_the_attempts_own() -> None:
    """Its task is asked for with the key that the job was dealt."""
    provider = FakeProvider([ImageMade(1, b"one", JPEG), ImageMade(2, b"two", JPEG)])
    orders = _orders(call=replace(ELSEWHERE, is_key_known=False))
    stage = GenerateStage(
        orders=orders, store=FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100, keys={"fake": ("a",)}
    )
    await stage.run(FakeAttempt(replace(JOB, key_alias="a"), orders))
    assert provider.requests[0].resume == replace(ELSEWHERE, key="a", is_key_known=False)


async def test_a_lost_submit_under_another_daemons_key_is_for_its_provider_to_judge() -> None:
    """Where nobody can be asked what became of it, the key is not needed: it is closed as unknown and bought anew."""
    provider = FakeProvider([Submitting(), ImageMade(1, b"one", JPEG), ImageMade(2, b"two", JPEG)])
    orders = _orders(call=replace(ELSEWHERE, task_id=None))
    stage = GenerateStage(
        orders=orders, store=FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100, keys={"fake": ("a",)}
    )
    attempt = FakeAttempt(replace(JOB, key_alias="a"), orders)
    await stage.run(attempt)
    assert attempt.checkpoints[:2] == [CallEnded(1, 9, "unknown"), CallSubmitted(1, 9, "fake", (1, 2), None, "a")]


async def test_what_a_call_costs_is_noted() -> None:
    """Its price with the submit; with the end what the provider charges for, image or not, and its own words."""
    usage = {"total_tokens": 100}
    provider = FakeProvider([Submitting(), Charged(3, usage), ImageMade(1, b"one", JPEG), ImageMade(2, b"two", JPEG)])
    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    stage = GenerateStage(
        orders=orders, store=FakeArtifacts(), providers={"fake": provider}, max_photo_bytes=100, prices={"fake": Decimal("0.04")}
    )
    done = await stage.run(attempt)
    assert attempt.checkpoints[0] == CallSubmitted(1, 9, "fake", (1, 2), price=Decimal("0.04"))
    assert done.writes[-1] == CallEnded(1, 9, "succeeded", made=3, usage=usage)


async def test_each_call_of_an_attempt_costs_its_own() -> None:
    """What one was charged for is not said of the next."""
    script: list[ProviderEvent | Exception | None]
    script = [Submitting(), Charged(1), ImageMade(1, b"one", JPEG), None, Submitting(), ProviderUnavailableError("down")]
    attempt = FakeAttempt(JOB, orders := _orders())
    with pytest.raises(ProviderUnavailableError):
        await _stage(orders, FakeProvider(script)).run(attempt)
    ends = [write for write in attempt.checkpoints if isinstance(write, CallEnded)]
    assert ends == [CallEnded(1, 9, "partial", made=1), CallEnded(1, 9, "partial")]


async def test_nothing_is_bought_without_room() -> None:
    """Where images have no place the job is put off before the call: nothing is submitted and nothing noted."""
    asked: list[int] = []

    def full(images: int) -> None:
        asked.append(images)
        raise PutOffError("no room")

    orders = _orders()
    attempt = FakeAttempt(JOB, orders)
    stage = GenerateStage(
        orders=orders,
        store=FakeArtifacts(),
        providers={"fake": FakeProvider([Submitting(), ImageMade(1, b"one", JPEG), ImageMade(2, b"two", JPEG)])},
        max_photo_bytes=100,
        require_room=full,
    )
    with pytest.raises(PutOffError):
        await stage.run(attempt)
    assert (asked, attempt.checkpoints) == ([2], [])
