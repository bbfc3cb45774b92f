"""Every line of the document's two `if [[ $PROJECT_ID == *:* ]]` blocks, and the same for googleapis.com."""

import pytest

from rollout.errors import BadInput
from rollout.universe import Universe

S3NS = Universe(domain="s3nsapis.fr")
GOOGLE = Universe()


@pytest.mark.parametrize(
    ("universe", "project", "email"),
    [
        (S3NS, "my-project", "gemma-gsa@my-project.s3ns.iam.gserviceaccount.com"),
        (S3NS, "s3ns:my-project", "gemma-gsa@my-project.s3ns.iam.gserviceaccount.com"),
        (S3NS, "example.com:proj-one", "gemma-gsa@proj-one.example.com.s3ns.iam.gserviceaccount.com"),
        (GOOGLE, "my-project", "gemma-gsa@my-project.iam.gserviceaccount.com"),
        (GOOGLE, "example.com:proj-one", "gemma-gsa@proj-one.example.com.iam.gserviceaccount.com"),
    ],
)
def test_service_account_email_follows_universe_and_domain_scope(universe: Universe, project: str, email: str) -> None:
    assert universe.service_account_email("gemma-gsa", project) == email


@pytest.mark.parametrize(
    ("universe", "project", "member"),
    [
        (S3NS, "my-project", "serviceAccount:my-project.s3ns.svc.id.goog[default/gemma-ksa]"),
        (S3NS, "s3ns:my-project", "serviceAccount:my-project.s3ns.svc.id.goog[default/gemma-ksa]"),
        (S3NS, "example.com:proj-one", "serviceAccount:proj-one.example.com.s3ns.svc.id.goog[default/gemma-ksa]"),
        (GOOGLE, "my-project", "serviceAccount:my-project.svc.id.goog[default/gemma-ksa]"),
        (GOOGLE, "example.com:proj-one", "serviceAccount:proj-one.example.com.svc.id.goog[default/gemma-ksa]"),
    ],
)
def test_workload_identity_member_follows_universe_and_domain_scope(
    universe: Universe, project: str, member: str
) -> None:
    assert universe.workload_identity_member(project, "default", "gemma-ksa") == member


def test_direct_principal_names_project_number_pool_and_subject() -> None:
    assert S3NS.workload_identity_principal("my-project", "123", "serving", "gemma-ksa") == (
        "principal://iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/my-project.s3ns.svc.id.goog"
        "/subject/ns/serving/sa/gemma-ksa"
    )


@pytest.mark.parametrize(
    ("universe", "service", "address"),
    [
        (S3NS, "storage", "https://storage.s3nsapis.fr"),
        (S3NS, "container", "https://container.s3nsapis.fr"),
        (GOOGLE, "iam", "https://iam.googleapis.com"),
    ],
)
def test_api_endpoints_follow_the_universe(universe: Universe, service: str, address: str) -> None:
    assert universe.endpoint(service) == address


def test_unknown_universe_is_refused_before_a_wrong_name_is_built() -> None:
    with pytest.raises(BadInput, match=r"'example\.test' is not known.*s3nsapis\.fr"):
        Universe(domain="example.test").service_account_email("gsa", "my-project")
