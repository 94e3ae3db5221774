"""
The artifact store on Cloudflare R2, or anything that speaks S3 with conditional writes.

It owns one long-lived S3 client and translates every error of S3's into ours. Retries inside one call (a dropped connection, a
500) are botocore's; anything later, 429 above all, is the engine's: the error says how long to wait.

Facts about R2 (checksums, errors, limits): developers.cloudflare.com/r2, read 2026.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError, SSLError

from jobdaemon.domain.artifact import Artifact, is_valid_key
from jobdaemon.errors import ArtifactMissingError, SettingsError, StoreRefusedError, StoreUnavailableError, UnsupportedImageError
from jobdaemon.spool import Spool

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

#: The key of an artifact names its content, so what was fetched once never has to be asked for again.
CACHE_CONTROL = "public, max-age=31536000, immutable"
#: R2 takes one write per second and key; it need not say so in ``Retry-After``.
MIN_RATE_LIMIT_WAIT = timedelta(seconds=1)
#: A longer ``Retry-After`` is not believed: it is the store's guess, not an appointment.
MAX_RATE_LIMIT_WAIT = timedelta(hours=1)
#: S3's own bound of a signed URL.
MAX_SIGNED_LIFETIME = timedelta(days=7)

_READ_BYTES = 1 << 18
_PRECONDITION_FAILED = 412

#: What an operator has to look at, by S3 error code; each is the end of "The object store …".
_REFUSALS = {
    "Unauthorized": "does not know the access key: check access_key_id (and that the API token still exists)",
    "InvalidAccessKeyId": "does not know the access key: check access_key_id",
    "SignatureDoesNotMatch": "does not accept the signature: check secret_access_key",
    "AccessDenied": "denies access: check that the API token may read and write objects of this bucket",
    "NotEntitled": "is not enabled for this account: check the R2 subscription",
    "ObjectLockedByBucketPolicy": "forbids changing this object: check the bucket's lock rules",
    "NoSuchBucket": "has no such bucket: check bucket and endpoint_url (a jurisdiction has an endpoint of its own)",
    "InvalidBucketName": "does not accept the bucket's name: check bucket",
    "AuthorizationHeaderMalformed": "expects another region: check region and endpoint_url",
    "PermanentRedirect": "keeps this bucket elsewhere: check endpoint_url and region",
    "NotImplemented": "cannot do what is asked: check that endpoint_url is R2's, or a server with conditional writes",
}
#: The same when the answer has no code to go by: answers to HEAD have no body, and proxies answer in HTML.
_REFUSED_STATUSES = {401: "Unauthorized", 403: "AccessDenied", 501: "NotImplemented"}
#: 4xx answers that a later attempt may not get.
_TRANSIENT_CODES = {
    "BadDigest",
    "ClientDisconnect",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
}
_CLOCK_CODES = {"ExpiredRequest", "RequestExpired", "RequestTimeTooSkewed"}


class R2Store:
    """
    Keeps artifacts in a bucket that all daemons share.

    Args:
        endpoint_url: ``https://<account>.r2.cloudflarestorage.com``, or the jurisdiction's.
        bucket: its name.
        access_key_id, secret_access_key: of an API token that may read and write objects; never shown.
        prefix: put before every key, for instance ``jobdaemon/``.
        public_url: the bucket's public host, for instance ``https://img.example.com``; without it :meth:`url` gives None.
        region: ``auto`` for R2.
        connect_timeout, read_timeout: of one request.
        max_connections: how many calls run at once.
        tries: requests per call, with botocore's pauses between them (0 to 1, 2, then 4 s) after a lost connection or a 5xx.

    Raises:
        SettingsError: a value that cannot work; found without asking the network.
    """

    name = "r2"

    def __init__(
        self,
        endpoint_url: str,
        bucket: str,
        access_key_id: str,
        secret_access_key: str,
        *,
        prefix: str = "",
        public_url: str | None = None,
        region: str = "auto",
        connect_timeout: timedelta = timedelta(seconds=10),
        read_timeout: timedelta = timedelta(seconds=60),
        max_connections: int = 32,
        tries: int = 4,
    ) -> None:
        _require_url("endpoint_url", endpoint_url)
        # botocore would look for an empty key in files, the environment and a metadata service, and find somebody else's.
        for setting, value in (("bucket", bucket), ("access_key_id", access_key_id), ("secret_access_key", secret_access_key)):
            if not value:
                raise SettingsError(f"The R2 store needs {setting}.")
        prefix = prefix.strip("/")
        if prefix and not is_valid_key(prefix):
            raise SettingsError(f"The R2 store's prefix {prefix!r} may have letters, digits and ._=- between slashes only.")
        if public_url:
            host = _require_url("public_url", public_url)
            if host.endswith(".r2.cloudflarestorage.com"):
                raise SettingsError("The R2 store's public_url is the API host, which serves nobody without a signature.")
        self._endpoint_url = endpoint_url.rstrip("/")
        self._bucket = bucket
        self._access_key_id = access_key_id
        self._secret_access_key = secret_access_key
        self._prefix = f"{prefix}/" if prefix else ""
        self._public_url = public_url.rstrip("/") if public_url else None
        self._region = region
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._max_connections = max_connections
        self._tries = tries
        self._resources = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._opened: S3Client | None = None

    def __repr__(self) -> str:
        return f"R2Store({self._endpoint_url!r}, bucket={self._bucket!r}, prefix={self._prefix!r})"

    async def put(self, key: str, content: bytes, media_type: str) -> Artifact:
        """
        Create *key* with one conditional PutObject.

        Creating (``If-None-Match: *``) rather than asking first: the usual put is one request, and a repeated one, also after an
        answer that got lost, writes nothing, so it cannot run into R2's one write a second per key.

        Raises:
            StoreUnavailableError: unreachable, busy or rate limited. Retryable.
            StoreRefusedError: credentials, bucket, rights or a bad key. Permanent.
        """
        object_key = self._object_key(key)
        sha256, md5 = await asyncio.to_thread(_digests, (content,))
        artifact = Artifact(key=key, sha256=sha256, size_bytes=len(content), media_type=media_type)
        await self._put(object_key, artifact, md5, lambda: BytesIO(content))
        return artifact

    async def put_file(self, key: str, spool: Spool, media_type: str) -> Artifact:
        """As :meth:`put`; the bytes are read while they are sent."""
        object_key = self._object_key(key)
        sha256, md5 = await asyncio.to_thread(lambda: _digests(spool.blocks()))
        artifact = Artifact(key=key, sha256=sha256, size_bytes=spool.size_bytes, media_type=media_type)
        await self._put(object_key, artifact, md5, spool.opened)
        return artifact

    async def get(self, key: str, *, max_bytes: int) -> bytes:
        """
        The bytes under *key*; a larger object is not read beyond *max_bytes*.

        Raises:
            ArtifactMissingError, UnsupportedImageError, StoreRefusedError: Permanent.
            StoreUnavailableError: Retryable.
        """
        spool = _Blocks()
        await self._get(key, spool, max_bytes)
        return spool.joined()

    async def get_to_file(self, key: str, spool: Spool, *, max_bytes: int) -> None:
        """As :meth:`get`; the bytes are written while they are received."""
        await self._get(key, spool, max_bytes)

    async def delete(self, key: str) -> None:
        """Remove *key*; that it is not there is a success."""
        object_key = self._object_key(key)
        try:
            async with self._calling(object_key) as client:
                await client.delete_object(Bucket=self._bucket, Key=object_key)
        except ArtifactMissingError:
            return

    async def delete_folder(self, folder: str) -> None:
        """Remove all objects under *folder*, one after another: there are few."""
        prefix = f"{self._object_key(folder)}/"
        more: dict[str, Any] = {}
        while True:
            async with self._calling(prefix) as client:
                page = await client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **more)
            for listed in page.get("Contents", []):
                with suppress(ArtifactMissingError):
                    async with self._calling(listed["Key"]) as client:
                        await client.delete_object(Bucket=self._bucket, Key=listed["Key"])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def url(self, key: str) -> str | None:
        """The public URL of *key*, or None without a public host."""
        object_key = self._object_key(key)
        return None if self._public_url is None else f"{self._public_url}/{quote(object_key, safe='/-_.~')}"

    async def signed_url(self, key: str, lifetime: timedelta) -> str:
        """
        A URL with which anybody can get *key* for *lifetime*; made here, without asking whether the key is there.

        Args:
            lifetime: up to seven days, the most that such a signature may last.

        Raises:
            StoreRefusedError: a bad key.
        """
        object_key = self._object_key(key)
        seconds = max(1, int(min(lifetime, MAX_SIGNED_LIFETIME).total_seconds()))
        async with self._calling(object_key) as client:
            place = {"Bucket": self._bucket, "Key": object_key}
            return await client.generate_presigned_url("get_object", Params=place, ExpiresIn=seconds)

    async def check(self) -> None:
        """
        Write, read and remove a probe object; its key is new each time, for the sake of the limit per key.

        Raises:
            StoreUnavailableError, StoreRefusedError: with a sentence that says what to do.
        """
        key = f".check/{secrets.token_hex(8)}"
        content = secrets.token_bytes(64)
        await self.put(key, content, "application/octet-stream")
        try:
            if await self.get(key, max_bytes=len(content)) != content:
                raise StoreUnavailableError("The object store gave back other bytes than were written to it.")
        except ArtifactMissingError as exc:
            raise StoreUnavailableError("The object store does not have an object that it has just accepted.") from exc
        finally:
            await self.delete(key)

    async def close(self) -> None:
        """Free the connections; a later call opens new ones."""
        async with self._opening:
            self._opened = None
            await self._resources.aclose()

    async def _put(self, object_key: str, artifact: Artifact, md5: bytes, body: Callable[[], IO[bytes]]) -> None:
        created = await self._write(object_key, body(), artifact, md5, only_create=True)
        if not created and not await self._holds(object_key, artifact):
            await self._write(object_key, body(), artifact, md5, only_create=False)

    async def _get(self, key: str, sink: Spool | _Blocks, max_bytes: int) -> None:
        object_key = self._object_key(key)
        async with self._calling(object_key) as client:
            answer = await client.get_object(Bucket=self._bucket, Key=object_key)
            is_whole = await _read(answer["Body"], answer.get("ContentLength", 0), max_bytes, sink)
        if not is_whole:
            raise UnsupportedImageError(f"The artifact {key!r} is larger than {max_bytes} bytes.")
        expected = answer["Metadata"].get("sha256")
        if expected and sink.sha256 != expected:
            raise StoreUnavailableError(f"The object store gave back other bytes than were stored under {key!r}.")

    async def _write(self, object_key: str, body: IO[bytes], artifact: Artifact, md5: bytes, *, only_create: bool) -> bool:
        """One verified PutObject; False when *only_create* and the key is taken."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if only_create else {}
        try:
            async with self._calling(object_key) as client:
                answer = await client.put_object(
                    Bucket=self._bucket,
                    Key=object_key,
                    # A stream, because the HTTP client writes plain bytes in one go and blocks the loop with large ones.
                    Body=body,
                    ContentLength=artifact.size_bytes,
                    ContentType=artifact.media_type,
                    # R2 documents Content-MD5 for a single PUT, its SHA-256 for parts only.
                    ContentMD5=base64.b64encode(md5).decode(),
                    CacheControl=CACHE_CONTROL,
                    Metadata={"sha256": artifact.sha256},
                    **condition,
                )
        except _KeyTakenError:
            if only_create:
                return False
            raise StoreUnavailableError("The object store refused an unconditional write as if it had a condition.") from None
        # The ETag of a single PUT is the MD5 of the bytes; a bucket with encryption of its own may answer otherwise.
        if answer.get("ETag", "").strip('"') != md5.hex() and not await self._holds(object_key, artifact):
            raise StoreUnavailableError(f"The object store did not keep the bytes of {artifact.key!r} as they were sent.")
        return True

    async def _holds(self, object_key: str, artifact: Artifact) -> bool:
        try:
            async with self._calling(object_key) as client:
                head = await client.head_object(Bucket=self._bucket, Key=object_key)
        except ArtifactMissingError:
            return False
        return head["ContentLength"] == artifact.size_bytes and head["Metadata"].get("sha256") == artifact.sha256

    def _object_key(self, key: str) -> str:
        if not is_valid_key(key):
            raise StoreRefusedError(f"{key[:80]!r} is not a valid artifact key.")
        return self._prefix + key

    @asynccontextmanager
    async def _calling(self, object_key: str) -> AsyncIterator[S3Client]:
        """The client; what it raises is translated here and nowhere else."""
        try:
            yield await self._client()
        except ClientError as exc:
            raise self._translated(exc, object_key) from exc
        except (ParamValidationError, ValueError) as exc:
            # Both quote the value they do not like, and it may be a key pasted into the wrong setting.
            raise StoreRefusedError("The object store's client does not accept bucket or endpoint_url: check both.") from exc
        except SSLError as exc:
            reason = "No secure connection to the object store: check endpoint_url and this machine's clock"
            raise StoreUnavailableError(f"{reason} ({self._endpoint_url}).") from exc
        except (BotoCoreError, OSError) as exc:
            reason = type(exc).__name__
            raise StoreUnavailableError(f"The object store at {self._endpoint_url} does not answer ({reason}).") from exc

    def _translated(self, exc: ClientError, object_key: str) -> Exception:
        """Our error for an error answer. Its own message is left out: it may repeat what was sent."""
        meta: Mapping[str, Any] = exc.response.get("ResponseMetadata", {})
        status = int(meta.get("HTTPStatusCode", 0))
        code = str(exc.response.get("Error", {}).get("Code", status))
        if status == _PRECONDITION_FAILED:
            return _KeyTakenError()
        if status == 404 and code in {"NoSuchKey", "404"}:
            return ArtifactMissingError(f"The bucket {self._bucket!r} has no {object_key!r}.")
        shown = f"HTTP {status}" if code == str(status) else f"HTTP {status} {code[:60]}"
        where = f"(bucket {self._bucket!r}, {shown})"
        if status == 429 or status in {500, 502, 503, 504} or code in _TRANSIENT_CODES or status in {0, 408, 409}:
            waits = "is rate limiting us" if status == 429 else "cannot take the request at the moment"
            return StoreUnavailableError(f"The object store {waits} {where}.", retry_after=_retry_after(status, meta))
        if code in _CLOCK_CODES:
            return StoreUnavailableError(f"The object store thinks that our clock is wrong: check it {where}.")
        reason = _REFUSALS.get(code) or _REFUSALS.get(_REFUSED_STATUSES.get(status, ""), "does not accept the request")
        return StoreRefusedError(f"The object store {reason} {where}.")

    async def _client(self) -> S3Client:
        if self._opened is None:
            async with self._opening:
                if self._opened is None:
                    self._opened = await self._open()
        return self._opened

    async def _open(self) -> S3Client:
        """Import the S3 library (over half a second, hence in a thread) and make the client."""
        aioboto3, config_class = await asyncio.to_thread(_load_library)
        config = config_class(
            signature_version="s3v4",
            # The real SHA-256 in the signature; with Content-MD5 over https botocore would sign UNSIGNED-PAYLOAD.
            s3={"addressing_style": "path", "payload_signing_enabled": True},
            # R2 refuses the streamed checksum trailers that are otherwise sent (401 or 501).
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": self._tries},
            connect_timeout=self._connect_timeout.total_seconds(),
            read_timeout=self._read_timeout.total_seconds(),
            max_pool_connections=self._max_connections,
        )
        session = aioboto3.Session(
            aws_access_key_id=self._access_key_id, aws_secret_access_key=self._secret_access_key, region_name=self._region
        )
        client: S3Client = await self._resources.enter_async_context(
            session.client("s3", endpoint_url=self._endpoint_url, config=config)
        )
        # A stream makes botocore ask "Expect: 100-continue", and a server that does not answer that costs a read timeout.
        client.meta.events.register_last("before-call.s3", _send_without_asking)
        return client


