"""Cloud Storage: buckets, small objects, listings, leftovers. Bulk uploads are in `rollout.clients.uploads`."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import requests
from google.api_core import exceptions as api
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import AuthorizedSession, Request
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption

from rollout import errors
from rollout.bucket_objects import StoredObject
from rollout.clients.google_auth import client_options, credentials_for, google_errors
from rollout.clients.retrying import transient
from rollout.report import Action, Change
from rollout.target import Target
from rollout.transfer import ABANDONED_AFTER_DAYS

# Without this the official client asks for the bucket's metadata in a background thread, once per client: a request
# more, and one that needs storage.buckets.get. It is read at every call, so that setting it after the import is enough.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

MANAGED_BY = {"managed-by": "llm-rollout"}
"""Label of every bucket that we made: teardown removes no other."""

_LISTED = "items(name,size,crc32c,generation,updated,metadata),nextPageToken"
_CONNECTIONS = 32
"""Of the JSON API's own pool; more threads than that queue."""


class StorageClient:
    """One target's bucket."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.bucket_name = target.bucket
        self._credentials = credentials_for(target)
        anonymous = isinstance(self._credentials, AnonymousCredentials)
        session = requests.Session() if anonymous else AuthorizedSession(self._credentials)
        session.hooks["response"].append(self._count)
        self._client = storage.Client(
            project=target.project,
            credentials=self._credentials,
            client_options=client_options(target, "storage"),
            _http=session,
        )
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
        for scheme in ("https://", "http://"):
            session.mount(scheme, adapter)
        self._bucket = self._client.bucket(self.bucket_name)
        self._refresh_lock = threading.Lock()
        self.requests = 0
        """Answers so far, also to attempts that the official client repeats by itself."""

    @property
    def endpoint(self) -> str:
        return self.target.endpoint("storage")

    def auth_headers(self) -> dict[str, str]:
        """The Authorization header for requests that this module does not make itself; refreshed when due."""
        headers: dict[str, str] = {}
        with self._refresh_lock, _mapped(f"gs://{self.bucket_name}"):
            self._credentials.before_request(Request(), "PUT", self.endpoint, headers)
        return headers

    def _count(self, response: requests.Response, **_: object) -> requests.Response:
        self.requests += 1
        return response

    # The bucket

    def bucket_exists(self) -> bool:
        """Whether the bucket is there and readable.

        Raises:
            BucketNotOurs: it belongs to somebody else.
        """
        return self._found_bucket() is not None

    def granted_permissions(self, permissions: Iterable[str]) -> frozenset[str]:
        """Those of `permissions` that the caller has on the bucket."""
        with _mapped(f"gs://{self.bucket_name}"):
            return frozenset(self._bucket.test_iam_permissions(list(permissions)))

    def ensure_bucket(self, labels: Mapping[str, str] | None = None) -> Change:
        """Create the bucket if it is absent: uniform access, no public access, in the target's region.

        Returns:
            `created`; `unchanged` if it is there and carries our label; `adopted` if somebody else made it.

        Raises:
            BucketNotOurs: the name is taken by another project.
            BadInput: it lies in another region: weights would leave the region, and every start would pay for it.
            PermissionMissing: names the permission.
        """
        found = self._found_bucket()
        if found is None:
            return self._create_bucket({**MANAGED_BY, **(labels or {})})
        self._check_region(found)
        if self._is_ours(found):
            return self._bucket_change(Action.UNCHANGED, "")
        uniform = found.iam_configuration.uniform_bucket_level_access_enabled
        return self._bucket_change(Action.ADOPTED, "" if uniform else "uniform bucket-level access is off")

    def delete_bucket(self) -> Change:
        """Delete the bucket if we made it and it is empty; an adopted one is left alone.

        Raises:
            LeftoversFound: objects are still in it.
        """
        found = self._found_bucket()
        if found is None:
            return self._bucket_change(Action.UNCHANGED, "it does not exist")
        if not self._is_ours(found):
            return self._bucket_change(Action.ADOPTED, "not made by us: left alone")
        with _mapped(f"gs://{self.bucket_name}"):
            try:
                found.delete(if_metageneration_match=found.metageneration)
            except api.Conflict as error:
                raise errors.LeftoversFound(
                    "the bucket still holds objects.",
                    where=f"gs://{self.bucket_name}",
                    resolution=f"Look at them with: gcloud storage ls -r gs://{self.bucket_name}",
                ) from error
        return self._bucket_change(Action.DELETED, "")

    def _found_bucket(self) -> storage.Bucket | None:
        with _mapped(f"gs://{self.bucket_name}"):
            try:
                return self._client.get_bucket(self.bucket_name)
            except api.NotFound:
                return None
            except api.Forbidden as error:
                raise errors.BucketNotOurs(
                    "the bucket belongs to somebody else, or this account may not see it.",
                    where=f"gs://{self.bucket_name}",
                    resolution="Choose another bucket name, or ask its owner for storage.buckets.get.",
                ) from error

    def _create_bucket(self, labels: Mapping[str, str]) -> Change:
        bucket = self._client.bucket(self.bucket_name)
        bucket.iam_configuration.uniform_bucket_level_access_enabled = True
        bucket.iam_configuration.public_access_prevention = "enforced"
        bucket.labels = dict(labels)
        bucket.add_lifecycle_abort_incomplete_multipart_upload_rule(age=ABANDONED_AFTER_DAYS)
        with _mapped(f"gs://{self.bucket_name}"):
            try:
                self._client.create_bucket(bucket, project=self.target.project, location=self.target.region)
            except api.Conflict as error:
                raise errors.BucketNotOurs(
                    "the name is taken by another project: bucket names are shared by all users of Cloud Storage.",
                    where=f"gs://{self.bucket_name}",
                    resolution="Choose another bucket name in the target file.",
                ) from error
        return self._bucket_change(Action.CREATED, f"in {self.target.region}")

    def _check_region(self, found: storage.Bucket) -> None:
        if found.location_type == "region" and found.location.lower() != self.target.region:
            raise errors.BadInput(
                f"the bucket is in {found.location.lower()}, the target in {self.target.region}.",
                where=f"gs://{self.bucket_name}",
                resolution="Choose a bucket in the cluster's region: weights are read at every start of a pod.",
            )

    def _is_ours(self, found: storage.Bucket) -> bool:
        return MANAGED_BY.items() <= dict(found.labels).items()

    def _bucket_change(self, action: Action, detail: str) -> Change:
        return Change(action=action, kind="Bucket", name=f"gs://{self.bucket_name}", detail=detail)

    # Objects

    def list_objects(self, prefix: str = "") -> tuple[StoredObject, ...]:
        """All objects below `prefix`, sorted by name: one request per 1000.

        Raises:
            BucketNotFound, PermissionMissing, TransientError.
        """
        with _mapped(f"gs://{self.bucket_name}"):
            return tuple(_stored(blob) for blob in self._client.list_blobs(self._bucket, prefix=prefix, fields=_LISTED))

    def find(self, name: str) -> StoredObject | None:
        """One object's state now."""
        with _mapped(f"gs://{self.bucket_name}/{name}"):
            try:
                blob = self._bucket.get_blob(name)
            except api.NotFound as error:
                raise bucket_not_found(f"gs://{self.bucket_name}") from error
            return None if blob is None else _stored(blob)

    def read(self, name: str, *, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` up to, not including, `end` of an object; checked by crc32c when it is read whole.

        Raises:
            NotFound: there is no such object.
        """
        with _mapped(f"gs://{self.bucket_name}/{name}"):
            blob = self._bucket.blob(name)
            data: bytes = blob.download_as_bytes(
                start=start or None, end=None if end is None else end - 1, raw_download=True
            )
            return data

    def describe(self, stored: StoredObject, metadata: Mapping[str, str]) -> StoredObject:
        """Add custom metadata to exactly this generation of an object.

        Raises:
            AnotherWriter: the object was replaced meanwhile.
        """
        with _mapped(f"gs://{self.bucket_name}/{stored.name}"):
            blob = self._bucket.blob(stored.name, generation=stored.generation)
            blob.metadata = {**stored.metadata, **metadata}
            blob.patch(if_generation_match=stored.generation)
        return stored.model_copy(update={"metadata": {**stored.metadata, **metadata}})

    def move(self, source: StoredObject, name: str, *, if_generation: int) -> StoredObject:
        """Give an object its final name: a copy inside the service, then the old name is deleted.

        A bucket-local copy moves no data, and its precondition decides between two writers; multipart uploads, which
        made `source`, know no preconditions.

        Raises:
            AnotherWriter: the generation under the final name is not `if_generation` (0: it must not exist).
        """
        with _mapped(f"gs://{self.bucket_name}/{name}"):
            blob = self._bucket.blob(source.name, generation=source.generation)
            copy = self._bucket.blob(name)
            token, _, _ = copy.rewrite(
                blob, if_generation_match=if_generation, if_source_generation_match=source.generation
            )
            while token is not None:
                token, _, _ = copy.rewrite(
                    blob, token=token, if_generation_match=if_generation, if_source_generation_match=source.generation
                )
            moved = _stored(copy)
        self.delete(source)
        return moved

    def delete(self, stored: StoredObject) -> bool:
        """Delete exactly this generation; False if it was gone or replaced already."""
        with _mapped(f"gs://{self.bucket_name}/{stored.name}"):
            try:
                self._bucket.blob(stored.name).delete(if_generation_match=stored.generation)
            except (api.NotFound, api.PreconditionFailed):
                return False
            return True

    def delete_prefix(self, prefix: str) -> tuple[Change, ...]:
        """Delete what a listing shows below `prefix`; objects that change meanwhile stay."""
        return tuple(
            Change(action=Action.DELETED, kind="Object", name=f"gs://{self.bucket_name}/{stored.name}")
            for stored in self.list_objects(prefix)
            if self.delete(stored)
        )

    # Documents

    def read_json(self, name: str) -> tuple[Any, int] | None:
        """A JSON object and its generation, which `write_json` takes; None if there is none."""
        with _mapped(f"gs://{self.bucket_name}/{name}"):
            blob = self._bucket.blob(name)
            try:
                text = blob.download_as_bytes(raw_download=True)
            except api.NotFound:
                return None
            try:
                # Set from the response's x-goog-generation: the bytes and their version come from one answer.
                return json.loads(text), int(blob.generation)
            except ValueError as error:
                raise errors.RolloutError(
                    "the object is not JSON.", where=f"gs://{self.bucket_name}/{name}", resolution="Delete it."
                ) from error

    def write_json(self, name: str, data: Any, *, if_generation: int | None = None) -> int:
        """Write a JSON object and return its generation; None overwrites whatever is there.

        Raises:
            AnotherWriter: the object's generation is not `if_generation` (0: it must not exist).
        """
        blob = self._bucket.blob(name)
        text = json.dumps(data, indent=2, sort_keys=True) + "\n"
        try:
            with _mapped(f"gs://{self.bucket_name}/{name}"):
                blob.upload_from_string(text, content_type="application/json", if_generation_match=if_generation)
                return int(blob.generation)
        except errors.AnotherWriter:
            # If the answer to our own write was lost, the official client's retry meets that write.
            found = self.read_json(name)
            if found is None or found[0] != json.loads(text):
                raise
            return found[1]


def _stored(blob: storage.Blob) -> StoredObject:
    return StoredObject(
        name=blob.name,
        size_bytes=int(blob.size),
        crc32c=int.from_bytes(base64.b64decode(blob.crc32c), "big"),
        generation=int(blob.generation),
        updated_at=blob.updated,
        metadata=dict(blob.metadata or {}),
    )


@contextlib.contextmanager
def _mapped(where: str) -> Iterator[None]:
    """Turn the vendor's exceptions into ours; a failed precondition on an object means that another run wrote it."""
    try:
        with google_errors(where):
            yield
    except errors.ConcurrentChange as error:
        raise another_writer(where) from error
    except errors.NotFound as error:
        if "bucket does not exist" in error.summary:
            raise bucket_not_found(where) from error
        raise
    except (DataCorruption, requests.RequestException, OSError) as error:
        raise transient(f"Cloud Storage does not answer rightly ({type(error).__name__}).", where=where) from error


def another_writer(where: str) -> errors.AnotherWriter:
    return errors.AnotherWriter(
        "another run wrote this in the meantime.", where=where, resolution="Let that run finish, then rerun."
    )


def bucket_not_found(where: str) -> errors.BucketNotFound:
    return errors.BucketNotFound(
        "the bucket does not exist.", where=where, resolution="Check the name, or let the rollout create the bucket."
    )
