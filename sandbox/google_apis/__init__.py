"""Google Cloud's control plane for one project, on one loopback port.

Simulated, each in its own module with its own list of limits: IAM v1 service accounts and policies, Resource Manager
v3 (one project), Cloud Billing v1 (read), Service Usage v1, GKE v1 and the readable part of Compute Engine v1, with
Google's error bodies. Requests are parsed with the official protobuf schemas; unknown paths answer Google's 404 page,
unknown fields and query parameters 400. Not simulated: authentication (every caller is the operator, with the
permissions that the constructor leaves it), Cloud Quotas, and everything that a module's docstring does not name.
"""

from sandbox.google_apis.cloud import ALL_SERVICES, Delays
from sandbox.google_apis.server import GoogleApisServer

__all__ = ["ALL_SERVICES", "Delays", "GoogleApisServer"]
