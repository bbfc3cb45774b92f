"""A receiver for Hugging Face's webhooks: it starts the watch at once instead of at its next turn.

The message itself decides nothing: it says "look now", and the watch finds out what is new, so that a lost, repeated or
forged message can neither lose a release nor start one twice. Hugging Face authenticates its messages by the secret
that was given to the webhook, in the header `X-Webhook-Secret`: https://huggingface.co/docs/hub/webhooks
"""

from __future__ import annotations

import hmac
import json
import logging

from aiohttp import web
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, ConfigDict, ValidationError

from rollout.errors import BadInput
from rollout.values import content_digest

SECRET_HEADER = "X-Webhook-Secret"
MAX_BODY_BYTES = 256 * 1024
"""Hugging Face's messages have a few kilobytes; with many updated refs some tens."""

logger = logging.getLogger(__name__)


class _Message(BaseModel):
    """What is read of a message; the rest is passed over, since Hugging Face adds fields."""

    model_config = ConfigDict(extra="ignore")

    class Event(BaseModel):
        action: str
        scope: str

    class Repository(BaseModel):
        type: str
        name: str

    class Update(BaseModel):
        ref: str
        oldSha: str | None = None  # noqa: N815 - the message's own name
        newSha: str | None = None  # noqa: N815
        """None where the branch or tag is gone."""

    event: Event
    repo: Repository
    updatedRefs: tuple[Update, ...] = ()  # noqa: N815

    @property
    def changes(self) -> tuple[Update, ...]:
        """The branches and tags that were made or moved. The scope is `repo.content` or a part of it
        (`repo.content.main`); discussions and settings change no files."""
        about_files = self.repo.type == "model" and self.event.scope.startswith("repo.content")
        return tuple(update for update in self.updatedRefs if about_files and update.newSha)

    @property
    def key(self) -> str:
        """The same for a message and its repetition: the repository and what moved where. The commit of the main
        branch alone would not do, since a new tag leaves it as it is."""
        return (
            f"webhook-{self.repo.name}-{content_digest(sorted((u.ref, u.oldSha, u.newSha) for u in self.changes), 16)}"
        )


def webhook_app(deployment: str, secret: str) -> web.Application:
    """The receiver: `POST /huggingface` starts `deployment` (`FLOW/NAME`), `GET /health` answers 200.

    Raises BadInput for an empty secret: whoever finds the address could start runs.
    """
    if not secret:
        raise BadInput(
            "the webhook's secret is empty.",
            where="webhook",
            resolution="Give Hugging Face's webhook a secret, and the same one to this receiver.",
        )

    async def receive(request: web.Request) -> web.Response:
        presented = request.headers.get(SECRET_HEADER, "")
        if not hmac.compare_digest(presented.encode(), secret.encode()):
            raise web.HTTPUnauthorized(text=f"the header {SECRET_HEADER} does not hold the secret\n")
        try:
            message = _Message.model_validate(json.loads(await request.read()))
        except (ValueError, ValidationError):
            raise web.HTTPBadRequest(text="not a message of Hugging Face's webhooks\n") from None
        if not message.changes:
            why = f"{message.event.action} of {message.event.scope} moves no branch and no tag of a model"
            return web.json_response({"started": None, "why": why})
        run_id = await _start(deployment, message.key)
        moved = ", ".join(f"{update.ref} to {update.newSha}" for update in message.changes)
        logger.info("%s moved %s: started %s", message.repo.name, moved, run_id)
        return web.json_response({"started": run_id}, status=202)

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/huggingface", receive)
    app.router.add_get("/health", health)
    return app


async def _start(deployment: str, idempotency_key: str) -> str:
    """Start a run of `deployment` unless one with this key exists; returns its id."""
    async with get_client() as client:
        try:
            found = await client.read_deployment_by_name(deployment)
        except ObjectNotFound:
            raise web.HTTPServiceUnavailable(text=f"there is no deployment {deployment} yet\n") from None
        run = await client.create_flow_run_from_deployment(found.id, idempotency_key=idempotency_key)
    return str(run.id)
