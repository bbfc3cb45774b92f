"""Cloud Storage on loopback: the parts of the JSON and XML API that the official client uses, streaming to disk.

Simulated: buckets (names, locations, uniform access, public access prevention, labels, lifecycle and soft-delete
settings, metageneration preconditions), objects (media, multipart and resumable uploads, XML multipart uploads,
compose, rewrite, copy, move, ranges, generations, preconditions, crc32c and MD5 checks, listing), bucket IAM with
etags, workloads' identities, injected faults, and a link of limited speed.
State survives the server, also when it is killed.

Not simulated: ACLs, object versions and restoring of deleted objects, encryption keys, retention, notifications,
signed URLs, batches, gRPC, folders, conditions in policies. Requests for these, and unknown parameters, headers and
fields, are refused with 404, 405 or 501. Lifecycle rules are kept and never run.

Differences from the service: an MD5 is only computed for objects up to 8 MiB or when the sender states one, etags of
parts are opaque, a rewrite is always done in one call, resumable sessions never expire by themselves, answers to
`projection=full` hold no ACLs, and authorization is by the sandbox's own bearer (see `iam.Caller`).

As a process: `python -m sandbox.storage --root DIR [--port N] [--project P] [--foreign-bucket NAME …]`.
"""

from sandbox.storage.server import StorageServer

__all__ = ["StorageServer"]
