"""The settings of each provider: one class per ``[generate.<provider>]``. A new provider adds its class here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jobdaemon.settings_sources import Problem, array_of_tables, array_of_text
from jobdaemon.settings_values import (
    Cores,
    LongerThanZero,
    Name,
    OptionalPath,
    OptionalSecret,
    OptionalText,
    PerSecond,
    Section,
    ServiceUrl,
    Share,
    Size,
    WebUrls,
    Whole,
    blank,
    cores,
    number,
)

#: How a provider gets the photo: in the request itself, by a signed link into the artifact store, or by a link at Superbed.
PhotoLink = Literal["inline", "store", "superbed"]
OnUnknownSubmit = Literal["retry", "fail"]
ImagesPerCall = Annotated[Whole, Field(ge=1, le=15)]
#: In whatever currency the operator counts.
Price = Annotated[Decimal, BeforeValidator(number), Field(ge=0, le=1_000_000, decimal_places=6)]
OptionalPrice = Annotated[Price | None, BeforeValidator(blank)]
Pixels = Annotated[Whole, Field(ge=64, le=16_384)]


class ProviderKeySettings(Section):
    """
    One key of a provider, and what may start under it over all daemons. The limits are written into the database when it does not
    have this key, and never over what an operator set there.

    Attributes:
        alias: what rows, logs and the CLI call it.
        key: the secret. Contents of *key_file*, when given.
        key_file: a file that holds it.
        concurrency: most calls at once; None is no limit, as below.
        rate: calls started per second, evenly spaced.
        daily_budget: images asked for per day, UTC.
    """

    alias: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    key: OptionalSecret = None
    key_file: OptionalPath = None
    concurrency: Annotated[Whole, Field(ge=0, le=100_000)] | None = None
    rate: PerSecond | None = None
    daily_budget: Annotated[Whole, Field(ge=0, le=1_000_000_000)] | None = None


#: ``[[generate.<provider>.keys]]``: give the section of a provider a field ``keys: ProviderKeys = ()``.
ProviderKeys = Annotated[tuple[ProviderKeySettings, ...], BeforeValidator(array_of_tables)]


class LocalGenerateSettings(Section):
    """
    The built-in provider.

    Attributes:
        threads: CPU threads for image making, over all jobs of this daemon.
    """

    threads: Annotated[Cores, Field(ge=1, le=1024)] = Field(default_factory=cores)


class OpenAIImagesSettings(Section):
    """
    A gateway that speaks OpenAI's image API.

    Attributes:
        base_url: with the version, without the path of an endpoint.
        api_key: contents of *api_key_file*, when given.
        api_key_file: a file that holds it.
        keys: several keys with limits of their own, instead of *api_key*.
        model: what the gateway calls it.
        api: images, or chat for models that a gateway offers by chat only; then size, quality and response_format are not sent.
        endpoint: edits sends the photo, generations only the prompt.
        images_per_call: most images of one call; some models make one whatever is asked.
        size: as the model names it.
        quality: as the model names it; left out when empty.
        response_format: url or b64_json for models that take it; left out when empty.
        timeout: the longest one call may take.
        on_unknown_submit: after a lost answer: retry buys again, fail ends those images.
        price_per_image: what one costs, in any currency, for the view spend; left out when empty.
    """

    base_url: ServiceUrl = "https://api.openai.com/v1"
    api_key: OptionalSecret = None
    api_key_file: OptionalPath = None
    keys: ProviderKeys = ()
    model: Annotated[str, Field(min_length=1, max_length=200)] = "gpt-image-2"
    api: Literal["images", "chat"] = "images"
    endpoint: Literal["edits", "generations"] = "edits"
    images_per_call: Annotated[Whole, Field(ge=1, le=10)] = 5
    size: OptionalText = "1024x1536"
    quality: OptionalText = None
    response_format: OptionalText = None
    timeout: LongerThanZero = timedelta(seconds=180)
    on_unknown_submit: OnUnknownSubmit = "retry"
    price_per_image: OptionalPrice = None


class DashScopeSettings(Section):
    """
    Aliyun DashScope (Model Studio).

    Attributes:
        base_url: of the key's region, without /api/v1.
        api_key: contents of *api_key_file*, when given.
        api_key_file: a file that holds it.
        keys: several keys with limits of their own, instead of *api_key*.
        workspace: sent as X-DashScope-WorkSpace when given.
        model: decides the endpoint and the form of the request.
        images_per_call: most images of one call; the service makes four at most.
        size: as the model names it, such as 1024*1536; left out when empty.
        negative_prompt: what is not wanted; left out when empty.
        photo: how the service gets the photo.
        poll: how often a task is asked for.
        polls_per_second: most questions a second of this daemon, over all its tasks. An account has 20. Source:
            manage-asynchronous-tasks.
        task_timeout: the longest a task is waited for in one attempt.
        on_unknown_submit: after a lost answer whose task cannot be found: retry buys again, fail ends those images.
        price_per_image: what one costs, in any currency, for the view spend; left out when empty.
    """

    base_url: ServiceUrl = "https://dashscope.aliyuncs.com"
    api_key: OptionalSecret = None
    api_key_file: OptionalPath = None
    keys: ProviderKeys = ()
    workspace: OptionalText = None
    model: Annotated[str, Field(min_length=1, max_length=200)] = "wan2.5-i2i-preview"
    images_per_call: Annotated[Whole, Field(ge=1, le=4)] = 4
    size: OptionalText = None
    negative_prompt: OptionalText = None
    photo: PhotoLink = "inline"
    poll: LongerThanZero = timedelta(seconds=5)
    polls_per_second: PerSecond = 10.0
    task_timeout: LongerThanZero = timedelta(seconds=180)
    on_unknown_submit: OnUnknownSubmit = "retry"
    price_per_image: OptionalPrice = None


class JimengSettings(Section):
    """
    Volcengine Jimeng.

    Attributes:
        access_key_id: contents of *access_key_id_file*, when given.
        access_key_id_file: a file that holds it.
        secret_access_key: contents of *secret_access_key_file*, when given.
        secret_access_key_file: a file that holds it.
        keys: several keys with limits of their own instead, each ``<access key id>:<secret access key>``.
        req_key: the model.
        images_per_call: most images of one call; more than one lets the prompt decide how many come, each of them paid for.
        width: pixels.
        height: pixels.
        strength: how far the photo may be left behind, 0.0 to 1.0.
        photo: how the service gets the photo; in the request only with models that take it (jimeng_i2i_v30).
        poll: how often a task is asked for.
        task_timeout: the longest a task is waited for in one attempt.
        on_unknown_submit: after a lost answer: retry buys again, fail ends those images.
        price_per_image: what one costs, in any currency, for the view spend; left out when empty.
    """

    base_url: ServiceUrl = "https://visual.volcengineapi.com"
    access_key_id: OptionalSecret = None
    access_key_id_file: OptionalPath = None
    secret_access_key: OptionalSecret = None
    secret_access_key_file: OptionalPath = None
    keys: ProviderKeys = ()
    req_key: Annotated[str, Field(min_length=1, max_length=200)] = "jimeng_t2i_v40"
    images_per_call: ImagesPerCall = 1
    width: Pixels = 1104
    height: Pixels = 1472
    strength: Share = 0.5
    photo: PhotoLink = "store"
    poll: LongerThanZero = timedelta(seconds=5)
    task_timeout: LongerThanZero = timedelta(seconds=180)
    on_unknown_submit: OnUnknownSubmit = "retry"
    price_per_image: OptionalPrice = None


class ComfyUISettings(Section):
    """
    ComfyUI servers of your own.

    Attributes:
        servers: their addresses; the least busy one gets the next call.
        workflow: a file in API format with placeholders; see docs/providers.md.
        images_per_call: most images of one call; the workflow must have a placeholder for it.
        width: pixels, for the placeholder.
        height: pixels, for the placeholder.
        poll: how often a prompt is asked for when its websocket says nothing.
        task_timeout: the longest a prompt is waited for in one attempt; below the queue's run_timeout.
    """

    servers: WebUrls = ()
    workflow: OptionalPath = None
    images_per_call: ImagesPerCall = 1
    width: Pixels = 1024
    height: Pixels = 1536
    poll: LongerThanZero = timedelta(seconds=5)
    task_timeout: LongerThanZero = timedelta(seconds=540)


class GenerateSettings(Section):
    """One section per provider."""

    local: LocalGenerateSettings = Field(default_factory=LocalGenerateSettings)
    openai_images: OpenAIImagesSettings = OpenAIImagesSettings()
    dashscope: DashScopeSettings = DashScopeSettings()
    jimeng: JimengSettings = JimengSettings()
    comfyui: ComfyUISettings = ComfyUISettings()

    def prices(self) -> dict[str, Decimal]:
        """Provider -> price of one image, where the settings say it."""
        sections = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: price for name, section in sections if (price := getattr(section, "price_per_image", None)) is not None}

    def usable(self) -> tuple[str, ...]:
        """Names of the providers whose section says enough to call them."""
        has_what_it_takes = {
            "local": True,
            "openai_images": self.openai_images.api_key is not None or bool(self.openai_images.keys),
            "dashscope": self.dashscope.api_key is not None or bool(self.dashscope.keys),
            "jimeng": (self.jimeng.access_key_id is not None and self.jimeng.secret_access_key is not None)
            or bool(self.jimeng.keys),
            "comfyui": bool(self.comfyui.servers) and self.comfyui.workflow is not None,
        }
        return tuple(name for name, is_usable in has_what_it_takes.items() if is_usable)


class SuperbedSettings(Section):
    """
    Superbed, where photos can be put for providers that fetch them.

    Attributes:
        url: of its upload.
        token: contents of *token_file*, when given.
        token_file: a file that holds it.
        album: put there; left out when empty.
        timeout: the longest one upload may take.
    """

    url: ServiceUrl = "https://api.superbed.cn/upload"
    token: OptionalSecret = None
    token_file: OptionalPath = None
    album: OptionalText = None
    timeout: LongerThanZero = timedelta(seconds=60)


class CacheSettings(Section):
    """
    Images that are bought once.

    Attributes:
        providers: whose images are kept and given again; none: nothing is.
        ttl: how long an image is kept.
        max_bytes: of all that is kept; what was not asked for the longest goes first.
    """

    providers: Annotated[tuple[Name, ...], BeforeValidator(array_of_text)] = ()
    ttl: LongerThanZero = timedelta(days=7)
    max_bytes: Size = 10_000_000_000


class PrewarmSettings(Section):
    """
    Photos that are beautified before anybody orders them.

    Attributes:
        ttl: how long such a photo is kept, and how long a prewarm waits for an idle slot.
        max_bytes: of all of them; what was made first goes first.
    """

    ttl: LongerThanZero = timedelta(hours=24)
    max_bytes: Size = 1_000_000_000


#: Settings of providers that say how images are asked for, and nothing of how they look. What is not here counts: a new setting
#: costs a few hits until it is listed, and never gives a wrong image.
_ONLY_HOW = {
    *("api_key", "api_key_file", "keys", "access_key_id", "access_key_id_file", "secret_access_key", "secret_access_key_file"),
    *("workspace", "images_per_call", "response_format", "photo", "servers", "threads"),
    *("timeout", "poll", "polls_per_second", "task_timeout", "on_unknown_submit", "price_per_image"),
}


def what_shapes_images(section: Section) -> dict[str, Any]:
    """The settings of one provider that may make a difference to its images, as JSON has them; no secret."""
    return section.model_dump(mode="json", exclude=_ONLY_HOW)


def provider_contradictions(generate: GenerateSettings, superbed: SuperbedSettings, chosen: str, store: str) -> Iterator[Problem]:
    """What a provider that is to be called lacks; *chosen* is the one of orders that name none, *store* the artifact store."""
    needs = {
        "openai_images": ("api_key",),
        "dashscope": ("api_key",),
        "jimeng": ("access_key_id", "secret_access_key"),
        "comfyui": ("servers", "workflow"),
    }
    for name in () if chosen in generate.usable() else needs.get(chosen, ()):
        if not getattr(getattr(generate, chosen), name):
            or_file = "" if chosen == "comfyui" else f" (or generate.{chosen}.{name}_file)"
            yield Problem(f"generate.{chosen}.{name}", f'must be set{or_file}, because orders.provider is "{chosen}"')
    for name, field in (("openai_images", "api_key"), ("dashscope", "api_key"), ("jimeng", "access_key_id")):
        if getattr(getattr(generate, name), field) is not None and getattr(generate, name).keys:
            yield Problem(f"generate.{name}.{field}", f"is given beside generate.{name}.keys: one of the two")
    for name, section in (("dashscope", generate.dashscope), ("jimeng", generate.jimeng)):
        if name not in (*generate.usable(), chosen):
            continue
        if section.photo == "store" and store != "r2":
            yield Problem(
                f"generate.{name}.photo",
                'is "store", but providers can fetch nothing from a folder: set store.kind to "r2", or photo to "superbed" or'
                ' "inline"',
            )
        if section.photo == "superbed" and superbed.token is None:
            yield Problem("superbed.token", f'must be set (or superbed.token_file), because generate.{name}.photo is "superbed"')
