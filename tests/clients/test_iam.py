"""Service accounts and policies: idempotent, and never at the cost of somebody else's binding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client

from rollout.clients.gke import Gke
from rollout.clients.google_auth import RestApi
from rollout.clients.iam import (
    OBJECT_VIEWER,
    OWNERSHIP_DESCRIPTION,
    WORKLOAD_IDENTITY_USER,
    BucketPolicy,
    PolicyDocument,
    PolicyStore,
    ProjectPolicy,
    ServiceAccountPolicy,
    ServiceAccounts,
    ensure_binding,
    has_binding,
    remove_binding,
    with_member,
    without_member,
)
from rollout.errors import BadInput, BucketNotFound, ConcurrentChange, NotFound, PermissionMissing, TransientError
from rollout.report import Action, Change
from rollout.target import Target
from sandbox.google_apis import Delays, GoogleApisServer
from sandbox.storage import StorageServer

EMAIL = "gemma-gsa@rehearsal-project.s3ns.iam.gserviceaccount.com"
CONDITIONAL = {
    "role": OBJECT_VIEWER,
    "members": ["user:somebody@example.com"],
    "condition": {"title": "until", "expression": "request.time < timestamp('2030-01-01T00:00:00Z')"},
}
OBJECT_ADMIN = "roles/storage.objectAdmin"
OTHERS = {"role": OBJECT_ADMIN, "members": ["user:somebody@example.com"]}


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StorageServer]:
    with StorageServer(root=tmp_path / "storage") as server:
        yield server


@pytest.fixture
def target(google_apis: GoogleApisServer, storage: StorageServer, target_for: Callable[..., Target]) -> Target:
    target = target_for(google_apis, storage=storage.url)
    client = Client(
        project=target.project, credentials=AnonymousCredentials(), client_options={"api_endpoint": storage.url}
    )
    bucket = client.bucket(target.bucket)
    bucket.iam_configuration.uniform_bucket_level_access_enabled = True
    client.create_bucket(bucket, location=target.region)
    return target


def create_account(target: Target, description: str) -> None:
    """What somebody else, or an earlier attempt, did."""
    body = {"accountId": "gemma-gsa", "serviceAccount": {"description": description}}
    RestApi(target, "iam").post(f"/v1/projects/{target.project}/serviceAccounts", body)


StoreMaker = Callable[[Target], PolicyStore]


def account_policy(target: Target) -> PolicyStore:
    ServiceAccounts(target).ensure(target.gsa)
    return ServiceAccountPolicy(target, target.gsa_email)


def bucket_policy(target: Target) -> PolicyStore:
    return BucketPolicy(target, target.bucket)


STORES = [
    pytest.param(account_policy, WORKLOAD_IDENTITY_USER, id="service account"),
    pytest.param(bucket_policy, OBJECT_VIEWER, id="bucket"),
    pytest.param(ProjectPolicy, "roles/viewer", id="project"),
]


def test_a_service_account_is_made_once_and_known_as_ours(google_target: Target) -> None:
    accounts = ServiceAccounts(google_target)

    made, created = accounts.ensure("gemma-gsa")
    again, unchanged = accounts.ensure("gemma-gsa")

    assert (made.email, made.is_ours, again) == (EMAIL, True, made)
    assert (created.action, unchanged.action) == (Action.CREATED, Action.UNCHANGED)


def test_somebody_elses_service_account_is_adopted(google_target: Target) -> None:
    accounts = ServiceAccounts(google_target)
    create_account(google_target, "theirs")

    _, change = accounts.ensure("gemma-gsa")

    assert change.action is Action.ADOPTED


def test_a_new_service_account_is_awaited_until_it_can_be_read(
    serve_google_apis: Callable[..., GoogleApisServer], target_for: Callable[..., Target]
) -> None:
    target = target_for(serve_google_apis(delays=Delays(iam_propagation_s=0.3)))
    accounts = ServiceAccounts(target)

    account, _ = accounts.ensure("gemma-gsa")

    assert accounts.get(account.email) == account


def test_an_account_made_a_moment_ago_by_a_killed_attempt_is_ours(
    serve_google_apis: Callable[..., GoogleApisServer], target_for: Callable[..., Target]
) -> None:
    target = target_for(serve_google_apis(delays=Delays(iam_propagation_s=0.3)))
    create_account(target, OWNERSHIP_DESCRIPTION)

    _, change = ServiceAccounts(target).ensure("gemma-gsa")

    assert change.action is Action.UNCHANGED


def test_deleting_a_service_account_twice_is_no_error(google_target: Target) -> None:
    accounts = ServiceAccounts(google_target)
    accounts.ensure("gemma-gsa")

    first, second = accounts.delete(EMAIL), accounts.delete(EMAIL)

    assert first is not None
    assert (first.action, first.name, second) == (Action.DELETED, EMAIL, None)
    assert accounts.get(EMAIL) is None


def test_a_missing_permission_is_named(google_target: Target, google_apis: GoogleApisServer) -> None:
    google_apis.deny("iam.serviceAccounts.create")

    with pytest.raises(PermissionMissing, match=r"iam\.serviceAccounts\.create"):
        ServiceAccounts(google_target).ensure("gemma-gsa")


def test_a_name_that_iam_refuses_is_bad_input(google_target: Target) -> None:
    with pytest.raises(BadInput, match="between 6 and 30 characters"):
        ServiceAccounts(google_target).ensure("gsa")


@pytest.mark.parametrize(("store_of", "role"), STORES)
def test_a_binding_is_made_once_and_taken_back_once(target: Target, store_of: StoreMaker, role: str) -> None:
    store = store_of(target)
    member = "user:me@example.com"

    made, again = ensure_binding(store, role, member), ensure_binding(store, role, member)
    held = has_binding(store, role, member)
    taken, gone = remove_binding(store, role, member), remove_binding(store, role, member)

    assert made is not None
    assert taken is not None
    assert (made.action, made.kind, made.name) == (Action.CREATED, "IamBinding", f"{store.name} {role} {member}")
    assert (again, held, taken.action, gone) == (None, True, Action.DELETED, None)
    assert not has_binding(store, role, member)


@pytest.mark.parametrize(("store_of", "role"), STORES)
def test_writers_that_race_on_one_policy_lose_no_binding(target: Target, store_of: StoreMaker, role: str) -> None:
    """Every writer reads before any of them writes: without etags the last one would win."""
    members = [f"user:writer-{number}@example.com" for number in range(3)]
    store_of(target)
    together = threading.Barrier(len(members))

    def write(member: str) -> Change | None:
        return ensure_binding(_ReadTogether(store_of(target), together), role, member)

    with ThreadPoolExecutor(len(members)) as writers:
        changes = list(writers.map(write, members))

    assert all(changes)
    assert all(has_binding(store_of(target), role, member) for member in members)


def test_a_grant_is_awaited_until_it_can_be_read(target: Target) -> None:
    store = _ShowsLate(BucketPolicy(target, target.bucket), stale_reads=2)
    assert ensure_binding(store, OBJECT_VIEWER, "user:late@example.com") is not None
    assert has_binding(store, OBJECT_VIEWER, "user:late@example.com")
    assert store.stale_reads == 0


class _ShowsLate:
    """A policy store that answers its first reads after a write with the policy from before."""

    def __init__(self, store: PolicyStore, stale_reads: int) -> None:
        self._store = store
        self.stale_reads = stale_reads
        self._before: PolicyDocument | None = None

    @property
    def name(self) -> str:
        return self._store.name

    def read(self) -> PolicyDocument:
        if self._before is not None and self.stale_reads:
            self.stale_reads -= 1
            return self._before
        return self._store.read()

    def write(self, policy: PolicyDocument) -> None:
        self._before = self._store.read()
        self._store.write(policy)


class _ReadTogether:
    """A policy store whose first read waits for the other writers' first reads."""

    def __init__(self, store: PolicyStore, together: threading.Barrier) -> None:
        self._store = store
        self._together = together
        self._first = True

    @property
    def name(self) -> str:
        return self._store.name

    def read(self) -> PolicyDocument:
        policy = self._store.read()
        if self._first:
            self._first = False
            self._together.wait(timeout=240)
        return policy

    def write(self, policy: PolicyDocument) -> None:
        self._store.write(policy)


