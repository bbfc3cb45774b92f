"""Google Cloud universes: which suffixes follow from a universe domain.

Source: https://cloud.google.com/docs/overview/universes and the two `if [[ $PROJECT_ID == *:* ]]` blocks of the
vLLM tutorial for Cloud de Confiance by S3NS.
"""

from __future__ import annotations

from rollout.errors import BadInput
from rollout.values import Value

GOOGLE_DEFAULT_DOMAIN = "googleapis.com"

_NAME_PREFIXES = {GOOGLE_DEFAULT_DOMAIN: "", "s3nsapis.fr": "s3ns"}
"""What stands between the project and `iam.gserviceaccount.com` or `svc.id.goog`."""

_CONSOLES = {
    GOOGLE_DEFAULT_DOMAIN: "https://console.cloud.google.com",
    "s3nsapis.fr": "https://console.cloud.s3nscloud.fr",
}


class Universe(Value):
    """A Google Cloud universe, by its domain."""

    domain: str = GOOGLE_DEFAULT_DOMAIN
    """`googleapis.com`, or e.g. `s3nsapis.fr` for Cloud de Confiance by S3NS."""

    @property
    def is_default(self) -> bool:
        return self.domain == GOOGLE_DEFAULT_DOMAIN

    @property
    def name_prefix(self) -> str:
        """The universe's label in e-mails and pools: `s3ns`, or nothing in the default universe."""
        try:
            return _NAME_PREFIXES[self.domain]
        except KeyError:
            raise BadInput(
                f"the universe domain {self.domain!r} is not known.",
                where="target.universe",
                resolution=f"Known are {', '.join(sorted(_NAME_PREFIXES))}; add a new one in rollout/universe.py.",
            ) from None

    @property
    def console(self) -> str:
        """The web console's base address."""
        return _CONSOLES.get(self.domain, _CONSOLES[GOOGLE_DEFAULT_DOMAIN])

    def endpoint(self, service: str) -> str:
        """Base address of a Google API, e.g. `https://storage.s3nsapis.fr`."""
        return f"https://{service}.{self.domain}"

    def service_account_email(self, name: str, project: str) -> str:
        """E.g. `gemma-gsa@my-project.s3ns.iam.gserviceaccount.com`.

        A domain-scoped project `example.com:proj` becomes `proj.example.com`.
        """
        return f"{name}@{self._scoped(project)}.iam.gserviceaccount.com"

    def workload_pool(self, project: str) -> str:
        """The Workload Identity pool: `my-project.s3ns.svc.id.goog`."""
        return f"{self._scoped(project)}.svc.id.goog"

    def workload_identity_member(self, project: str, namespace: str, ksa: str) -> str:
        """The IAM member that lets a Kubernetes service account act as a Google service account."""
        return f"serviceAccount:{self.workload_pool(project)}[{namespace}/{ksa}]"

    def workload_identity_principal(self, project: str, project_number: str, namespace: str, ksa: str) -> str:
        """The IAM principal of a Kubernetes service account itself: access without a Google service account.

        Principal identifiers name `iam.googleapis.com` in every universe: they are names, not addresses.
        """
        return (
            f"principal://iam.googleapis.com/projects/{project_number}/locations/global/workloadIdentityPools/"
            f"{self.workload_pool(project)}/subject/ns/{namespace}/sa/{ksa}"
        )

    def _scoped(self, project: str) -> str:
        domain, _, name = project.rpartition(":")
        # S3NS writes its label before the id of every project, and after its name in e-mails: once.
        parts = [name, "" if domain == self.name_prefix else domain, self.name_prefix]
        return ".".join(part for part in parts if part)
