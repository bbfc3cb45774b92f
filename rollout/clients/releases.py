"""Looking at followed models with etags, and the state of the watch in the target's bucket."""

from __future__ import annotations

from urllib.parse import quote

from rollout.catalog import validated
from rollout.clients.hub import METADATA_ATTEMPTS, HubClient
from rollout.clients.retrying import TRANSIENT_STATUSES, transient, with_retries
from rollout.clients.storage import StorageClient
from rollout.model import ModelRef
from rollout.releases import STATE_PREFIX, WatchState
from rollout.target import Target

_NOT_MODIFIED = 304


def look(hub: HubClient, model: ModelRef, etag: str) -> str | None:
    """The etag of the model's metadata now; None if it is still `etag`, which costs the hub and us no body.

    An error status gives an empty etag: the full look that follows explains it, with the repository's name.
    Raises TransientError if the hub does not answer.
    """
    url = f"{hub.endpoint}/api/models/{model.repo_id}/revision/{quote(model.revision, safe='')}"
    headers = hub.headers_for(url) | ({"If-None-Match": etag} if etag else {})

    def ask() -> str | None:
        with hub.pool.request("GET", url, headers) as response:
            response.text()  # the connection can be used again
            if response.status in TRANSIENT_STATUSES:
                raise transient(f"the hub answers with status {response.status}.", where=url)
            if response.status == _NOT_MODIFIED:
                return None
            return response.headers.get("ETag", "") if response.status < 400 else ""

    return with_retries(ask, attempts=METADATA_ATTEMPTS)


class WatchStore:
    """The state, written only over the generation that was read: of two watchers, one learns that it was too late."""

    def __init__(self, target: Target) -> None:
        self._storage = StorageClient(target)
        self._name = f"{STATE_PREFIX}{target.name}.json"
        self._generation = 0

    def read(self) -> WatchState:
        """The state; empty at the first look."""
        found = self._storage.read_json(self._name)
        if found is None:
            return WatchState()
        document, self._generation = found
        return validated(WatchState, document, where=f"gs://{self._storage.bucket_name}/{self._name}")

    def write(self, state: WatchState) -> None:
        """Keep the state. Raises AnotherWriter if another watcher has written since `read`, and BucketNotFound."""
        document = state.model_dump(mode="json")
        self._generation = self._storage.write_json(self._name, document, if_generation=self._generation)