@pytest.mark.parametrize(("store_of", "role"), STORES)
def test_a_write_with_a_stale_etag_is_a_concurrent_change(target: Target, store_of: StoreMaker, role: str) -> None:
    store = store_of(target)
    stale = with_member(store.read(), role, "user:slow@example.com")
    ensure_binding(store, role, "user:quick@example.com")

    assert stale is not None
    with pytest.raises(ConcurrentChange):
        store.write(stale)


def test_other_bindings_and_conditions_of_a_project_survive(google_target: Target) -> None:
    store = ProjectPolicy(google_target)
    store.write(store.read() | {"version": 3, "bindings": [CONDITIONAL, OTHERS]})

    ensure_binding(store, OBJECT_VIEWER, "user:me@example.com")
    with_ours = store.read()["bindings"]
    remove_binding(store, OBJECT_VIEWER, "user:me@example.com")

    assert {"role": OBJECT_VIEWER, "members": ["user:me@example.com"]} in with_ours
    assert CONDITIONAL in with_ours
    assert store.read()["bindings"] == [CONDITIONAL, OTHERS]


def test_adding_and_removing_a_member_keeps_everything_else_of_a_policy() -> None:
    audit = [{"service": "allServices"}]
    policy = {"version": 3, "etag": "e", "bindings": [CONDITIONAL, OTHERS], "auditConfigs": audit}

    added = with_member(policy, OBJECT_ADMIN, "user:me@example.com")

    assert added == policy | {
        "bindings": [CONDITIONAL, OTHERS | {"members": ["user:somebody@example.com", "user:me@example.com"]}]
    }
    assert without_member(added, OBJECT_ADMIN, "user:me@example.com") == policy
    assert without_member(policy, OBJECT_VIEWER, "user:somebody@example.com") is None


def test_workload_identity_is_refused_until_a_cluster_made_the_pool(google_target: Target) -> None:
    store = account_policy(google_target)
    policy = with_member(store.read(), WORKLOAD_IDENTITY_USER, google_target.workload_identity_member)
    assert policy is not None

    with pytest.raises(TransientError, match="first cluster"):
        store.write(policy)
    Gke(google_target).ensure()

    assert ensure_binding(store, WORKLOAD_IDENTITY_USER, google_target.workload_identity_member) is not None


def test_a_granted_pod_is_its_service_account(google_target: Target, google_apis: GoogleApisServer) -> None:
    Gke(google_target).ensure()
    store = account_policy(google_target)
    ensure_binding(store, WORKLOAD_IDENTITY_USER, google_target.workload_identity_member)

    member = google_apis.workload_identity("default", "gemma-ksa", {"iam.gke.io/gcp-service-account": EMAIL})

    assert member == f"serviceAccount:{EMAIL}" == google_target.reader_member("123456789012")


def test_the_policy_of_a_bucket_that_is_not_there_names_the_bucket(target: Target) -> None:
    with pytest.raises(BucketNotFound, match="gs://no-such-bucket"):
        BucketPolicy(target, "no-such-bucket").read()


def test_the_policy_of_an_account_that_is_not_there_is_not_found(google_target: Target) -> None:
    with pytest.raises(NotFound):
        ServiceAccountPolicy(google_target, EMAIL).read()
