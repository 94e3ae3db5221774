"""The settings of plans and orders: ``[plans.<plan>]`` and ``[orders]``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Literal, get_args

from pydantic import Field

from jobdaemon.settings_sources import Problem
from jobdaemon.settings_values import (
    DurationOrNever,
    LongerThanZero,
    Name,
    NamesByName,
    OptionalNames,
    OptionalPriority,
    Priority,
    Prompts,
    Section,
    Whole,
)

#: The door's own bound: enqueue_order refuses longer prompts.
MAX_PROMPT_BYTES = 4000

PlanName = Literal["Free", "Start", "Pro"]
PLAN_NAMES: tuple[PlanName, ...] = get_args(PlanName)


class StagePriorities(Section):
    """
    Where a plan's priority differs from stage to stage. None: the plan's own.

    Attributes:
        beautify: of its photos.
        generate: of its provider calls, whoever the provider is.
        upload: of its finished images.
    """

    beautify: OptionalPriority = None
    generate: OptionalPriority = None
    upload: OptionalPriority = None

    def named(self) -> dict[str, int]:
        """Stage -> priority, for the stages that have one."""
        return self.model_dump(exclude_none=True)


class PlanSettings(Section):
    """
    What a plan buys.

    Attributes:
        images: of an order that does not ask for fewer.
        priority: higher goes first.
        stage_priority: in stages where it is to be another.
        lift_after: work that waited longer is lifted over younger work.
        expires_after: an order still open then ends as failed, with a reason.
        max_open_orders: of this plan; more are refused as "queue full". 0 means no limit.
        max_open_orders_per_customer: of this plan, for one customer. 0 means no limit.
        fallback: providers that take over when the order's own fails, in this order; None means as ``orders.fallback`` says.
    """

    images: Annotated[Whole, Field(ge=1, le=1_000)]
    priority: Priority
    stage_priority: StagePriorities = StagePriorities()
    lift_after: LongerThanZero
    expires_after: LongerThanZero = timedelta(hours=24)
    max_open_orders: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 100
    max_open_orders_per_customer: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 0
    fallback: OptionalNames = None


class FreePlan(PlanSettings):
    """The defaults of Free."""

    images: Annotated[Whole, Field(ge=1, le=1_000)] = 2
    priority: Priority = 300
    lift_after: LongerThanZero = timedelta(minutes=5)


class StartPlan(PlanSettings):
    """The defaults of Start."""

    images: Annotated[Whole, Field(ge=1, le=1_000)] = 30
    priority: Priority = 200
    lift_after: LongerThanZero = timedelta(minutes=15)


class ProPlan(PlanSettings):
    """The defaults of Pro."""

    images: Annotated[Whole, Field(ge=1, le=1_000)] = 70
    priority: Priority = 100
    lift_after: LongerThanZero = timedelta(minutes=30)


class PlansSettings(Section):
    """The three plans, by the names customers know."""

    Free: FreePlan = FreePlan()
    Start: StartPlan = StartPlan()
    Pro: ProPlan = ProPlan()

    def __getitem__(self, name: PlanName) -> PlanSettings:
        plan: PlanSettings = getattr(self, name)
        return plan

    def items(self) -> Iterator[tuple[PlanName, PlanSettings]]:
        """Each plan with its name, highest default priority first."""
        return ((name, self[name]) for name in PLAN_NAMES)


_FREE_PROMPTS = ("A natural head-and-shoulders portrait in soft window light, plain light background, relaxed smile",)
_START_PROMPTS = (
    *_FREE_PROMPTS,
    "A business portrait in a dark blazer, even studio light, neutral grey background, calm and confident look",
    "An outdoor portrait in a green park at golden hour, background softly out of focus, warm skin tones",
    "A black and white studio portrait, gentle side light, fine grain, thoughtful expression",
    "A casual portrait in a bright cafe, knitted sweater, daylight from a large window, friendly smile",
    "An editorial portrait against a deep blue backdrop, clean soft light, simple elegant clothes",
)
_PRO_PROMPTS = (
    *_START_PROMPTS,
    "A portrait on a quiet city street at dusk, blurred lights behind, wool coat, looking past the camera",
    "A portrait by the sea on a clear morning, light breeze in the hair, linen shirt, pale blue horizon",
    "A portrait in a library, tall bookshelves out of focus, warm lamp light, composed expression",
    "A profile portrait with a soft rim of light, dark background, classical painting mood",
    "A portrait in an artist's studio, north light, canvas and brushes in the background, apron, natural pose",
    "A winter portrait in falling snow, scarf and warm coat, rosy cheeks, soft overcast light",
    "A formal evening portrait, dark suit or dress, subtle golden light, plain dark background",
    "A portrait in a spring garden, white blossom around the face, diffuse light, fresh pastel colours",
)


class PlanPrompts(Section):
    """Prompts of an order that brings none, by plan; dealt over its images in order."""

    Free: Prompts = _FREE_PROMPTS
    Start: Prompts = _START_PROMPTS
    Pro: Prompts = _PRO_PROMPTS

    def __getitem__(self, name: PlanName) -> tuple[str, ...]:
        prompts: tuple[str, ...] = getattr(self, name)
        return prompts


class OrdersSettings(Section):
    """
    What orders may ask for, and what they get when they do not ask.

    Attributes:
        provider: of an order that names none.
        images_per_call: most images of one provider call; a provider's own limit may be lower.
        fallback: provider of an order -> providers that take over when it fails, in this order.
        fallback_after: a provider has failed of which nothing can start for longer, by its circuit or its keys.
        prompts: of an order that brings none.
    """

    provider: Name = "local"
    images_per_call: Annotated[Whole, Field(ge=1, le=100)] = 5
    fallback: NamesByName = Field(default_factory=dict)
    fallback_after: LongerThanZero = timedelta(minutes=2)
    prompts: PlanPrompts = PlanPrompts()


class RetentionSettings(Section):
    """
    What becomes of orders that ended long ago.

    Attributes:
        photos: how long after its end the photos and jobs of an order are kept; until then it can be redriven. None: for ever.
        orders: how long after its end the order itself is kept, with its images' rows and its calls. None: for ever.
    """

    photos: DurationOrNever = timedelta(days=30)
    orders: DurationOrNever = None


def retention_contradictions(retention: RetentionSettings) -> Iterator[Problem]:
    """What cannot be kept for shorter than something else."""
    if retention.orders is None:
        return
    if retention.photos is None:
        yield Problem("retention.orders", "must be never where retention.photos is: an order goes after its photos and jobs")
    elif retention.orders < retention.photos:
        yield Problem("retention.orders", "must not be shorter than retention.photos: an order goes after its photos and jobs")


def plan_contradictions(plans: PlansSettings, orders: OrdersSettings) -> Iterator[Problem]:
    """What plans and their default prompts cannot mean together."""
    for name, plan in plans.items():
        prompts = orders.prompts[name]
        if plan.lift_after >= plan.expires_after:
            yield Problem(f"plans.{name}.lift_after", f"must be shorter than plans.{name}.expires_after")
        if len(prompts) > plan.images:
            yield Problem(f"orders.prompts.{name}", f"holds {len(prompts)} prompts, more than plans.{name}.images allows")
        if any(not prompt.strip() or len(prompt.encode(errors="replace")) > MAX_PROMPT_BYTES for prompt in prompts):
            text = f"has a prompt that is empty or longer than {MAX_PROMPT_BYTES} bytes"
            yield Problem(f"orders.prompts.{name}", text, is_alone=True)
