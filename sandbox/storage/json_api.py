"""The JSON API: buckets, their IAM policies, objects. Uploads are in `upload_api`, downloads in `downloads`."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any
from urllib.parse import quote

from aiohttp import web

from sandbox.storage import names
from sandbox.storage.blobs import Bucket, Preconditions, Store, StoredObject, joined
from sandbox.storage.call import PRECONDITION_PARAMETERS, Access, Call, Route
from sandbox.storage.checksums import encode_crc32c
from sandbox.storage.errors import (
    Dialect,
    already_owned,
    bucket_not_empty,
    forbidden,
    invalid,
    name_taken,
    not_modified,
    precondition_failed,
    reading_document,
    required,
    unsupported,
)
from sandbox.storage.iam import PERMISSIONS, checked_bindings, default_bindings
from sandbox.storage.uploads import MultipartUploads

STANDARD_PARAMETERS = frozenset({"alt", "prettyPrint", "fields", "projection"})
PAGE_LIMIT = 1000
COMPOSE_LIMIT = 32

_B = r"/storage/v1/b"
_BUCKET = _B + r"/(?P<bucket>[^/]+)"
_OBJECT = _BUCKET + r"/o/(?P<object>[^/]+)"
_DESTINATION = r"/b/(?P<to_bucket>[^/]+)/o/(?P<to_object>[^/]+)"
_SOURCE_PRECONDITIONS = frozenset(
    {
        "ifSourceGenerationMatch",
        "ifSourceGenerationNotMatch",
        "ifSourceMetagenerationMatch",
        "ifSourceMetagenerationNotMatch",
    }
)
_BUCKET_PRECONDITIONS = frozenset({"ifMetagenerationMatch", "ifMetagenerationNotMatch"})


class Entry(Enum):
    """What a name in a listing stands for."""

    OBJECT = "object"
    PREFIX = "prefix"


def json_response(call: Call, resource: Mapping[str, Any]) -> web.Response:
    """The resource, reduced to the `fields` that the request asks for."""
    if (fields := call.query.get("fields")) is not None:
        resource = select_fields(resource, fields)
    return web.json_response(resource)


def select_fields(resource: Any, fields: str) -> Any:
    """A partial response: `items(name,size),nextPageToken`, `items/name`, `*`."""
    if fields.count("(") != fields.count(")"):
        raise invalid(f"Invalid field selection {fields}")
    wanted: dict[str, list[str]] = {}
    for item in re.findall(r"[^,()]+(?:\((?:[^()]|\([^()]*\))*\))?", fields):
        match = re.fullmatch(r"([^/(]+)(?:/(.+)|\((.+)\))?", item.strip())
        if match is None:
            raise invalid(f"Invalid field selection {item.strip()}")
        wanted.setdefault(match[1], []).extend(filter(None, [match[2] or match[3]]))
    if "*" in wanted:
        return resource
    if isinstance(resource, list):
        return [select_fields(item, fields) for item in resource]
    return {
        key: select_fields(value, ",".join(wanted[key])) if wanted[key] else value
        for key, value in resource.items()
        if key in wanted
    }


def object_resource(base_url: str, bucket: Bucket, stored: StoredObject) -> dict[str, Any]:
    path = f"/b/{bucket.name}/o/{quote(stored.name, safe='')}"
    resource: dict[str, Any] = {
        "kind": "storage#object",
        "id": f"{bucket.name}/{stored.name}/{stored.generation}",
        "selfLink": f"{base_url}/storage/v1{path}",
        "mediaLink": f"{base_url}/download/storage/v1{path}?generation={stored.generation}&alt=media",
        "name": stored.name,
        "bucket": bucket.name,
        "generation": str(stored.generation),
        "metageneration": str(stored.metageneration),
        "storageClass": bucket.resource["storageClass"],
        "size": str(stored.size),
        "crc32c": encode_crc32c(stored.crc32c),
        "etag": stored.etag,
        "timeCreated": stored.created,
        "updated": stored.updated,
        "timeStorageClassUpdated": stored.created,
        "timeFinalized": stored.created,
    }
    if stored.md5 is not None:
        resource["md5Hash"] = stored.md5
    if stored.component_count is not None:
        resource["componentCount"] = stored.component_count
    return resource | stored.properties


def check_etags(call: Call, etag: str, *, reading: bool) -> None:
    """If-Match and If-None-Match, which the JSON API accepts on the resources that carry an etag."""
    known = {
        header: {value.strip().strip('"') for value in call.request.headers[header].split(",")}
        for header in ("If-Match", "If-None-Match")
        if header in call.request.headers
    }
    if "If-Match" in known and not known["If-Match"] & {etag, "*"}:
        raise precondition_failed("If-Match")
    if "If-None-Match" in known and known["If-None-Match"] & {etag, "*"}:
        raise not_modified() if reading else precondition_failed("If-None-Match")


class JsonApi:
    """Handlers of the JSON API's metadata routes."""

    def __init__(
        self,
        store: Store,
        uploads: MultipartUploads,
        access: Access,
        *,
        project: str | None,
        project_number: int,
        allowed_locations: frozenset[str] | None,
    ) -> None:
        self._store = store
        self._uploads = uploads
        self._access = access
        self._project = project
        self._project_number = project_number
        self._allowed_locations = allowed_locations

    def routes(self) -> Iterable[Route]:
        standard = STANDARD_PARAMETERS
        etags = frozenset({"if-match", "if-none-match"})
        buckets = standard | _BUCKET_PRECONDITIONS
        objects = standard | PRECONDITION_PARAMETERS | {"generation"}
        copies = standard | PRECONDITION_PARAMETERS | _SOURCE_PRECONDITIONS | {"sourceGeneration"}
        for method, path, handler, query, headers in (
            ("POST", _B, self.insert_bucket, standard | {"project", "enableObjectRetention"}, frozenset()),
            ("GET", _B, self.list_buckets, standard | {"project", "prefix", "maxResults", "pageToken"}, frozenset()),
            ("GET", _BUCKET, self.get_bucket, buckets, etags),
            ("PATCH", _BUCKET, self.patch_bucket, buckets, etags),
            ("DELETE", _BUCKET, self.delete_bucket, buckets, etags),
            ("GET", _BUCKET + "/iam", self.get_policy, standard | {"optionsRequestedPolicyVersion"}, frozenset()),
            ("PUT", _BUCKET + "/iam", self.set_policy, standard, frozenset()),
            ("GET", _BUCKET + "/iam/testPermissions", self.test_permissions, standard | {"permissions"}, frozenset()),
            (
                "GET",
                _BUCKET + "/o",
                self.list_objects,
                standard | {"prefix", "delimiter", "pageToken", "maxResults", "startOffset", "endOffset", "versions"},
                frozenset(),
            ),
            ("PATCH", _OBJECT, self.patch_object, objects, etags),
            ("DELETE", _OBJECT, self.delete_object, objects, etags),
            ("POST", _OBJECT + "/compose", self.compose, standard | PRECONDITION_PARAMETERS, frozenset()),
            ("POST", _OBJECT + "/rewriteTo" + _DESTINATION, self.rewrite, copies, frozenset()),
            ("POST", _OBJECT + "/copyTo" + _DESTINATION, self.copy, copies, frozenset()),
            ("POST", _OBJECT + "/moveTo/o/(?P<to_object>[^/]+)", self.move, copies - {"sourceGeneration"}, frozenset()),
        ):
            yield Route(method, path, handler, Dialect.JSON, query, headers)

    # Buckets

    async def insert_bucket(self, call: Call) -> web.StreamResponse:
        if call.query.get("enableObjectRetention", "false").lower() != "false":
            raise unsupported("object retention")
        project = self._requested_project(call, "storage.buckets.create")
        body = await call.body.read_object()
        name = body.get("name")
        if not name:
            raise required("name")
        names.check_bucket_name(str(name))
        if name in self._access.foreign_buckets:
            raise name_taken()
        if name in self._store.buckets:
            raise already_owned() if self._store.buckets[name].project == project else name_taken()
        resource = names.new_bucket_resource(body, self._allowed_locations)
        bucket = self._store.add_bucket(name, project, resource, default_bindings(project))
        return json_response(call, self._bucket_resource(call, bucket))

    async def list_buckets(self, call: Call) -> web.StreamResponse:
        project = self._requested_project(call, "storage.buckets.list")
        prefix = call.query.get("prefix", "")
        found = sorted(
            bucket.name
            for bucket in self._store.buckets.values()
            if bucket.project == project and bucket.name.startswith(prefix)
        )
        page, token = _page(found, call)
        items = [self._bucket_resource(call, self._store.buckets[name]) for name in page]
        return json_response(call, _listing("storage#buckets", items=items, nextPageToken=token))

    async def get_bucket(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.buckets.get")
        self._check_bucket(call, bucket, reading=True)
        return json_response(call, self._bucket_resource(call, bucket))

    async def patch_bucket(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.buckets.update")
        patch = await call.body.read_object()
        self._check_bucket(call, bucket)
        bucket.resource = names.patched_bucket_resource(bucket.resource, patch)
        self._store.touch_bucket(bucket)
        return json_response(call, self._bucket_resource(call, bucket))

    async def delete_bucket(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.buckets.delete")
        self._check_bucket(call, bucket)
        if bucket.objects:
            raise bucket_not_empty()
        self._store.remove_bucket(bucket)
        self._uploads.forget(bucket.name)
        return web.Response(status=204)

    # IAM

    async def get_policy(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.buckets.getIamPolicy")
        if (call.integer("optionsRequestedPolicyVersion") or 1) not in {1, 3}:
            raise invalid("Invalid value for optionsRequestedPolicyVersion: 1 or 3.")
        return json_response(call, self._policy_resource(bucket))

    async def set_policy(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.buckets.setIamPolicy")
        body = await call.body.read_object()
        if body.get("etag") not in (None, "", bucket.etag):
            raise precondition_failed("etag")
        bindings = checked_bindings(body, public_access_prevented=bucket.public_access_prevented)
        self._store.set_bindings(bucket, bindings)
        return json_response(call, self._policy_resource(bucket))

    async def test_permissions(self, call: Call) -> web.StreamResponse:
        if call.names["bucket"] in self._access.foreign_buckets:
            return json_response(call, {"kind": "storage#testIamPermissionsResponse"})
        asked = call.request.query.getall("permissions", [])
        if not asked:
            raise required("permissions")
        if unknown := set(asked) - PERMISSIONS:
            raise invalid(f"Invalid permission: {sorted(unknown)[0]}.")
        bucket = self._store.buckets.get(call.names["bucket"]) or self._bucket(call, "storage.buckets.get")
        held = PERMISSIONS if call.caller.is_operator else self._access.permissions(call.caller, bucket)
        response: dict[str, Any] = {"kind": "storage#testIamPermissionsResponse"}
        if granted := [permission for permission in asked if permission in held]:
            response["permissions"] = granted
        return json_response(call, response)

    # Objects

    async def list_objects(self, call: Call) -> web.StreamResponse:
        # `versions` changes nothing: versioning cannot be switched on here, so every object has one version.
        bucket = self._bucket(call, "storage.objects.list")
        entries = _entries(
            sorted(bucket.objects),
            prefix=call.query.get("prefix", ""),
            delimiter=call.query.get("delimiter", ""),
            start=call.query.get("startOffset", ""),
            end=call.query.get("endOffset"),
        )
        page, token = _page(entries, call)
        found = [bucket.objects[name] for name in page if entries[name] is Entry.OBJECT]
        items = [self._object_resource(call, bucket, stored) for stored in found]
        prefixes = [name for name in page if entries[name] is Entry.PREFIX]
        return json_response(call, _listing("storage#objects", items=items, prefixes=prefixes, nextPageToken=token))

    async def get_object(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.objects.get", resource="object")
        stored = self._live(call, bucket)
        call.preconditions().check(stored, reading=True)
        check_etags(call, stored.etag, reading=True)
        return json_response(call, self._object_resource(call, bucket, stored))

    async def patch_object(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.objects.update", resource="object")
        patch = await call.body.read_object()
        stored = self._live(call, bucket)
        self._check_object(call, stored)
        if stated := {"crc32c", "md5Hash", "name"} & set(patch):
            raise unsupported(f"patching the object field {sorted(stated)[0]!r}")
        merged = stored.properties | names.object_properties(patch)
        if patch.get("metadata") is not None:
            metadata = stored.properties.get("metadata", {}) | patch["metadata"]
            merged["metadata"] = {key: value for key, value in metadata.items() if value is not None} or None
        stored.properties = {key: value for key, value in merged.items() if value is not None}
        self._store.update_object(bucket, stored)
        return json_response(call, self._object_resource(call, bucket, stored))

    async def delete_object(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.objects.delete", resource="object")
        stored = self._live(call, bucket)
        self._check_object(call, stored)
        self._store.remove_object(bucket, stored)
        return web.Response(status=204)

    async def compose(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.objects.create", resource="object")
        body = await call.body.read_object()
        with reading_document():
            stored = self._composed(call, bucket, body)
        return json_response(call, self._object_resource(call, bucket, stored))

    def _composed(self, call: Call, bucket: Bucket, body: Mapping[str, Any]) -> StoredObject:
        if unknown := set(body) - {"kind", "sourceObjects", "destination"}:
            raise unsupported(f"{sorted(unknown)[0]!r} in a compose request")
        sources = body.get("sourceObjects", [])
        if not 1 <= len(sources) <= COMPOSE_LIMIT:
            raise invalid(
                f"The number of source components provided ({len(sources)}) exceeds the maximum ({COMPOSE_LIMIT})"
                if sources
                else "You must provide at least one source component."
            )
        name = call.names["object"]
        names.check_object_name(name)
        self._access.may_write(call.caller, bucket, name)
        self._access.require(call.caller, bucket, "storage.objects.get")
        components = [self._component(call, bucket, source) for source in sources]
        properties = names.object_properties(body.get("destination", {}))
        return self._store.publish(
            bucket,
            name,
            joined([self._store.content(bucket, component) for component in components]),
            properties,
            call.preconditions(),
            component_count=sum(component.component_count or 1 for component in components),
        )

    async def rewrite(self, call: Call) -> web.StreamResponse:
        bucket, stored = await self._copied(call, call.names["to_bucket"])
        size = str(stored.size)
        resource = self._object_resource(call, bucket, stored)
        progress = {"totalBytesRewritten": size, "objectSize": size, "done": True}
        return json_response(call, {"kind": "storage#rewriteResponse", **progress, "resource": resource})

    async def copy(self, call: Call) -> web.StreamResponse:
        bucket, stored = await self._copied(call, call.names["to_bucket"])
        return json_response(call, self._object_resource(call, bucket, stored))

    async def move(self, call: Call) -> web.StreamResponse:
        """Rename within a bucket, as one step."""
        bucket = self._bucket(call, "storage.objects.move", resource="object")
        source = self._live(call, bucket)
        if await call.body.read_object():
            raise unsupported("a body in a move request")
        if source.name == call.names["to_object"]:
            raise invalid("The source and destination of a move are the same object.")
        target, stored = await self._copied(call, bucket.name)
        self._store.remove_object(bucket, source)
        return json_response(call, self._object_resource(call, target, stored))

    async def _copied(self, call: Call, to_bucket: str) -> tuple[Bucket, StoredObject]:
        body = await call.body.read_object()
        source_bucket = self._bucket(call, "storage.objects.get", resource="object")
        name = call.names["to_object"]
        names.check_object_name(name)
        bucket = self._access.bucket(call.caller, to_bucket, "storage.objects.create", resource="object")
        self._access.may_write(call.caller, bucket, name)
        source = self._access.live(call.caller, source_bucket, call.names["object"], call.integer("sourceGeneration"))
        _source_preconditions(call).check(source)
        # A body replaces the source's properties; without one the copy keeps them.
        properties = names.object_properties({key: value for key, value in body.items() if key != "bucket"})
        stored = self._store.publish(
            bucket,
            name,
            self._store.content(source_bucket, source),
            properties or source.properties,
            call.preconditions(),
            component_count=source.component_count,
        )
        return bucket, stored

    def _component(self, call: Call, bucket: Bucket, source: Mapping[str, Any]) -> StoredObject:
        if unknown := set(source) - {"name", "generation", "objectPreconditions"}:
            raise unsupported(f"{sorted(unknown)[0]!r} of a source object")
        generation = source.get("generation")
        found = self._access.live(
            call.caller, bucket, source.get("name", ""), int(generation) if generation is not None else None
        )
        wanted = source.get("objectPreconditions", {}).get("ifGenerationMatch")
        Preconditions(generation_match=int(wanted) if wanted is not None else None).check(found)
        return found

    # Shared

    def _requested_project(self, call: Call, permission: str) -> str:
        project = call.query.get("project")
        if not project:
            raise required("project")
        if not call.caller.is_operator or self._project not in (None, project):
            raise forbidden(call.caller.shown_as, permission, "project")
        return project

    def _bucket(self, call: Call, permission: str, *, resource: str = "bucket") -> Bucket:
        return self._access.bucket(call.caller, call.names["bucket"], permission, resource=resource)

    def _live(self, call: Call, bucket: Bucket) -> StoredObject:
        return self._access.live(call.caller, bucket, call.names["object"], call.integer("generation"))

    def _check_bucket(self, call: Call, bucket: Bucket, *, reading: bool = False) -> None:
        wanted = call.integer("ifMetagenerationMatch")
        unwanted = call.integer("ifMetagenerationNotMatch")
        if wanted is not None and wanted != bucket.metageneration:
            raise precondition_failed("ifMetagenerationMatch")
        if unwanted == bucket.metageneration:
            raise not_modified() if reading else precondition_failed("ifMetagenerationNotMatch")
        check_etags(call, bucket.etag, reading=reading)

    def _check_object(self, call: Call, stored: StoredObject) -> None:
        call.preconditions().check(stored)
        check_etags(call, stored.etag, reading=False)

    def _bucket_resource(self, call: Call, bucket: Bucket) -> dict[str, Any]:
        return {
            "kind": "storage#bucket",
            "id": bucket.name,
            "selfLink": f"{_base_url(call)}/storage/v1/b/{bucket.name}",
            "name": bucket.name,
            "projectNumber": str(self._project_number),
            "metageneration": str(bucket.metageneration),
            "etag": bucket.etag,
            "timeCreated": bucket.created,
            "updated": bucket.updated,
        } | bucket.resource

    def _policy_resource(self, bucket: Bucket) -> dict[str, Any]:
        return {
            "kind": "storage#policy",
            "resourceId": f"projects/_/buckets/{bucket.name}",
            "version": 1,
            "etag": bucket.etag,
            "bindings": bucket.bindings,
        }

    def _object_resource(self, call: Call, bucket: Bucket, stored: StoredObject) -> dict[str, Any]:
        return object_resource(_base_url(call), bucket, stored)


def _base_url(call: Call) -> str:
    return f"{call.request.scheme}://{call.request.host}"


def _source_preconditions(call: Call) -> Preconditions:
    return Preconditions(
        call.integer("ifSourceGenerationMatch"),
        call.integer("ifSourceGenerationNotMatch"),
        call.integer("ifSourceMetagenerationMatch"),
        call.integer("ifSourceMetagenerationNotMatch"),
    )


def _entries(
    sorted_names: Iterable[str], *, prefix: str, delimiter: str, start: str, end: str | None
) -> dict[str, Entry]:
    """Names to list, in order: objects, and for names with the delimiter after the prefix their common part."""
    entries: dict[str, Entry] = {}
    for name in sorted_names:
        if not name.startswith(prefix) or name < start or (end is not None and name >= end):
            continue
        head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if found:
            entries[prefix + head + found] = Entry.PREFIX
        else:
            entries[name] = Entry.OBJECT
    return entries


def _page(sorted_names: Iterable[str], call: Call) -> tuple[list[str], str | None]:
    """A page of names and the token of the next; the token is the last name of the page."""
    wanted = call.integer("maxResults")
    limit = PAGE_LIMIT if wanted is None else min(wanted, PAGE_LIMIT)
    if limit < 1:
        raise invalid("Invalid value for maxResults: at least 1.")
    after = ""
    if token := call.query.get("pageToken"):
        try:
            after = base64.b64decode(token, altchars=b"-_", validate=True).decode()
        except ValueError as error:
            raise invalid("Invalid pageToken.") from error
    rest = [name for name in sorted_names if name > after]
    page = rest[:limit]
    more = len(rest) > limit
    return page, base64.urlsafe_b64encode(page[-1].encode()).decode() if more else None


def _listing(kind: str, **parts: Any) -> dict[str, Any]:
    """A list response; empty parts are left out, as the service does."""
    return {"kind": kind} | {name: value for name, value in parts.items() if value}
