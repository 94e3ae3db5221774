"""What stages read of an order."""

from __future__ import annotations

from jobdaemon.domain.job import Task
from jobdaemon.domain.outcome import End, Transition
from jobdaemon.domain.write import CallSubmitted
from tests.factories import Claimed, Jobs, Sql


async def test_a_batch_begins_with_what_its_prompt_has_in_the_order(claimed_job_factory: Claimed, sql: Sql) -> None:
    """Its own images and all others of the same prompt, whatever became of them: where an image stands among them counts."""
    order_id = claimed_job_factory.orders("Start", prompts=["a", "b"], images=6)
    sql.execute(
        "UPDATE jobdaemon.images SET status = 'generated', provider = 'other', locator = 'https://x.example/1?a=\"b\"'"
        " WHERE order_id = %s AND index = 4",
        [order_id],
    )
    reads = claimed_job_factory.store.orders
    whole = {row.index: row for row in await reads.load_images(order_id)}
    by_prompt = {prompt: [row for row in whole.values() if row.prompt == prompt] for prompt in "ab"}
    assert [len(rows) for rows in by_prompt.values()] == [3, 3]
    for prompt, rows in by_prompt.items():
        batch = await reads.load_batch(order_id, 0, [rows[1].index])
        assert batch is not None
        assert batch.images == rows, prompt
        assert batch.order == await reads.load_order(order_id)
        assert batch.open_call is None
    assert await reads.load_batch(order_id + 1, 0, [1]) is None
    both = await reads.load_batch(order_id, 0, [1, 6])
    assert both is not None
    assert both.images == list(whole.values())


async def test_a_batch_begins_with_the_call_its_job_left_open(claimed_job_factory: Claimed, job_factory: Jobs, sql: Sql) -> None:
    """The newest that is not known to have ended, of this job alone, with all that is known of it."""
    order_id = claimed_job_factory.orders("Free")
    job_factory("generate.local", Task.GENERATE, args={"order_id": order_id, "images": [1, 2]})
    [job] = await claimed_job_factory.claim("generate.local", 1)
    note = CallSubmitted(order_id, job.id, "local", (1, 2), "task-1", "k")
    await claimed_job_factory.store.commit([Transition(job, End.CHECKPOINT, writes=(note,))], daemon_id=None)
    reads = claimed_job_factory.store.orders
    batch = await reads.load_batch(order_id, job.id, [1])
    assert batch is not None
    assert batch.open_call is not None
    call = batch.open_call
    assert (call.task_id, call.images, call.key, call.is_key_known) == ("task-1", (1, 2), "k", False)
    assert call == await reads.unfinished_call(call.id)
    other = await reads.load_batch(order_id, job.id + 1, [1])
    assert other is not None
    assert other.open_call is None
    sql.execute("UPDATE jobdaemon.provider_calls SET outcome = 'succeeded'")
    ended = await reads.load_batch(order_id, job.id, [1])
    assert ended is not None
    assert ended.open_call is None


async def test_an_image_whose_number_nobody_can_have_is_none(claimed_job_factory: Claimed) -> None:
    """Anybody may defer a job with any numbers; those that are images of the order are made all the same."""
    order_id = claimed_job_factory.orders("Free")
    batch = await claimed_job_factory.store.orders.load_batch(order_id, 1, [1, 2**31, 2**63 - 1])
    assert batch is not None
    assert [image.index for image in batch.images] == [1, 2]