class _KeyTakenError(Exception):
    """A conditional write found the key taken. Never leaves this module."""


def _load_library() -> tuple[Any, Any]:
    import aioboto3  # noqa: PLC0415 - see R2Store._open
    from aiobotocore.config import AioConfig  # noqa: PLC0415

    return aioboto3, AioConfig


def _send_without_asking(params: dict[str, Any], **_: object) -> None:
    params["headers"].pop("Expect", None)


def _require_url(setting: str, url: str) -> str:
    """The host of *url*, which must be a plain http(s) URL."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in {"http", "https"} or not host or parts.username or parts.query or parts.fragment:
        raise SettingsError(f"The R2 store's {setting} must be a URL such as https://host.example, without user or query.")
    return host


def _digests(blocks: Iterable[bytes]) -> tuple[str, bytes]:
    """SHA-256 in hex and MD5 in bytes; releases the interpreter lock while it works."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for block in blocks:
        sha256.update(block)
        md5.update(block)
    return sha256.hexdigest(), md5.digest()


class _Blocks:
    """A spool in memory."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._digest = hashlib.sha256()

    def write(self, block: bytes) -> None:
        self._digest.update(block)
        self._blocks.append(block)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def joined(self) -> bytes:
        return b"".join(self._blocks)


async def _read(body: Any, size_bytes: int, max_bytes: int, sink: Spool | _Blocks) -> bool:
    """All of *body* into *sink*; False, its connection dropped, when it is larger than *max_bytes*."""
    from aiohttp import ClientError as ConnectionBrokenError  # noqa: PLC0415 - heavy, and loaded by now

    left_bytes = max_bytes
    async with body:
        if size_bytes > max_bytes:
            body.close()
            return False
        try:
            while block := await body.read(_READ_BYTES):
                left_bytes -= len(block)
                if left_bytes < 0:
                    body.close()
                    return False
                await asyncio.to_thread(sink.write, block)
        except ConnectionBrokenError as exc:
            raise StoreUnavailableError("The object store broke off in the middle of an object.") from exc
    return True


def _retry_after(status: int, meta: Mapping[str, Any]) -> timedelta | None:
    """How long to wait: what the store asked for, within reason; on 429 at least one second."""
    asked = str(meta.get("HTTPHeaders", {}).get("retry-after", "")).strip()
    if asked.isascii() and asked.isdigit():
        wait = timedelta(seconds=min(int(asked[:9]), MAX_RATE_LIMIT_WAIT.total_seconds()))
    else:
        wait = None
    if status == 429:
        return max(wait or MIN_RATE_LIMIT_WAIT, MIN_RATE_LIMIT_WAIT)
    return wait
