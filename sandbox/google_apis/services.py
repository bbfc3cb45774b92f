"""Service Usage v1: which APIs the project has enabled.

Simulated: get, batchGet, list with `filter=state:ENABLED|DISABLED`, enable and batchEnable as long-running operations.
Not simulated: disable, quota overrides; services outside of a short catalogue are unknown (403, as in reality).
"""

from __future__ import annotations

import secrets

from google.cloud import service_usage_v1

from sandbox.google_apis.cloud import ALL_SERVICES, API_TITLES, Cloud
from sandbox.google_apis.rest import ApiError, Call, Json, Route, bad_request, error_info

SERVICE = "serviceusage.googleapis.com"
_TYPES = "type.googleapis.com/google.api.serviceusage.v1"
_BATCH_LIMIT = 20


class Services:
    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    def routes(self) -> list[Route]:
        services = "/v1/projects/{project}/services"
        one = services + "/{name}"
        resource = "projects/{project}/services/{name}"
        enable, get, listing = (f"serviceusage.services.{verb}" for verb in ("enable", "get", "list"))
        paging = frozenset({"filter", "pageSize", "pageToken"})
        return [
            Route("GET", services, SERVICE, listing, self._list, query=paging),
            Route("GET", services + ":batchGet", SERVICE, get, self._batch_get, query=frozenset({"names"})),
            Route("POST", services + ":batchEnable", SERVICE, enable, self._batch_enable),
            Route("GET", one, SERVICE, get, self._get, resource=resource),
            Route("POST", one + ":enable", SERVICE, enable, self._enable, resource=resource),
            Route("GET", "/v1/operations/{operation}", SERVICE, None, self._get_operation),
        ]

    def settle(self) -> None:
        """Finish the operations whose time has come."""
        data = self._cloud.store.data
        for operation in data["service_operations"].values():
            if not operation["done"] and operation["due"] <= self._cloud.now():
                operation["done"] = True
                for service in operation["services"]:
                    data["services"][service] = "ENABLED"

    def _get(self, call: Call) -> Json:
        return self._service(call.params["name"])

    def _list(self, call: Call) -> Json:
        wanted = call.query.get("filter", "")
        if wanted not in ("", "state:ENABLED", "state:DISABLED"):
            raise bad_request("filter", f"Invalid filter: {wanted}")
        found = [self._service(name) for name in sorted(ALL_SERVICES)]
        return {"services": [service for service in found if wanted.partition(":")[2] in ("", service["state"])]}

    def _batch_get(self, call: Call) -> Json:
        names = call.query.get("names", "").split(",")
        return {"services": [self._service(name.rpartition("/")[2]) for name in names]}

    def _enable(self, call: Call) -> Json:
        call.parse(service_usage_v1.EnableServiceRequest.pb(service_usage_v1.EnableServiceRequest()))
        return self._start((call.params["name"],), batch=False)

    def _batch_enable(self, call: Call) -> Json:
        request = call.parse(
            service_usage_v1.BatchEnableServicesRequest.pb(service_usage_v1.BatchEnableServicesRequest())
        )
        if not 0 < len(request.service_ids) <= _BATCH_LIMIT:
            raise bad_request("service_ids", f"A batch holds 1 to {_BATCH_LIMIT} services.")
        return self._start(tuple(request.service_ids), batch=True)

    def _start(self, services: tuple[str, ...], *, batch: bool) -> Json:
        for service in services:
            self._service(service)
        data = self._cloud.store.data
        if all(data["services"].get(service) == "ENABLED" for service in services):
            # What Google answers when there is nothing to do: an operation that was never started.
            noop = {"services": list(services), "batch": batch, "done": True, "due": 0.0}
            return self._operation("noop.DONE_OPERATION", noop)
        name = f"acat.p2-{self._cloud.project_number}-{secrets.token_hex(8)}"
        due = self._cloud.now() + self._cloud.delays.api_enable_s
        data["service_operations"][name] = {"services": list(services), "batch": batch, "done": False, "due": due}
        return {"name": f"operations/{name}"}

    def _get_operation(self, call: Call) -> Json:
        name = call.params["operation"]
        operation = self._cloud.store.data["service_operations"].get(name)
        if operation is None:
            raise ApiError("NOT_FOUND", f"Operation not found: operations/{name}", legacy=False)
        return self._operation(name, operation)

    def _operation(self, name: str, operation: Json) -> Json:
        answer: Json = {"name": f"operations/{name}"}
        if not operation["done"]:
            return answer
        services = [self._service(service) for service in operation["services"]]
        if operation["batch"]:
            response: Json = {"@type": f"{_TYPES}.BatchEnableServicesResponse", "services": services}
        else:
            response = {"@type": f"{_TYPES}.EnableServiceResponse", "service": services[0]}
        return answer | {"done": True, "metadata": {"@type": f"{_TYPES}.OperationMetadata"}, "response": response}

    def _service(self, name: str) -> Json:
        if name not in ALL_SERVICES:
            # Google does not tell an unknown service from one that is not yours.
            info = error_info("SERVICE_CONFIG_NOT_FOUND_OR_PERMISSION_DENIED", SERVICE, {"services": name})
            message = f"Not found or permission denied for service(s): {name}."
            raise ApiError("PERMISSION_DENIED", message, details=(info,), legacy=False)
        parent = f"projects/{self._cloud.project_number}"
        state = self._cloud.store.data["services"].get(name, "DISABLED")
        config = {"name": name, "title": API_TITLES[name]}
        return {"name": f"{parent}/services/{name}", "parent": parent, "config": config, "state": state}
